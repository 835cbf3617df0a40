"""Every model served here, and the answer to one request; knows no wire format."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from time import monotonic, monotonic_ns
from typing import Protocol

from libs import telemetry
from libs.contracts.pipeline import Batching
from libs.contracts.protos.model_config_pb2 import ModelConfig
from libs.doors import Internal, NotFound, Refused, Unavailable
from services.inference import domain, modelconfig, sequences
from services.inference.aside import aside
from services.inference.calls import Answer, Asked, Call, accepted
from services.inference.endpoint import Endpoint, Origin, in_order
from services.inference.front import Front
from services.inference.models import Model
from services.inference.notes import Notes
from services.inference.python_batcher import checked
from services.inference.quarantine import CRASHES_MAX, Crashes
from services.inference.served import Rates, Result, Served
from services.inference.tensors import Arrays

log = logging.getLogger(__name__)
Key = tuple[str, str]
"""(project, model)."""
CORES = len(os.sched_getaffinity(0))
IN_PLACE = 0
OnQuarantine = Callable[[Endpoint, str], Awaitable[None]]
"""Brings another version in the place of the one that is quarantined."""


class Elsewhere(Protocol):
    """What is served by other replicas, or by none until somebody asks."""

    async def bring(self, key: Key, deadline_ns: int) -> None:
        """Waits until it is served, here or there. Raises `Refused`."""

    def serves(self, key: Key) -> bool:
        """Another replica does."""

    async def infer(self, key: Key, call: Call) -> Answer | None:
        """None: answer it here. Raises `Refused`."""

    def asleep(self) -> list[Key]:
        """Nobody serves them, and a request would change that."""


class Nowhere:
    """A server on its own."""

    async def bring(self, key: Key, deadline_ns: int) -> None: ...

    def serves(self, key: Key) -> bool:
        return False

    async def infer(self, key: Key, call: Call) -> Answer | None:
        return None

    def asleep(self) -> list[Key]:
        return []


class Endpoints:
    """Every model served here, by project and name."""

    def __init__(self, front: Front, notes: Notes, project: str) -> None:
        self.front = front
        self.notes = notes
        self.project = project
        self.by_key: dict[Key, Endpoint] = {}
        self.replacing: set[asyncio.Task[None]] = set()
        self.on_quarantine: OnQuarantine = nothing_else
        self.elsewhere: Elsewhere = Nowhere()
        self.rates_of: Callable[[str], Rates] = lambda model: notes.rates

    def at(self, key: Key) -> Endpoint:
        """Made where there is none."""
        if key not in self.by_key:
            self.by_key[key] = Endpoint(self.front, *key, self.name_of(key))
        return self.by_key[key]

    def name_of(self, key: Key) -> str:
        """On the doors."""
        project, model = key
        return model if project == self.project else f"{project}.{model}"

    def key_of(self, name: str) -> Key:
        key = self.project, name
        return key if key in self.by_key else domain.served_name(name, self.project)

    async def add(
        self,
        endpoint: Endpoint,
        version: str,
        model: Model,
        limits: Batching,
        origin: Origin,
        log_percent: int = 0,
        config: ModelConfig | None = None,
    ) -> Served:
        """A warm model is served, as its configuration says: by default a batch for each core."""
        config = config or modelconfig.made(endpoint.name, model, limits)
        served = Served(
            self.front,
            endpoint.name,
            version,
            model,
            runners_of(model, config),
            partial(self.notes.tell, endpoint, version),
            partial(self.crashed, endpoint),
            self.rates_of(endpoint.name),
            config,
        )
        served.configure(limits, log_percent)
        await endpoint.put(served, origin)
        return served

    async def remove(self, key: Key) -> None:
        endpoint = self.by_key.pop(key)
        for version in list(endpoint.served):
            await endpoint.unload(version)

    async def close(self) -> None:
        for key in list(self.by_key):
            await self.remove(key)

    def is_routed(self, key: Key) -> bool:
        return key in self.by_key and any(self.by_key[key].route.values())

    def find(self, name: str) -> Endpoint:
        """By its name on the door. Raises `NotFound`."""
        endpoint = self.by_key.get(self.key_of(name))
        if endpoint is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return endpoint

    async def bring(self, name: str, deadline_ns: int = 0) -> None:
        """What sleeps is woken and waited for. Raises `Refused`."""
        key = self.key_of(name)
        if not self.is_routed(key):
            await self.elsewhere.bring(key, deadline_ns)

    def is_asleep(self, name: str) -> bool:
        key = self.key_of(name)
        return not self.is_routed(key) and key in self.elsewhere.asleep()

    def is_elsewhere(self, name: str) -> bool:
        key = self.key_of(name)
        return not self.is_routed(key) and self.elsewhere.serves(key)

    def is_decoupled(self, name: str, version: str) -> bool:
        """What another replica serves it says itself. Raises `Refused`."""
        return not self.is_elsewhere(name) and self.served(name, version).model.decoupled

    def served(self, name: str, version: str) -> Served:
        """Who would answer; without a version the one with most of the traffic. Raises
        `Refused`."""
        return self.described(name, version)[1]

    def versions(self, name: str, version: str) -> list[Served]:
        """Loaded versions of one model, or of all for "". Raises `Refused`."""
        if not name:
            return [s for e in self.by_key.values() for s in in_order(e)]
        endpoint = self.find(name)
        if version:
            return [endpoint.version(version)]
        return in_order(endpoint)

    def described(self, name: str, version: str) -> tuple[list[str], Served]:
        """(every loaded version, the one that describes the model). Raises `Refused`."""
        endpoint = self.find(name)
        versions = [served.version for served in in_order(endpoint)]
        if version:
            return versions, endpoint.version(version)
        if not any(endpoint.route.values()):
            raise Unavailable(endpoint.nothing())
        return versions, endpoint.served[max(endpoint.route, key=lambda v: endpoint.route[v])]

    def is_ready(self, name: str, version: str) -> bool:
        """What sleeps is: it is asked, and answers."""
        try:
            return bool(self.described(name, version))
        except (NotFound, Unavailable):
            return self.is_elsewhere(name) or self.is_asleep(name)

    def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        """(name, version, state, reason) of everything assigned to this replica."""
        rows = []
        for endpoint in self.by_key.values():
            rows += [(endpoint.name, one.version, "READY", "") for one in in_order(endpoint)]
            if ready_only:
                continue
            rows += [(endpoint.name, v, "UNAVAILABLE", w) for v, w in endpoint.quarantined.items()]
            if not endpoint.served and not endpoint.quarantined:
                rows.append((endpoint.name, "", "UNAVAILABLE", "not loaded yet"))
        if not ready_only:
            sleeping = [self.name_of(key) for key in self.elsewhere.asleep()]
            rows += [(name, "", "UNAVAILABLE", "loaded by the next request") for name in sleeping]
        return rows

    def chosen(self, call: Call) -> Served:
        """As said, else where the request's sequence lives, else by the split. Raises `Refused`."""
        endpoint = self.find(call.model)
        sequence = call.parameters.get("sequence_id")
        if sequence and not call.version:
            for served in endpoint.served.values():
                if served.sequencer is not None and served.sequencer.holds(sequence):
                    return served
        return endpoint.pick(call.version)

    async def infer(self, call: Call) -> Answer:
        """Raises `Refused`."""
        began_ns = monotonic_ns()
        try:
            answer = await self.elsewhere.infer(self.key_of(call.model), call)
            if answer is not None:
                return answer
            served, asked = await self.taken(call, began_ns)
            result = await run(served, asked, call)
        except Refused as error:
            trace_refusal(call, error, began_ns)
            raise
        outputs = [(tensor, result.outputs[tensor.name]) for tensor in asked.outputs]
        place = result.place or call.traceparent
        labels = served.model.labels
        return Answer(call.model, served.version, asked.id, outputs, labels, place)

    async def taken(self, call: Call, began_ns: int) -> tuple[Served, Asked]:
        """Raises `Refused`."""
        served = self.chosen(call)
        asked = await read(call, served, beside(call, served), began_ns)
        if served.is_closed:  # it went meanwhile; who is read in place now, its version cannot
            served = self.chosen(call)
            asked = await read(call, served, IN_PLACE, began_ns)
        return served, asked

    async def stream(self, call: Call) -> AsyncGenerator[Answer, None]:
        """Any number of answers of a decoupled model; exactly one of any other. Raises
        `Refused`."""
        served = self.chosen(call)
        if not served.model.decoupled:
            yield await self.infer(call)
            return
        asked = await aside(beside(call, served), accepted, call, served)
        async for outputs in served.stream(asked.inputs, call.deadline_ns):
            check_streamed(served, outputs)
            own = [(one, outputs[one.name]) for one in asked.outputs if one.name in outputs]
            labels = served.model.labels
            yield Answer(call.model, served.version, asked.id, own, labels, call.traceparent)

    def crashed(self, endpoint: Endpoint, served: Served, cause: str) -> None:
        """After a few crashes a version is quarantined, and another one serves."""
        version = served.version
        if endpoint.served.get(version) is not served or version in endpoint.quarantined:
            return
        log.error("%s: %s", served.title, cause)
        if not endpoint.crashes.setdefault(version, Crashes()).add(monotonic()):
            return
        reason = f"quarantined after {CRASHES_MAX} crashes: {cause}"
        log.error("%s is %s", served.title, reason)
        endpoint.quarantined[version] = reason
        endpoint.direct({v: share for v, share in endpoint.route.items() if v != version})
        task = asyncio.create_task(self.replace(endpoint, served))
        self.replacing.add(task)
        task.add_done_callback(self.replacing.discard)

    async def replace(self, endpoint: Endpoint, served: Served) -> None:
        """By now the version may have been deployed and loaded anew."""
        await self.on_quarantine(endpoint, served.version)
        if endpoint.served.get(served.version) is served:
            await endpoint.unload(served.version)


