"""onnxruntime in Triton's Python backend: a process of its own, reached by shared memory."""

import triton_python_backend_utils as pb
from models import Opened
from numpy import concatenate


class TritonPythonModel:
    def initialize(self, args):
        self.opened = Opened(args["model_name"])

    def execute(self, requests):
        rows = [pb.get_input_tensor_by_name(one, "features").as_numpy() for one in requests]
        scores = self.opened.run(concatenate(rows) if len(rows) > 1 else rows[0])
        answers, start = [], 0
        for part in rows:
            stop = start + len(part)
            answers.append(pb.InferenceResponse([pb.Tensor("scores", scores[start:stop])]))
            start = stop
        return answers
