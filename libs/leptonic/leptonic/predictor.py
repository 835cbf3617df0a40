"""Predictions as any Open Inference Protocol client makes them: `tritonclient` over gRPC."""

import dataclasses
import uuid
from types import TracebackType
from typing import Any

from leptonic import stackfile
from leptonic.errors import Error

TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """The most likely label of every row, and which version gave them."""

    request_id: str
    version: str
    labels: list[int]


class Predictor:
    """One connection; needs `tritonclient[grpc]`, which the light client does without."""

    def __init__(self, address: str) -> None:
        try:
            import numpy
            import tritonclient.grpc as triton
        except (ImportError, RuntimeError) as error:
            problem = f"tritonclient is not installed ({error})"
            raise Error(f"{problem}: pip install 'tritonclient[grpc]', or `make setup`") from error
        self.numpy: Any = numpy
        self.triton: Any = triton
        self.address = address
        self.client = triton.InferenceServerClient(address)

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()

    def predict(self, model: str, name: str, rows: Any, datatype: str = "FP32") -> Answer:
        """Rows of one input, in one request."""
        values = self.numpy.asarray(rows, self.triton.triton_to_np_dtype(datatype))
        tensor = self.triton.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values)
        request_id = uuid.uuid4().hex
        try:
            answer = self.client.infer(
                model,
                [tensor],
                request_id=request_id,
                client_timeout=TIMEOUT_S,
                headers=stackfile.authorization(),
            )
        except self.triton.InferenceServerException as error:
            raise Error(f"inference at {self.address}: {error}") from error
        labels = [int(label) for label in answer.as_numpy("label")]
        return Answer(request_id, answer.get_response().model_version, labels)
