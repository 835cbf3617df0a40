"""Small models in workers of their own, closed when a test is over."""

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from libs.contracts.artifacts import Signature, Tensor
from services.inference.isolated import Isolated
from services.inference.worker import Spec

SIGNATURE = Signature([Tensor("x", "FP32", [-1, 2])], [Tensor("y", "FP32", [-1, 2])])
PRELUDE = """
    import ctypes, os, signal, sys, threading
    import numpy as np
    import triton_python_backend_utils as pb_utils

    def x_of(request):
        return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

    def answer(array):
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", array)])
"""
CALM = """
    class TritonPythonModel:
        def execute(self, requests):
            return [answer(x_of(request) + 1) for request in requests]
"""
TORN = """
    class TritonPythonModel:
        def execute(self, requests):
            x = x_of(requests[0])
            if x[0, 0] < 0:
                print("about to fall")
                {fall}
            return [answer(x)]
"""
DECOUPLED = """
    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender = request.get_response_sender()
                threading.Thread(target=self.say, args=[sender, x_of(request)]).start()

        def say(self, sender, x):
            for n in range(int(x[0, 0])):
                sender.send(answer(x + n))
            if x[0, 1] < 0:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("enough")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
SYNCHRONOUS = """
    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender, x = request.get_response_sender(), x_of(request)
                for n in range(int(x[0, 0])):
                    sender.send(answer(x + n))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
"""Its streams are computed one after the other."""
ONE = np.array([[1, 2]], np.float32)
BAD = np.array([[-1, 2]], np.float32)
Make = Callable[..., Isolated]


@contextlib.contextmanager
def kept(tmp_path: Path) -> Iterator[Make]:
    models: list[Isolated] = []

    def make(code: str, signature: Signature = SIGNATURE, **stated: Any) -> Isolated:
        place = tmp_path / "model" / "3"
        place.mkdir(parents=True)
        text = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
        (place / "model.py").write_text(text)
        limits = {
            name: stated.pop(name) for name in ("config", "memory_bytes_max") if name in stated
        }
        spec = Spec(
            name="torn",
            version="3",
            kind="python",
            file=str(place / "model.py"),
            folder=str(place.parent),
            batched=True,
            **limits,
        )
        models.append(Isolated(spec, signature=signature, **stated))
        return models[-1]

    yield make
    for model in models:
        model.close()


def pid_of(model: Isolated) -> int:
    assert model.worker is not None
    return model.worker.process.pid


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))
