"""A runtime of MLServer on onnxruntime; adaptive batching is MLServer's own."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from models import Opened


class Onnx(MLModel):
    async def load(self) -> bool:
        self.opened = Opened(self.name)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        features = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        scores = NumpyCodec.encode_output("scores", self.opened.run(features))
        return InferenceResponse(model_name=self.name, outputs=[scores])
