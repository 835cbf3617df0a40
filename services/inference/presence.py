"""Where a model is served when not here alone: by other replicas, or by none until asked for.

A request for a model that sleeps waits here, and the heartbeat says so at once; the scheduler
places a replica, here or elsewhere, and the request goes on.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, monotonic_ns

import msgspec

from libs.bus import Bus
from libs.contracts.events import DeploymentUpdated
from libs.doors import DeadlineExceeded, Exhausted, NotFound, Refused, Unavailable
from services.inference.calls import Answer, Call
from services.inference.endpoint import batching_of
from services.inference.endpoints import Endpoints, Key
from services.inference.forward import Forwarder, Unreached, Untaken
from services.inference.loads import Load
from services.inference.peers import Peers, Told

log = logging.getLogger(__name__)
REPLICAS = "replicas.>"
WAITING = ".waiting"
"""Behind `replicas.<node>`: what a process of the node says that does not speak for it."""
CALL_S = 1.0
"""Between two calls for a replica: what is broadcast may be lost."""
OVERHEARD_S = 2.0
"""What another process of the node said counts so long: it says it every half second."""
NS = 1e9
WAKE_S = 60.0
"""A request without a deadline waits no longer for a replica."""
TRIES_MAX = 3
"""Replicas that are asked, one after the other, when one has just gone."""
SHARED_MS = 20
"""What takes longer is worth the way through Python to another replica. It adds 0.4 ms to a request
on its own, and that much work for a core."""
MILLI = 1000
Deployments = Mapping[Key, tuple[DeploymentUpdated, str]]


class Presence:
    def __init__(
        self,
        endpoints: Endpoints,
        forwarder: Forwarder,
        deployments: Callable[[], Deployments],
        call_out: Callable[[], None],
        called_out: Callable[[], None],
    ) -> None:
        self.endpoints = endpoints
        self.forwarder = forwarder
        self.deployments = deployments
        self.call_out = call_out
        """Says at once what the next heartbeat would."""
        self.called_out = called_out
        """Another process of this node has: only who speaks for the node says anything then, or two
        that do not would answer each other for ever."""
        self.peers = Peers()
        self.waiting: Counter[Key] = Counter()
        self.called: dict[Key, float] = {}
        """When a replica was called for last, while requests wait for one."""
        self.overheard: dict[str, tuple[float, list[Load]]] = {}
        """Of another process of this node, by its incarnation: when it said what it has to do."""
        self.changed = asyncio.Event()

    def notify(self) -> None:
        """Something is served now that was not."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def listen(self, bus: Bus, node: str, incarnation: str) -> None:
        """As a process of the node."""
        async for subject, payload in bus.listen(REPLICAS):
            try:
                told = msgspec.json.decode(payload, type=Told)
            except msgspec.DecodeError as error:
                log.warning("%s: %s", subject, error)
                continue
            if told.node != node and not subject.endswith(WAITING):
                self.peers.heard(told, monotonic())
                self.forwarder.keep(self.peers.addresses())
                self.notify()
            elif subject == f"replicas.{node}{WAITING}" and told.incarnation != incarnation:
                self.overhear(told, monotonic())

    def overhear(self, told: Told, now_s: float) -> None:
        self.overheard[told.incarnation] = now_s, told.loads
        if not all(load.ready for load in told.loads):
            self.called_out()

    def of_others(self, now_s: float) -> list[list[Load]]:
        """What the other processes of this node have to do."""
        since_s = now_s - OVERHEARD_S
        self.overheard = {name: one for name, one in self.overheard.items() if one[0] >= since_s}
        return [loads for _, loads in self.overheard.values()]

    # --- what `Endpoints` asks

    def serves(self, key: Key) -> bool:
        return self.peers.least(key, monotonic()) is not None

    def asleep(self) -> list[Key]:
        deployments = self.deployments().items()
        sleepers = [key for key, (deployment, _) in deployments if may_sleep(deployment)]
        return [key for key in sleepers if not self.is_found(key)]

    def is_here(self, key: Key) -> bool:
        return self.endpoints.is_routed(key)

    def is_found(self, key: Key) -> bool:
        """One that crashed too often is, and says so: no replica would come for it."""
        endpoint = self.endpoints.by_key.get(key)
        crashed = endpoint is not None and bool(endpoint.quarantined)
        return self.is_here(key) or self.serves(key) or crashed

    async def bring(self, key: Key, deadline_ns: int) -> None:
        if self.is_found(key):
            return
        deployment, _ = self.deployments().get(key, (None, ""))
        if deployment is None:
            return
        if not may_sleep(deployment):
            if key not in self.endpoints.by_key:
                raise Unavailable(f"no replica of model '{key[1]}' answers at the moment")
            return
        most = batching_of(deployment).max_queue_size
        if self.waiting[key] >= most:
            raise Exhausted(f"{most} requests wait already for a replica of '{key[1]}'")
        self.waiting[key] += 1
        try:
            await self.until_served(key, deadline_ns)
        finally:
            self.waiting[key] -= 1
            if not self.waiting[key]:
                del self.waiting[key]
                self.called.pop(key, None)

    async def until_served(self, key: Key, deadline_ns: int) -> None:
        left_s = (deadline_ns - monotonic_ns()) / NS if deadline_ns else WAKE_S
        try:
            async with asyncio.timeout(min(left_s, WAKE_S)):
                while not self.is_found(key):
                    self.call(key, monotonic())
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(CALL_S):
                            await self.changed.wait()
        except TimeoutError as error:
            said = f"no replica of model '{key[1]}' was ready within {min(left_s, WAKE_S):.1f} s"
            kind = DeadlineExceeded if left_s < WAKE_S else Unavailable
            raise kind(f"{said}; one is asked for as long as somebody waits") from error

    def call(self, key: Key, now_s: float) -> None:
        """For a replica; however many wait for it, and whatever else wakes them: where two nodes
        wait, each would hear the other's calls and call again."""
        if now_s - self.called.get(key, -CALL_S) >= CALL_S:
            self.called[key] = now_s
            self.call_out()

    async def infer(self, key: Key, call: Call) -> Answer | None:
        if call.forwarded:
            return None
        for _ in range(TRIES_MAX):
            await self.bring(key, call.deadline_ns)
            node = self.better(key, call)
            if node is None:
                return None
            try:
                return await self.send(node, key, call)
            except Exhausted:
                if not self.is_here(key):
                    raise
            except NotFound as error:
                if not call.version:
                    self.passed_over(node, key, error)
                elif not self.is_here(key):
                    raise
            except Untaken as error:
                self.passed_over(node, key, error)
            if self.is_here(key):
                return None
        raise Unavailable(f"{TRIES_MAX} replicas of model '{key[1]}' did not answer")

    def passed_over(self, node: str, key: Key, error: Refused) -> None:
        """Until it speaks again."""
        log.warning("%s does not answer for '%s': %s", node, key[1], error)
        if isinstance(error, Unreached):
            self.peers.lost(node)
        else:
            self.peers.left(node, key)

    def better(self, key: Key, call: Call) -> str | None:
        """Who answers it instead of this replica.

        The way there costs more than most models do: only what waits here behind a whole batch,
        and there behind half as much, goes there. A sequence stays where it began.
        """
        now_s = monotonic()
        if self.is_here(key):
            least = None if "sequence_id" in call.parameters else self.peers.least(key, now_s)
            if least is None:
                return None
            mine, batch = self.work(key)
            return least[0] if mine > batch and mine > 2 * least[1] else None
        if sequence := call.parameters.get("sequence_id"):
            return self.peers.home(key, str(sequence), now_s)
        found = self.peers.least(key, now_s)
        return found[0] if found else None

    def work(self, key: Key) -> tuple[int, int]:
        """(waiting here, a whole batch), in thousandths of a request."""
        served = self.endpoints.by_key[key].served.values()
        waiting = sum(one.batcher.counts().waiting for one in served)
        return waiting * MILLI, max((one.rows_max for one in served), default=0) * MILLI

    def share(self, loads: Iterable[Load]) -> None:
        """What is slow here while others have time is looked at request by request from now on,
        which the front alone cannot; until there is no more to do here than a batch."""
        now_s = monotonic()
        for load in loads:
            key = load.project, load.model
            endpoint = self.endpoints.by_key.get(key)
            if endpoint is None:
                continue
            least = self.peers.least(key, now_s)
            mine, (_, batch) = load.concurrency_milli, self.work(key)
            if least is None or mine <= batch:
                endpoint.share(False)
            elif load.p95_ms >= SHARED_MS and mine > 2 * least[1] + batch:
                endpoint.share(True)

    async def send(self, node: str, key: Key, call: Call) -> Answer:
        self.peers.sent[node, key] += 1
        try:
            name = self.peers.name_at(node, key)
            return await self.forwarder.infer(self.peers.address(node), name, call)
        finally:
            self.peers.sent[node, key] -= 1


def may_sleep(deployment: DeploymentUpdated) -> bool:
    return bool(deployment.autoscaling) and not deployment.autoscaling.get("min_replicas", 1)
