"""The serve agent: takes what the scheduler placed on this node towards what the registry desires.

What it was told is in Postgres, so that after a restart it serves again without asking anybody.
"""

import asyncio
import contextlib
import itertools
import logging
from time import monotonic, monotonic_ns

from libs import telemetry
from libs.bus import Bus
from libs.bus.loop import backoff_s
from libs.contracts.events import (
    DeploymentObserved,
    DeploymentReady,
    DeploymentUpdated,
    Target,
)
from libs.database import TRANSIENT, Database
from libs.objectstore import Corrupt, Missing, ObjectStore, Unavailable
from services.inference import domain, models, store
from services.inference.cache import Cache
from services.inference.endpoint import Endpoint, Origin, batching_of, context_of
from services.inference.endpoints import Endpoints, Key
from services.inference.forward import Forwarder
from services.inference.loads import Load, Loads, together
from services.inference.models import Build, in_process
from services.inference.node import Node
from services.inference.presence import WAITING, Presence
from services.inference.registry import Registry

log = logging.getLogger(__name__)
BEAT_S = 0.5
"""A node that misses five in a row is lost."""
SPOKEN_S = 0.02
"""Between two heartbeats at least, whoever calls for one."""
OBSERVE_S = 1.0
RETRY_S = 2.0
REFRESH_S = 1.0
LINGER_S = 10.0
"""A node that was silent for a moment loses its work and is given it again; between the two its
callers are served as before."""
FORGET_EVERY = 3600
"""Observations between two sweeps of the request log."""


