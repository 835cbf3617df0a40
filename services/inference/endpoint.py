"""A model as it is served here: its versions, and who gets which share of the requests."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from opentelemetry.trace import SpanContext

from libs import telemetry
from libs.contracts.events import DeploymentUpdated, Observation, Target
from libs.contracts.pipeline import Batching
from libs.doors import Invalid, NotFound, Unavailable
from services.inference import domain, router
from services.inference.front import Batcher, Front
from services.inference.quarantine import Crashes
from services.inference.served import Served

NO_VERSIONS = "has no available versions"


class Origin(NamedTuple):
    """Where a version came from and how it came here."""

    digest: str
    registered: str = ""
    """Traceparent of its registration."""


class Endpoint:
    """A model as it is served here: its versions and who gets which share of the requests."""

    def __init__(self, front: Front, project: str, model: str, name: str) -> None:
        self.front = front
        self.project = project
        self.model = model
        self.name = name
        self.served: dict[str, Served] = {}
        self.origins: dict[str, Origin] = {}
        self.route: dict[str, int] = {}
        self.shared = False
        """Other replicas help: the front hands its requests over instead of answering them."""
        self.position = 0
        self.crashes: dict[str, Crashes] = {}
        self.quarantined: dict[str, str] = {}
        """Version -> why."""
        self.deployment: DeploymentUpdated | None = None
        """The one the route follows; a model repository has none."""
        self.announced = 0
        """Generation of which this process said that it serves it."""
        self.routed = 0
        """Generation that is served as well as it can be; 0 while something is missing."""
        self.stale = False
        """Something else than the route is to be served, though the generation is the same."""
        self.rolled_out: SpanContext | None = None
        self.seen: dict[Served, tuple[int, int]] = {}
        """(requests, errors) that `counts` has."""
        self.counts: dict[tuple[int, int], list[int]] = {}
        """(generation, number) -> [requests, errors] not yet in Postgres."""
        self.observed: list[Observation] = []
        self.before: list[Target] = []
        """What served before, newest first, as Postgres knew it at the last announcement."""
        self.turn = asyncio.Lock()
        """Counts go to Postgres one after the other."""

    @property
    def loaded(self) -> dict[str, str]:
        """Version -> digest."""
        return {version: self.origins[version].digest for version in self.served}

    @property
    def generation(self) -> int:
        return self.deployment.generation if self.deployment else 0

    async def put(self, served: Served, origin: Origin) -> None:
        """Served from now on by number; of the model's own requests it gets what `direct` says."""
        version = served.version
        replaced = self.served.get(version)
        self.served[version] = served
        self.origins[version] = origin
        self.publish()
        self.crashes.pop(version, None)
        if replaced is not None:
            await self.close(replaced)

    def direct(self, route: Mapping[str, int]) -> None:
        """From the next request on."""
        self.route = {version: route[version] for version in sorted(route, key=router.age)}
        self.publish()

    def follow(self, deployment: DeploymentUpdated, plan: domain.Plan) -> None:
        """From the next request on. A generation that is not complete leaves the old one's."""
        if plan.complete or self.deployment is None:
            self.tally()
            self.deployment = deployment
            self.observed = []
            for served in self.served.values():
                served.configure(batching_of(deployment), deployment.request_log_percent)
        self.direct(plan.route)

    def publish(self) -> None:
        batchers: dict[str, Batcher] = {v: one.batcher for v, one in self.served.items()}
        shares = self.route
        if self.shared:
            shares, batchers = {}, {}
        self.front.route(self.name, shares, batchers)

    def share(self, shared: bool) -> None:
        """From the next request on."""
        if shared != self.shared:
            self.shared = shared
            self.publish()

    async def unload(self, version: str) -> None:
        """Whoever else unloads it at the same moment waits for nothing."""
        unloaded = self.served.pop(version, None)
        if unloaded is None:
            return
        self.origins.pop(version)
        self.crashes.pop(version, None)
        self.route.pop(version, None)
        self.publish()
        await self.close(unloaded)

    async def close(self, served: Served) -> None:
        """Who is answered until the end is counted."""
        self.count(served)
        await served.close()
        self.count(served)
        self.seen.pop(served)

    def pick(self, version: str) -> Served:
        """Raises `Refused`."""
        if version:
            return self.version(version)
        if not any(self.route.values()):
            raise Unavailable(self.nothing())
        self.position += 1
        return self.served[router.choose(self.route, self.position)]

    def nothing(self) -> str:
        why = "; ".join(f"version {v} is {reason}" for v, reason in self.quarantined.items())
        none = f"Request for unknown model: '{self.name}' {NO_VERSIONS}"
        return f"{none}: {why}" if why else none

    def version(self, version: str) -> Served:
        if version in self.served:
            return self.served[version]
        if not (version.isascii() and version.isdigit()):
            raise Invalid(
                f"failed to get model version from specified version string '{version}' "
                f"for model '{self.name}': it is not an unsigned integer",
                "model_version",
            )
        if version in self.quarantined:
            raise Unavailable(
                f"model '{self.name}' version {version} is {self.quarantined[version]}"
            )
        raise NotFound(f"Request for unknown model: '{self.name}' version {version} is not found")

    def tally(self) -> None:
        """What was answered since the last time is the current generation's."""
        for served in self.served.values():
            self.count(served)

    def count(self, served: Served) -> None:
        errors = served.faults()
        requests = served.counts().success_count + errors
        known = self.seen.get(served, (0, 0))
        if (requests, errors) != known and self.deployment is not None:
            place = (self.generation, int(served.version))
            sums = self.counts.setdefault(place, [0, 0])
            sums[0] += requests - known[0]
            sums[1] += errors - known[1]
        self.seen[served] = (requests, errors)

    def settle(self, counts: dict[tuple[int, int], list[int]]) -> None:
        """These are in Postgres now."""
        for place, (requests, errors) in counts.items():
            self.counts[place][0] -= requests
            self.counts[place][1] -= errors
            if not any(self.counts[place]):
                del self.counts[place]


def in_order(endpoint: Endpoint) -> list[Served]:
    """Oldest version first."""
    return [endpoint.served[v] for v in sorted(endpoint.served, key=router.age)]


def context_of(traceparent: str) -> SpanContext | None:
    place = telemetry.span_context_of(traceparent)
    return place if place.is_valid else None


def batching_of(deployment: DeploymentUpdated) -> Batching:
    return msgspec.convert(deployment.batching, Batching, strict=False)
