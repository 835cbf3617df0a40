"""What this replica serves now, and the answer to one request; knows no wire format."""

import asyncio
import contextlib
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from time import monotonic
from typing import NamedTuple

import msgspec
from opentelemetry.trace import INVALID_SPAN, Span, SpanContext

from libs import telemetry
from libs.contracts.artifacts import Tensor
from libs.contracts.events import DeploymentUpdated, Observation, Target
from libs.contracts.pipeline import Batching
from libs.doors import (
    DeadlineExceeded,
    Exhausted,
    Internal,
    Invalid,
    NotFound,
    Refused,
    Unavailable,
)
from services.inference import domain, router, tensors
from services.inference.batcher import Batcher, Full, Late, Result, RunFailed
from services.inference.journal import Entry, Journal
from services.inference.models import Model
from services.inference.statistics import Statistics
from services.inference.tensors import Array, Arrays, Given, Unfit

PLATFORM = "onnxruntime_onnx"
Key = tuple[str, str]
"""(project, model)."""


class Call(NamedTuple):
    """One inference request."""

    model: str
    """As named on the door: `digits`, or `<project>.digits`."""
    version: str
    """"" for whichever the split chooses."""
    id: str
    given: Sequence[Given]
    outputs: Sequence[str]
    """Those asked for; all of them when empty."""
    timeout_s: float | None
    traceparent: str


class Answer(NamedTuple):
    model: str
    number: int
    id: str
    outputs: list[tuple[Tensor, Array]]
    traceparent: str


class Served:
    """A loaded version behind its batcher."""

    def __init__(self, name: str, target: Target, model: Model, batching: Batching) -> None:
        self.number = target.number
        self.model = model
        self.registered = context_of(target.traceparent)
        self.statistics = Statistics(name, str(target.number))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-{target.number}")
        self.batcher = Batcher(self.run, batching, monotonic)
        self.position = 0

    async def run(self, inputs: Arrays) -> Arrays:
        started_s = monotonic()
        loop = asyncio.get_running_loop()
        outputs = await loop.run_in_executor(self.thread, self.model.run, inputs)
        self.statistics.ran(len(next(iter(inputs.values()))), monotonic() - started_s)
        return outputs

    def is_sampled(self, percent: int) -> bool:
        """Its own count: a sample by the split's count would see one version only."""
        self.position += 1
        return router.sampled(percent, self.position)

    async def close(self) -> None:
        """Whoever is in line is answered first."""
        await self.batcher.close()
        self.thread.shutdown(wait=False)


class Endpoint:
    """A deployment as it is served here."""

    def __init__(self, project: str, model: str, name: str) -> None:
        self.project = project
        self.model = model
        self.name = name
        self.served: dict[int, Served] = {}
        self.route: dict[int, int] = {}
        self.deployment: DeploymentUpdated | None = None
        """The one the route follows."""
        self.announced = 0
        """Generation of which this process said that it serves it."""
        self.rolled_out: SpanContext | None = None
        self.position = 0
        self.counts: dict[tuple[int, int], list[int]] = {}
        """(generation, number) -> [requests, errors] not yet in Postgres."""
        self.observed: list[Observation] = []

    @property
    def loaded(self) -> dict[int, str]:
        return {number: served.model.digest for number, served in self.served.items()}

    @property
    def generation(self) -> int:
        return self.deployment.generation if self.deployment else 0

    async def add(self, target: Target, model: Model, batching: Batching) -> None:
        replaced = self.served.get(target.number)
        self.served[target.number] = Served(self.name, target, model, batching)
        if replaced is not None:
            await replaced.close()

    def follow(self, deployment: DeploymentUpdated, plan: domain.Plan) -> None:
        """From the next request on. A generation that is not complete leaves the old one's."""
        self.route = plan.route
        for number, percent in plan.route.items():
            self.served[number].statistics.traffic.set(percent)
        if plan.complete or self.deployment is None:
            self.deployment = deployment
            self.observed = []
            limits = batching_of(deployment)
            for served in self.served.values():
                served.batcher.line.limits = limits

    async def unload(self, number: int) -> None:
        unloaded = self.served.pop(number)
        unloaded.statistics.traffic.set(0)
        await unloaded.close()

    def pick(self, version: str) -> Served:
        """Raises `Refused`."""
        if version:
            return self.version(version)
        if not any(self.route.values()):
            raise Unavailable(f"Request for unknown model: '{self.name}' has no available versions")
        self.position += 1
        return self.served[router.choose(self.route, self.position)]

    def version(self, version: str) -> Served:
        if not (version.isascii() and version.isdigit()):
            raise Invalid(
                f"failed to get model version from specified version string '{version}' "
                f"for model '{self.name}': it is not an unsigned integer",
                "model_version",
            )
        served = self.served.get(int(version))
        if served is None:
            raise NotFound(
                f"Request for unknown model: '{self.name}' version {version} is not found"
            )
        return served

    def count(self, generation: int, number: int, failed: bool) -> None:
        counts = self.counts.setdefault((generation, number), [0, 0])
        counts[0] += 1
        counts[1] += failed

    def settle(self, counts: dict[tuple[int, int], list[int]]) -> None:
        """These are in Postgres now."""
        for place, (requests, errors) in counts.items():
            self.counts[place][0] -= requests
            self.counts[place][1] -= errors
            if not any(self.counts[place]):
                del self.counts[place]