class Agent:
    def __init__(
        self,
        db: Database,
        bus: Bus,
        objects: ObjectStore,
        registry: Registry,
        endpoints: Endpoints,
        node: Node,
        forwarder: Forwarder,
        cache: Cache | None = None,
        build: Build = in_process,
    ) -> None:
        self.db = db
        self.bus = bus
        self.objects = objects
        self.registry = registry
        self.endpoints = endpoints
        self.node = node
        self.cache = cache
        self.build = build
        self.assignments: list[store.Assignment] = []
        self.desired: dict[Key, tuple[DeploymentUpdated, str]] = {}
        self.loads = Loads(endpoints, monotonic_ns())
        self.called_out = asyncio.Event()
        self.speaks = False
        self.presence = Presence(
            endpoints, forwarder, lambda: self.desired, self.called_out.set, self.hear_out
        )
        endpoints.elsewhere = self.presence
        self.owed: set[Key] | None = None
        """Models this node served before it was started; unknown until Postgres said it."""
        self.unwanted: dict[Key, float] = {}
        """Served, but placed here no more; since when, on the monotonic clock."""
        self.counting: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        self.lacking = asyncio.Event()
        self.lacking.set()

    @property
    def wanted(self) -> set[Key]:
        return {(one.project, one.model) for one in self.assignments}

    async def ready(self) -> bool:
        """Whether everything this node served before its start is served again."""
        return self.owed is not None and all(
            self.endpoints.is_routed(key) for key in self.owed & self.wanted
        )

    def wake(self, lacking: bool = False) -> None:
        """Something was written to Postgres; `lacking`: the registry may know more."""
        self.changed.set()
        if lacking:
            self.lacking.set()

    async def beat(self) -> None:
        """One process speaks for a node: its successor takes over once it has ended."""
        while True:
            try:
                async with self.db.exclusively(f"node {self.node.speaker}"):
                    await self.refresh()
                    self.speaks = True
                    await self.speak()
            except TRANSIENT as error:
                log.warning("heartbeats: %s; again in %s s", error, BEAT_S)
            self.speaks = False
            await asyncio.sleep(BEAT_S)

    async def speak(self) -> None:
        """Knows what it runs: an empty list would give its work away."""
        while True:
            self.called_out.clear()
            own = self.look()
            loads = together([own, *self.presence.of_others(monotonic())])
            await self.bus.broadcast(
                f"heartbeats.{self.node.speaker}", self.node.heartbeat(self.assignments, loads)
            )
            await self.bus.broadcast(
                f"replicas.{self.node.name}", self.node.told(self.endpoints.project, own)
            )
            await self.next_time()

    async def tell(self) -> None:
        """What there is to do here, to whoever speaks for the node: without it, what only this
        process is busy with would look idle."""
        while True:
            if self.speaks:
                await asyncio.sleep(BEAT_S)
                continue
            self.called_out.clear()
            with contextlib.suppress(*TRANSIENT):  # it is said again
                await self.bus.broadcast(
                    f"replicas.{self.node.name}{WAITING}",
                    self.node.told(self.endpoints.project, self.look()),
                )
            await self.next_time()

    async def tell_others(self, suffix: str, loads: list[Load]) -> None:
        told = self.node.told(self.endpoints.project, loads)
        await self.bus.broadcast(f"replicas.{self.node.name}{suffix}", told)

    async def next_time(self) -> None:
        """At once when it is called for, else after `BEAT_S`."""
        await asyncio.sleep(SPOKEN_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self.called_out.wait()

    def look(self) -> list[Load]:
        loads = self.loads.look(self.presence.waiting, monotonic_ns())
        self.presence.share(loads)
        return loads

    def hear_out(self) -> None:
        if self.speaks:
            self.called_out.set()

    async def run(self) -> None:
        """Reconciles when woken and every `REFRESH_S`; later while something is missing."""
        tries = 0
        while True:
            self.changed.clear()
            tries += 1
            try:
                if await self.reconcile():
                    tries = 0
            except TRANSIENT as error:
                log.warning("deployments: %s; again in %s s", error, backoff_s(tries))
                await self.step_back()
            with contextlib.suppress(TimeoutError):
                again_s = backoff_s(tries) if tries else REFRESH_S
                async with asyncio.timeout(again_s):
                    await self.changed.wait()

    async def refresh(self) -> None:
        async with self.db.transaction() as tx:
            self.assignments = await store.assignments(tx, self.node.name)
            known = await store.desired(tx)
        self.desired = {(one.project, one.model): (one, place) for one, place in known}
        if self.owed is None:
            self.owed = self.wanted

    async def reconcile(self) -> bool:
        """True when every desired generation is the one that is routed."""
        await self.refresh()
        await self.remove_unwanted(monotonic())
        complete = [await self.converge(key) for key in sorted(self.wanted)]
        return all(complete)

    async def step_back(self) -> None:
        """Without Postgres: who has no version left gets the one that served before, as far as
        this process remembers."""
        for endpoint in list(self.endpoints.by_key.values()):
            deployment = endpoint.deployment
            if deployment is None or not endpoint.quarantined or any(endpoint.route.values()):
                continue
            targets = domain.replaced(deployment.targets, endpoint.quarantined, endpoint.before)
            for target in domain.plan(targets, endpoint.loaded, {}).load:
                await self.load(endpoint, deployment, target)
            endpoint.direct(domain.plan(targets, endpoint.loaded, {}).route)

    async def remove_unwanted(self, now_s: float) -> None:
        """What is placed here no more, `LINGER_S` after that was first seen."""
        unwanted = set(self.endpoints.by_key) - self.wanted
        self.unwanted = {key: self.unwanted.get(key, now_s) for key in unwanted}
        for key, since_s in self.unwanted.items():
            if now_s - since_s >= LINGER_S:
                endpoint = self.endpoints.by_key[key]
                await self.observe_endpoint(endpoint)  # while it is there Postgres may be away
                await self.endpoints.remove(key)
                await self.observe_endpoint(endpoint)

    async def converge(self, key: Key) -> bool:
        endpoint = self.endpoints.at(key)
        if key not in self.desired:
            self.lacking.set()
            return False
        deployment, place = self.desired[key]
        if endpoint.routed == deployment.generation and not endpoint.stale:
            return True
        with telemetry.span(
            "deployment load",
            parent=place,
            links=[target.traceparent for target in deployment.targets],
            attributes={
                "leptonic.model": deployment.model,
                "leptonic.generation": deployment.generation,
            },
        ) as span:
            complete = await self.roll_out(endpoint, deployment)
            if not complete:
                telemetry.mark_failed(span, "a version could not be loaded; again later")
        return complete

    async def roll_out(self, endpoint: Endpoint, deployment: DeploymentUpdated) -> bool:
        """Loads first, routes then, unloads last: no request is refused on the way."""
        endpoint.routed, endpoint.stale = 0, False  # a version may be quarantined at any await
        targets = await self.targets(endpoint, deployment)
        todo = domain.plan(targets, endpoint.loaded, endpoint.route)
        for target in todo.load:
            await self.load(endpoint, deployment, target)
        if endpoint.stale:
            return False
        todo = domain.plan(targets, endpoint.loaded, endpoint.route)
        endpoint.follow(deployment, todo)
        self.presence.notify()
        endpoint.rolled_out = context_of(telemetry.current())
        for version in todo.unload:
            await endpoint.unload(version)
        if todo.complete and not endpoint.stale:
            if targets == deployment.targets and endpoint.announced != deployment.generation:
                await self.announce(endpoint, deployment)
            endpoint.routed = deployment.generation
        return todo.complete

    async def targets(self, endpoint: Endpoint, deployment: DeploymentUpdated) -> list[Target]:
        """The desired ones, or what served before in the place of those that are quarantined."""
        async with self.db.transaction() as tx:
            known = await store.quarantined(tx, deployment)
            if endpoint.generation == deployment.generation:
                known |= endpoint.quarantined  # of this moment, not yet in Postgres
            endpoint.quarantined = known
            if not endpoint.quarantined:
                return deployment.targets
            before = await store.served_before(tx, deployment.project, deployment.model)
        return domain.replaced(deployment.targets, endpoint.quarantined, before)

    async def quarantine(self, endpoint: Endpoint, version: str) -> None:
        """The version crashed too often: another one is loaded, and that is remembered."""
        deployment, reason = endpoint.deployment, endpoint.quarantined.get(version)
        if deployment is None or reason is None:
            return  # the version was deployed anew in the same moment
        endpoint.stale = True
        self.wake()
        for tries in itertools.count(1):
            try:
                async with self.db.transaction() as tx:
                    await store.quarantine(tx, deployment, int(version), reason)
            except TRANSIENT as error:
                log.warning("quarantine: %s; again in %s s", error, backoff_s(tries))
                await asyncio.sleep(backoff_s(tries))
            else:
                return

    async def load(self, endpoint: Endpoint, deployment: DeploymentUpdated, target: Target) -> None:
        """A version that cannot be loaded is logged and left for later; it is never served."""
        name = f"{deployment.model} version {target.number}"
        try:
            model = await models.load(self.objects, target.digest, self.cache, self.build)
        except Unavailable as error:
            log.warning("%s: failed to load: %s", name, error)
        except (Corrupt, Missing, models.Unloadable) as error:
            log.error("%s: failed to load: %s", name, error)
        else:
            origin = Origin(target.digest, target.traceparent)
            limits, log_percent = batching_of(deployment), deployment.request_log_percent
            version = str(target.number)
            await self.endpoints.add(endpoint, version, model, limits, origin, log_percent)

    async def announce(self, endpoint: Endpoint, deployment: DeploymentUpdated) -> None:
        async with self.db.transaction() as tx:
            await store.remember(tx, deployment)
            before = await store.served_before(tx, deployment.project, deployment.model)
            await tx.emit(
                DeploymentReady(
                    project=deployment.project,
                    model=deployment.model,
                    generation=deployment.generation,
                    replica=self.node.name,
                )
            )
        endpoint.announced, endpoint.before = deployment.generation, before
        log.info("%s serves generation %s", deployment.model, deployment.generation)

    async def catch_up(self) -> None:
        """Asks the registry whenever something may be missing, for as long as it takes."""
        while True:
            await self.lacking.wait()
            self.lacking.clear()
            try:
                await self.catch_up_once()
            except TRANSIENT as error:
                log.warning("%s; again in %s s", error, RETRY_S)
                self.lacking.set()
                await asyncio.sleep(RETRY_S)

    async def catch_up_once(self) -> None:
        for project in {self.endpoints.project, *(a.project for a in self.assignments)}:
            deployments = await self.registry.deployments(project)
            async with self.db.transaction() as tx:
                for deployment in deployments:
                    await store.desire(tx, deployment, "")
        self.wake()

    async def observe(self) -> None:
        for tick in itertools.count():
            await asyncio.sleep(OBSERVE_S)
            try:
                await self.observe_once()
                if tick % FORGET_EVERY == 0:
                    async with self.db.transaction() as tx:
                        await store.forget_old(tx)
            except TRANSIENT as error:
                log.warning("counts: %s; again in %s s", error, OBSERVE_S)

    async def observe_once(self) -> None:
        """Counts go to Postgres and, when they changed, out as an event; both or neither."""
        for endpoint in list(self.endpoints.by_key.values()):
            await self.observe_endpoint(endpoint)

    async def observe_endpoint(self, endpoint: Endpoint) -> None:
        """To its end, also when it is cancelled: what is committed and not settled would be
        counted twice."""
        task = asyncio.create_task(self.count(endpoint))
        self.counting.add(task)
        task.add_done_callback(self.counting.discard)
        await asyncio.shield(task)

    async def count(self, endpoint: Endpoint) -> None:
        async with endpoint.turn:
            if endpoint.deployment is not None:
                await self.count_for(endpoint, endpoint.deployment)

    async def count_for(self, endpoint: Endpoint, deployment: DeploymentUpdated) -> None:
        project, model, replica = endpoint.project, endpoint.model, self.node.name
        endpoint.tally()
        counts = {place: list(pair) for place, pair in endpoint.counts.items()}
        async with self.db.transaction() as tx:
            for (generation, number), (requests, errors) in counts.items():
                place = (project, model, generation, number, replica)
                await store.add_counts(tx, place, requests, errors)
            found = await store.tallies(tx, deployment, replica)
            observed = domain.observations(deployment, found, endpoint.quarantined)
            if (found or endpoint.quarantined) and observed != endpoint.observed:
                await tx.emit(
                    DeploymentObserved(
                        project=project,
                        model=model,
                        generation=deployment.generation,
                        replica=replica,
                        observations=observed,
                    ),
                    traceparent="",
                )
        endpoint.settle(counts)
        if deployment is endpoint.deployment:
            endpoint.observed = observed
