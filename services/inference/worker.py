"""A process of its own for one model whose code is somebody else's.

`python -m services.inference.worker FD`: a channel to the service is at that descriptor. Whatever
happens here - a segfault, an exit, all memory taken - happens to this process only.
"""

import asyncio
import ctypes
import faulthandler
import importlib.util
import inspect
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

import msgspec

from services.inference import pb_utils
from services.inference.channel import Arrays, Channel, Message

SET_PARENT_DEATH_SIGNAL = 1
"""prctl's number."""
ERROR_CHARS_MAX = 2000
MEMORY_BYTES_MAX = 16 << 30
"""Of its own memory, not of shared maps; above it the model gets a `MemoryError`."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told first."""

    name: str
    version: str
    kind: str
    """`python` or `onnx`."""
    file: str = ""
    """Of the code or the graph; a graph may come over the channel instead."""
    folder: str = ""
    """Of the model: above its versions."""
    config: str = "{}"
    """The model's configuration as Triton's JSON."""
    libraries: list[str] = []
    """Of custom ops."""
    outputs: list[str] = []
    batched: bool
    instance: int = 0
    memory_bytes_max: int = MEMORY_BYTES_MAX


class Runner(Protocol):
    signature: str
    """JSON; "" where the graph says nothing."""

    def run(self, number: int, inputs: Arrays) -> None: ...

    def close(self) -> None: ...


class PythonRunner:
    """`TritonPythonModel` of a `model.py`."""

    signature = ""

    def __init__(self, spec: Spec, given: Arrays, channel: Channel) -> None:
        self.spec = spec
        self.channel = channel
        self.model = imported(Path(spec.file)).TritonPythonModel()
        if hasattr(self.model, "initialize"):
            self.model.initialize(
                {
                    "model_config": spec.config,
                    "model_instance_kind": "CPU",
                    "model_instance_name": f"{spec.name}_0_{spec.instance}",
                    "model_instance_device_id": "0",
                    "model_repository": spec.folder,
                    "model_version": spec.version,
                    "model_name": spec.name,
                }
            )

    def run(self, number: int, inputs: Arrays) -> None:
        sender = pb_utils.ResponseSender(Sender(self.channel, number))
        request = pb_utils.InferenceRequest(
            model_name=self.spec.name,
            model_version=int(self.spec.version),
            requested_output_names=self.spec.outputs,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            sender=sender,
        )
        responses = self.model.execute([request])
        if inspect.isawaitable(responses):
            responses = asyncio.run(finished(responses))
        if responses is None:
            return
        if len(responses) != 1 or responses[0] is None:
            raise ValueError(f"execute() gave {len(responses)} responses for 1 request")
        sender.send(responses[0], pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def close(self) -> None:
        if hasattr(self.model, "finalize"):
            self.model.finalize()


class Sender:
    """Answers of one request; called from any thread of the model."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel = channel
        self.number = number

    def __call__(self, response: pb_utils.InferenceResponse | None, last: bool) -> None:
        message = Message(self.number, last)
        if response is None:
            self.channel.send(message)
        elif (error := response.error()) is not None:
            message.error = error.message()[:ERROR_CHARS_MAX]
            self.channel.send(message)
        else:
            self.channel.send(
                message, {one.name(): one.as_numpy() for one in response.output_tensors()}
            )


class OnnxRunner:
    """A graph with ops of somebody's library."""

    def __init__(self, spec: Spec, given: Arrays, channel: Channel) -> None:
        from services.inference.models import OnnxModel

        self.channel = channel
        libraries = [Path(library) for library in spec.libraries]
        graph = Path(spec.file) if spec.file else given["graph"].tobytes()
        self.model = OnnxModel(spec.name, "", graph, batched=spec.batched, libraries=libraries)
        self.signature = msgspec.json.encode(self.model.signature).decode()

    def run(self, number: int, inputs: Arrays) -> None:
        self.channel.send(Message(number), self.model.run(inputs))

    def close(self) -> None:
        self.model.close()


RUNNERS: dict[str, Any] = {"python": PythonRunner, "onnx": OnnxRunner}


async def finished(responses: Any) -> Any:
    return await responses


def imported(file: Path) -> Any:
    """With what lies beside it importable, as in Triton."""
    sys.modules["triton_python_backend_utils"] = pb_utils
    sys.path[:0] = [str(file.parent), str(file.parent.parent)]
    spec = importlib.util.spec_from_file_location("model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    spec.loader.exec_module(module)
    return module


def serve(channel: Channel, runner: Runner) -> None:
    channel.send(Message(text=runner.signature))
    while (received := channel.receive()) is not None:
        number = received[0].id
        try:
            runner.run(number, received[1])
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            channel.send(Message(number, error=described(error)))


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_CHARS_MAX]


def confine(spec: Spec) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (spec.memory_bytes_max, spec.memory_bytes_max))


def die_with_parent() -> None:
    """Even when it is killed. It may be gone already: then somebody else is our parent."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main(descriptor: int) -> None:
    faulthandler.enable(all_threads=False)
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    channel = Channel(sock)
    received = channel.receive()
    if received is None:
        return
    message, given = received
    spec = msgspec.json.decode(message.text, type=Spec)
    confine(spec)
    try:
        runner = RUNNERS[spec.kind](spec, given, channel)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        channel.send(Message(error=described(error)))
        return
    del received, given
    serve(channel, runner)
    runner.close()


if __name__ == "__main__":
    die_with_parent()
    if os.getppid() != int(sys.argv[2]):
        sys.exit(1)
    main(int(sys.argv[1]))
