"""One heartbeat that cannot be handled keeps nobody else's away, nor one that comes too late."""

from collections.abc import AsyncIterator

import pytest

from libs.bus.memory import MemoryBus
from libs.contracts.events import Resources
from libs.database import Database
from services.scheduler import lease
from services.scheduler.executor import BusExecutor
from services.scheduler.handlers import Context
from services.scheduler.leader import Pulse
from services.scheduler.nodes import SILENT_S, Liveness
from services.scheduler.stimuli import Heartbeat, Tick
from services.scheduler.store import Store
from services.scheduler.tests.writing import led
from services.scheduler.writer import Writer


@pytest.fixture
async def pulse(db: Database) -> AsyncIterator[Pulse]:
    liveness = Liveness([], 0.0)
    writer = Writer(Store(db), BusExecutor())
    async with led(writer):
        yield Pulse(Context(writer, liveness), MemoryBus(), liveness)


def heartbeat(node: str, health: str = "Healthy") -> Heartbeat:
    return Heartbeat(node, 1, ["train"], Resources(1000, 1000), health=health)


async def states(pulse: Pulse) -> dict[str, str]:
    return await pulse.writer.read(lambda now: {n.node: n.state for n in now.nodes.values()})


async def test_a_defect_is_of_one_heartbeat(pulse: Pulse) -> None:
    said = heartbeat("a"), heartbeat("b", "no health that there is"), heartbeat("c")
    assert not await pulse.take(*said)
    assert await states(pulse) == {"a": "Healthy", "c": "Healthy"}
    assert await pulse.take(heartbeat("b"))
    assert sorted(await states(pulse)) == ["a", "b", "c"]


async def test_a_heartbeat_from_before_the_loss_brings_nobody_back(pulse: Pulse) -> None:
    assert await pulse.take(heartbeat("a"))
    pulse.liveness.heard("a", -2 * SILENT_S)
    assert await pulse.take(Tick(["a"]))
    assert await pulse.take(heartbeat("a"))
    assert await states(pulse) == {"a": "Unhealthy"}


async def test_only_who_holds_the_lock_is_unseated(db: Database) -> None:
    async with db.exclusively("another lock") as other, db.transaction() as tx:
        pid = other.info.backend_pid
        await tx.execute("insert into lease values (true, %s, 'epoch')", (pid,))
        assert await tx.all(lease.UNSEAT, (1.0, lease.LEADER)) == []
        await other.execute("select pg_advisory_lock(hashtext(%s))", (lease.LEADER,))
        unseated = await tx.all(lease.UNSEAT, (1.0, lease.LEADER))
        assert unseated == [{"pid": pid, "ended": True}]