def runners_of(model: Model, config: ModelConfig) -> int:
    """One more than run at once would only take requests early, in small batches."""
    wished = modelconfig.instances_of(config) or CORES
    return wished if model.parallel is None else min(wished, model.parallel)


async def nothing_else(endpoint: Endpoint, version: str) -> None:
    """There is no other version to serve."""


def check_streamed(served: Served, outputs: Arrays) -> None:
    """One answer of a decoupled model, which may leave outputs out. Raises `Internal`."""
    known = {tensor.name: tensor for tensor in served.signature.outputs}
    for name in outputs:
        if name not in known:
            raise Internal(f"{served.title} failed: it has no output '{name}'")
        try:
            checked(outputs, known[name], None)
        except ValueError as error:
            raise Internal(f"{served.title} failed: {error}") from error


def beside(call: Call, served: Served) -> int:
    """How many bytes of it are to be read where others are answered meanwhile. The requests of a
    sequence stay in their order."""
    return IN_PLACE if served.sequencer else call.bytes_by_value


async def read(call: Call, served: Served, size: int, began_ns: int) -> Asked:
    """Raises `Refused`."""
    try:
        return await aside(size, accepted, call, served)
    except Refused as error:
        served.refuse(error.code.value[0], began_ns)
        raise


async def run(served: Served, asked: Asked, call: Call) -> Result:
    """In its batch, and of a stateful model in its sequence. Raises `Refused`."""

    async def join(inputs: Arrays) -> Result:
        return await served.infer(
            inputs,
            asked.rows,
            asked.id,
            call.traceparent,
            call.deadline_ns,
            asked.timeout_us,
            asked.priority,
        )

    if served.sequencer is None:
        return await join(asked.inputs)
    place = sequences.place_of(call.model, call.parameters)
    return await served.sequencer.infer(place, asked.inputs, asked.rows, call.deadline_ns, join)


def trace_refusal(call: Call, error: Refused, began_ns: int) -> None:
    """Only where the caller traces: what is refused costs nothing else."""
    if telemetry.is_sampled(call.traceparent):
        telemetry.record(
            f"infer {call.model}",
            place=telemetry.child_of(call.traceparent),
            parent=call.traceparent,
            began_ns=began_ns,
            ended_ns=monotonic_ns(),
            failed=str(error),
        )