class Endpoints:
    """Every deployment served here, by project and model."""

    def __init__(self, journal: Journal, project: str, replica: str, trace_percent: int) -> None:
        self.journal = journal
        self.project = project
        self.replica = replica
        self.trace_percent = trace_percent
        self.by_key: dict[Key, Endpoint] = {}
        self.position = 0

    def at(self, key: Key) -> Endpoint:
        """Made where there is none."""
        if key not in self.by_key:
            project, model = key
            name = model if project == self.project else f"{project}.{model}"
            self.by_key[key] = Endpoint(project, model, name)
        return self.by_key[key]

    async def remove(self, key: Key) -> None:
        endpoint = self.by_key.pop(key)
        for number in list(endpoint.served):
            await endpoint.unload(number)

    async def close(self) -> None:
        for key in list(self.by_key):
            await self.remove(key)

    def is_routed(self, key: Key) -> bool:
        return key in self.by_key and any(self.by_key[key].route.values())

    def find(self, name: str) -> Endpoint:
        """By its name on the door. Raises `NotFound`."""
        endpoint = self.by_key.get(domain.served_name(name, self.project))
        if endpoint is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return endpoint

    def versions(self, name: str, version: str) -> list[Served]:
        """Loaded versions of one model, or of all for "". Raises `Refused`."""
        if not name:
            return [s for e in self.by_key.values() for _, s in sorted(e.served.items())]
        endpoint = self.find(name)
        if version:
            return [endpoint.version(version)]
        return [served for _, served in sorted(endpoint.served.items())]

    def described(self, name: str, version: str) -> tuple[list[str], Served]:
        """(every loaded version, the one that describes the model). Raises `Refused`.

        Without a version it is the one with most of the traffic.
        """
        endpoint = self.find(name)
        numbers = [str(number) for number in sorted(endpoint.served)]
        if version:
            return numbers, endpoint.version(version)
        if not any(endpoint.route.values()):
            raise Unavailable(f"Request for unknown model: '{name}' has no available versions")
        return numbers, endpoint.served[max(endpoint.route, key=lambda n: endpoint.route[n])]

    def is_ready(self, name: str, version: str) -> bool:
        try:
            return bool(self.described(name, version))
        except (NotFound, Unavailable):
            return False

    def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        """(name, version, state, reason) of everything assigned to this replica."""
        rows = []
        for endpoint in self.by_key.values():
            rows += [(endpoint.name, str(n), "READY", "") for n in sorted(endpoint.served)]
            if not endpoint.served and not ready_only:
                rows.append((endpoint.name, "", "UNAVAILABLE", "not loaded yet"))
        return rows

    async def infer(self, call: Call) -> Answer:
        """Raises `Refused`."""
        with self.span(call) as span:
            endpoint = self.find(call.model)
            served = endpoint.pick(call.version)
            started_s = monotonic()
            try:
                return await self.answer(call, endpoint, served, span)
            except Refused as error:
                served.statistics.refused(error.code.name, monotonic() - started_s)
                raise

    @contextlib.contextmanager
    def span(self, call: Call) -> Iterator[Span]:
        """The request's span, or one that goes nowhere when this request is not sampled."""
        self.position += 1
        if not router.sampled(self.trace_percent, self.position):
            yield INVALID_SPAN
            return
        with telemetry.span(
            f"infer {call.model}", kind=telemetry.SpanKind.SERVER, parent=call.traceparent
        ) as span:
            yield span

    async def answer(self, call: Call, endpoint: Endpoint, served: Served, span: Span) -> Answer:
        started_s = monotonic()
        request_id = id_of(call)
        generation = endpoint.generation
        describe(span, endpoint, served, request_id)
        inputs = accepted(call, served)
        wanted = asked_for(call, served)
        result = await self.run(call, endpoint, served, inputs)
        endpoint.count(generation, served.number, failed=False)
        rows = rows_of(inputs)
        served.statistics.answered(rows, result, monotonic() - started_s)
        span.set_attribute("leptonic.batch_rows", result.batch_rows)
        place = telemetry.traceparent_of(span) or call.traceparent
        self.log(endpoint, served, generation, request_id, inputs, result.outputs, place)
        outputs = [(tensor, result.outputs[tensor.name]) for tensor in wanted]
        return Answer(call.model, served.number, request_id, outputs, place)

    async def run(self, call: Call, endpoint: Endpoint, served: Served, inputs: Arrays) -> Result:
        name = f"model '{call.model}' version {served.number}"
        generation = endpoint.generation
        deadline_s = None if call.timeout_s is None else monotonic() + call.timeout_s
        try:
            return await served.batcher.infer(inputs, rows_of(inputs), deadline_s)
        except Full as error:
            raise Exhausted(f"exceeds maximum queue size of {name}: {error}") from error
        except Late as error:
            raise DeadlineExceeded(f"{name}: {error}") from error
        except RunFailed as error:
            endpoint.count(generation, served.number, failed=True)
            raise Internal(f"{name} failed: {error}") from error

    def log(
        self,
        endpoint: Endpoint,
        served: Served,
        generation: int,
        request_id: str,
        inputs: Arrays,
        outputs: Arrays,
        place: str,
    ) -> None:
        assert endpoint.deployment is not None
        if not served.is_sampled(endpoint.deployment.request_log_percent):
            return
        self.journal.put(
            Entry(
                project=endpoint.project,
                request_id=request_id,
                model=endpoint.model,
                number=served.number,
                generation=generation,
                replica=self.replica,
                inputs=inputs,
                outputs=outputs,
                traceparent=place,
                at=datetime.now(UTC).isoformat(),
            )
        )


