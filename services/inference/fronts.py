"""Which front speaks gRPC here, and for how long it listens."""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection

from libs.doors.drain import Drain
from libs.doors.serve import DRAIN_S, joined
from services.inference import native, python_front
from services.inference.front import Front, ServerCall
from services.inference.modelconfig import Misconfigured
from services.inference.rpc import WATCH, Host

log = logging.getLogger(__name__)
KINDS = ("auto", "native", "python")
GRPC_LEAVES_S = 20.0
"""Clients go once they are told to, and what they asked is answered."""


def make(kind: str, on_call: Callable[[ServerCall], None], tokens: Collection[str]) -> Front:
    """`kind`: native, python, or auto for the first of them that is there. Raises
    `Misconfigured`."""
    if kind not in KINDS:
        raise Misconfigured(f"LEPTONIC_INFERENCE_FRONT is '{kind}', not one of {', '.join(KINDS)}")
    if kind == "native" or (kind == "auto" and native.available()):
        log.info("the native front speaks gRPC")
        return native.NativeFront(on_call, tokens)
    if kind == "auto":
        log.warning("the Python front speaks gRPC: the extension leptonic_native is not installed")
    return python_front.PythonFront(on_call, tokens)


@contextlib.asynccontextmanager
async def listening(
    front: Front, rpcs: Host, host: str, port: int, drain: Drain
) -> AsyncIterator[None]:
    """Answers until the block ends; then what was accepted. Who watches our health is told to look
    elsewhere. Raises `OSError` when the port is in use."""
    shared = await joined(drain, port, GRPC_LEAVES_S)
    await front.listen(host, port, shared)
    drain.goodbyes.append(front.say_goodbye)
    try:
        yield
    finally:
        await rpcs.end(WATCH)
        await front.close(DRAIN_S)
