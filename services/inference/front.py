"""What stands between the sockets and the models: a front, and a batcher for each served version.

There are two fronts behind this one interface: `native` (C++) and
`python_front` (where the extension is missing). Both answer `ModelInfer` with
raw contents by themselves; every other call is handed over as a `ServerCall`.

A request joins a batcher, from a socket or from Python; a runner thread takes batches, runs the
model and answers. Times are `time.monotonic_ns()`; codes are gRPC's status numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from libs.contracts.artifacts import Signature
from libs.contracts.pipeline import Batching
from services.inference.tensors import Arrays

LATENCY_BOUNDS_NS = tuple(
    int(seconds * 1e9)
    for seconds in (
        0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5
    )
)  # fmt: skip
"""Upper bounds of the histograms in `Counts`; one more bucket takes what is above."""


def full_text(what: str, waiting: str) -> str:
    """What is told to a request that may not wait; `what` has a queue, in which `waiting` are."""
    return f"exceeds maximum queue size of {what}: {waiting} wait already"


LEAVING = " is being unloaded"


def leaving_text(what: str) -> str:
    return what + LEAVING


class Lane(NamedTuple):
    """What a batcher must know of the version behind it."""

    model: str
    """As it is named on the door."""
    version: str
    signature: Signature
    batched: bool
    """The first dimension of every tensor is the request's rows; else each request runs alone."""
    opaque: bool
    """Only requests from Python: strings, sequences, decoupled answers, requests in other hands."""


class Sampling(NamedTuple):
    """Which requests are traced and which are logged.

    Traced: those whose caller traces (its traceparent says sampled), and so many more a second.
    Logged: `log_percent` of them, `router.sampled` by arrival, at most so many a second.
    """

    traces_per_s: float
    log_percent: int
    log_per_s: float


class Note(NamedTuple):
    """A request of a batch that is traced or logged."""

    id: str
    """The client's own, else 32 hex digits."""
    parent: str
    """The caller's traceparent, or ""."""
    place: str
    """The traceparent of the request's own span; "" when it is not traced."""
    logged: bool
    start: int
    """First row in the batch."""
    stop: int
    arrived_ns: int
    taken_ns: int


class Waiter(Protocol):
    """Who joined from Python; called on a runner's thread, exactly once."""

    def answered(
        self,
        outputs: Arrays,
        start: int,
        stop: int,
        batch_rows: int,
        note: Note | None,
    ) -> None:
        """`outputs` are the batch's; rows start:stop are this request's."""

    def failed(self, code: int, text: str) -> None: ...


class Counts(NamedTuple):
    """Since the batcher was made. Times are sums in ns."""

    success_count: int
    success_ns: int
    """From arrival to answer, of those that succeeded."""
    failures: dict[int, tuple[int, int]]
    """gRPC code -> (requests, ns)."""
    queue_ns: int
    """Arrival until taken, of those that succeeded."""
    compute_input_ns: int
    """Gathering; a request counts the whole of its batch, as do the next two."""
    compute_infer_ns: int
    compute_output_ns: int
    inference_count: int
    """Rows of those that succeeded."""
    batches: dict[int, tuple[int, int, int, int]]
    """Rows -> (runs, input ns, infer ns, output ns)."""
    latency: list[int]
    """Requests for each bucket of `LATENCY_BOUNDS_NS`."""
    queue: list[int]
    waiting: int
    """Right now."""
    last_inference_ms: int
    """Wall clock, ms since the epoch; 0 for never."""


class Batch(Protocol):
    """Taken: to be answered or failed, once."""

    rows: int
    size: int
    """Requests."""
    notes: Sequence[Note]

    def inputs(self) -> Arrays:
        """The rows of all its requests, in order, contiguous."""

    def answer(self, outputs: Arrays) -> None:
        """Raises `ValueError` when an output is missing, or has other rows, or another datatype."""

    def fail(self, code: int, text: str) -> None: ...

    def split(self) -> "list[Batch]":
        """One for each request: a batch that failed is run again one by one."""


class Batcher(Protocol):
    """The queue of one served version. Every method may be called from any thread."""

    def configure(self, limits: Batching, sampling: Sampling) -> None:
        """From the next request on."""

    def join(
        self,
        inputs: Arrays,
        rows: int,
        waiter: Waiter,
        id: str = "",
        traceparent: str = "",
        deadline_ns: int = 0,
        timeout_us: int = 0,
        priority: int = 0,
    ) -> int:
        """A ticket; 0 when `max_queue_size` requests wait already, -1 when it is closed."""

    def leave(self, ticket: int) -> None:
        """Nobody waits for it any more; not called back, if it was not taken yet."""

    def take(self) -> Batch | None:
        """Blocks, without the GIL. None once it is closed and nobody waits."""

    def close(self) -> None:
        """No more joins. Who waits is still taken."""

    def counts(self) -> Counts: ...


class ServerCall(Protocol):
    """An RPC that the front does not answer by itself. Used on the event loop."""

    method: str
    """`/inference.GRPCInferenceService/ModelMetadata`."""
    metadata: Sequence[tuple[str, str]]
    """Lower-case names; values of `-bin` ones as they came (base64)."""
    deadline_ns: int
    """0 for none."""
    peer: str

    async def read(self) -> bytes | None:
        """The next message, decompressed; None when the client has sent its last.

        Raises `asyncio.CancelledError` once the client has gone.
        """

    async def write(self, message: bytes) -> None:
        """Waits while the client does not read. Raises `CancelledError` when it has gone."""

    def finish(self, code: int, text: str = "", trailing: Sequence[tuple[str, str]] = ()) -> None:
        """Once; nothing happens when the client has gone."""

    def on_gone(self, gone: Callable[[], None]) -> None:
        """Called when the client cancels or vanishes before `finish`."""


class Front(Protocol):
    """The gRPC door of the inference service: cleartext HTTP/2 on one port."""

    port: int
    """0 until it listens."""

    async def listen(self, host: str, port: int, shared: bool) -> None:
        """`shared`: others may listen there too (SO_REUSEPORT). Raises `OSError`."""

    def batcher(self, lane: Lane) -> Batcher: ...

    def route(self, model: str, shares: Mapping[str, int], batchers: Mapping[str, Batcher]) -> None:
        """From the next request on. `shares`: version -> percent, in the order of `router.choose`;
        `batchers`: every version that may be asked for. Both empty: the model is not served."""

    def say_goodbye(self) -> None:
        """Tells every client, those to come too, to open another connection (GOAWAY); accepted
        requests are answered."""

    async def close(self, patience_s: float) -> None:
        """Stops listening; what was accepted is answered, for so long; then lets go."""