def describe(span: Span, endpoint: Endpoint, served: Served, request_id: str) -> None:
    """Who answers; the links lead to where the version came from and to its roll-out."""
    span.set_attributes(
        {
            "leptonic.request_id": request_id,
            "leptonic.project": endpoint.project,
            "leptonic.model": endpoint.model,
            "leptonic.version": served.number,
            "leptonic.generation": endpoint.generation,
        }
    )
    for place in (served.registered, endpoint.rolled_out):
        if place is not None:
            span.add_link(place)


def accepted(call: Call, served: Served) -> Arrays:
    """Raises `Invalid`, which names the input."""
    try:
        inputs = tensors.accept(call.model, served.model.signature, call.given)
    except Unfit as error:
        raise Invalid(str(error)) from error
    rows, rows_max = rows_of(inputs), served.batcher.line.limits.max_batch_size
    if rows > rows_max:
        raise Invalid(
            f"inference request batch-size must be <= {rows_max} for '{call.model}', got {rows}"
        )
    return inputs


def asked_for(call: Call, served: Served) -> list[Tensor]:
    known = {tensor.name: tensor for tensor in served.model.signature.outputs}
    for name in call.outputs:
        if name not in known:
            raise Invalid(
                f"unexpected inference output '{name}' for model '{call.model}': "
                f"it gives {tensors.listed(known)}"
            )
    return [known[name] for name in call.outputs or known]


def id_of(call: Call) -> str:
    """The client's own, else a new one."""
    if call.id and not domain.is_id(call.id):
        limit = f"at most {domain.ID_CHARACTERS_MAX} printable characters"
        raise Invalid(f"{limit}, got {len(call.id)}", "id")
    return call.id or uuid.uuid4().hex


def rows_of(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def batching_of(deployment: DeploymentUpdated) -> Batching:
    return msgspec.convert(deployment.batching, Batching, strict=False)


def context_of(traceparent: str) -> SpanContext | None:
    place = telemetry.span_context_of(traceparent)
    return place if place.is_valid else None
