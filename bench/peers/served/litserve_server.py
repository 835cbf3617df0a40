"""LitServe with batching, HTTP and JSON."""

import litserve
from models import NAMES, PORT, ROWS_MAX, WAIT_MAX_S, Opened
from numpy import asarray, float32, stack


class Onnx(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.opened = Opened(NAMES[0])

    def decode_request(self, request):
        return asarray(request["features"][0], float32)

    def batch(self, inputs):
        return stack(inputs)

    def predict(self, features):
        return self.opened.run(features)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"scores": output.tolist()}


if __name__ == "__main__":
    api = Onnx(max_batch_size=ROWS_MAX, batch_timeout=WAIT_MAX_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )
