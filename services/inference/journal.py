"""The request log: what was asked and answered, onto `requests.<project>.<model>`.

Answering never waits for it. The queue is bounded in entries and bytes; what does not fit is
dropped and counted.
"""

import asyncio
import contextlib
import logging
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator

import msgspec
from prometheus_client import Counter

from libs.bus import Bus, PublishFailed
from services.inference.tensors import Array, Arrays, encoded_string

log = logging.getLogger(__name__)
LOG_DROPPED = Counter(
    "leptonic_inference_request_log_dropped", "Requests not logged because the log was full"
)
ENTRIES_MAX = 8192
BYTES_MAX = 64 << 20
MESSAGE_BYTES_MAX = 1 << 20
ENTRY_BYTES_MAX = 4 * MESSAGE_BYTES_MAX
"""No array's JSON is shorter than a quarter of it: what is larger is not even encoded."""
TAKE_MAX = 512
GATHER_S = 0.1
"""How long entries gather into one message: few messages on the wire."""
RETRY_S = 0.5
DRAIN_S = 3.0


class Entry(msgspec.Struct, frozen=True):
    """One answered request; `store.Logged` is how it is read back."""

    project: str
    request_id: str
    model: str
    number: int
    generation: int
    replica: str
    inputs: Arrays
    outputs: Arrays
    traceparent: str
    at: str

    @property
    def size_bytes(self) -> int:
        return sum(bytes_of(a) for arrays in (self.inputs, self.outputs) for a in arrays.values())

    def encoded(self) -> bytes:
        row = {name: getattr(self, name) for name in self.__struct_fields__ if name != "project"}
        row["inputs"] = {name: array.tolist() for name, array in self.inputs.items()}
        row["outputs"] = {name: array.tolist() for name, array in self.outputs.items()}
        return msgspec.json.encode(row)


def bytes_of(array: Array) -> int:
    """Of an array of objects `nbytes` counts the pointers."""
    elements = array.flat if array.dtype == object else ()
    return int(array.nbytes) + sum(len(encoded_string(one)) for one in elements)


class Journal:
    def __init__(
        self, bus: Bus, entries_max: int = ENTRIES_MAX, bytes_max: int = BYTES_MAX
    ) -> None:
        self.bus = bus
        self.entries_max = entries_max
        self.bytes_max = bytes_max
        self.queue: deque[Entry] = deque()
        self.bytes = 0
        self.dropped = 0
        self.filled = asyncio.Event()
        self.closing = False

    def put(self, entry: Entry) -> None:
        size = entry.size_bytes
        if size > ENTRY_BYTES_MAX:
            self.drop_long(entry, size)
        elif len(self.queue) >= self.entries_max or self.bytes + size > self.bytes_max:
            self.drop()
        else:
            self.queue.append(entry)
            self.bytes += size
            self.filled.set()

    def drop_long(self, entry: Entry, size: int) -> None:
        log.warning("request %s: %s bytes are too many to log", entry.request_id, size)
        self.drop()

    def drop(self) -> None:
        self.dropped += 1
        LOG_DROPPED.inc()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Publishes while the block lasts; what is left goes out when it ends."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.run())
            try:
                yield
            finally:
                self.closing = True
                self.filled.set()
                done, _ = await asyncio.wait([task], timeout=DRAIN_S)
                if not done:
                    log.error("request log: %s entries left behind", len(self.queue))
                    task.cancel()

    async def run(self) -> None:
        while not self.closing or self.queue:
            await self.filled.wait()
            self.filled.clear()
            if not self.closing and len(self.queue) < TAKE_MAX:
                await asyncio.sleep(GATHER_S)
            if self.queue:
                await self.flush()
            if self.queue:
                self.filled.set()

    async def flush(self) -> None:
        taken = [self.queue.popleft() for _ in range(min(TAKE_MAX, len(self.queue)))]
        self.bytes -= sum(entry.size_bytes for entry in taken)
        by_model: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in taken:
            by_model[entry.project, entry.model].append(entry)
        for (project, model), entries in by_model.items():
            for payload in self.payloads(entries):
                await self.send(f"requests.{project}.{model}", payload)

    def payloads(self, entries: list[Entry]) -> list[bytes]:
        """JSON arrays, none much larger than a megabyte; an entry that is by itself is dropped."""
        arrays: list[list[bytes]] = [[]]
        size = 0
        for entry in entries:
            row = entry.encoded()
            if len(row) > MESSAGE_BYTES_MAX:
                self.drop_long(entry, len(row))
                continue
            if size + len(row) > MESSAGE_BYTES_MAX:
                arrays.append([])
                size = 0
            arrays[-1].append(row)
            size += len(row)
        return [b"[" + b",".join(rows) + b"]" for rows in arrays if rows]

    async def send(self, subject: str, payload: bytes) -> None:
        message_id = uuid.uuid4().hex
        while True:
            try:
                await self.bus.publish(subject, payload, id=message_id)
            except PublishFailed as error:
                log.warning("request log: %s", error)
                await asyncio.sleep(RETRY_S)
            else:
                return
