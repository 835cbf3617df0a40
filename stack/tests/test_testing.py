"""What the fixtures promise."""

import pytest

from libs import database
from libs.bus import RECORDS
from libs.bus.jetstream import JetStreamBus
from libs.objectstore import ObjectStore
from stack.testing import eventually


@pytest.mark.parametrize("_", [1, 2])
async def test_each_test_has_empty_streams(bus: JetStreamBus, _: int) -> None:
    assert await bus.publish("records.default.digits", b"{}", id="same") == 1
    subscription = await bus.subscribe(RECORDS, "durable", ["records.>"])
    assert [one.payload for one in await subscription.fetch(10, 1)] == [b"{}"]


@pytest.mark.parametrize("_", [1, 2])
async def test_each_test_has_its_own_database(postgres_dsn: str, _: int) -> None:
    tables = ("create table kept (id int)",)
    async with database.connect(postgres_dsn, "probe", tables) as db, db.transaction() as tx:
        assert await tx.all("select * from kept") == []
        await tx.execute("insert into kept values (1)")


@pytest.mark.parametrize("_", [1, 2])
async def test_each_test_has_its_own_bucket(objects: ObjectStore, _: int) -> None:
    assert await objects.list("") == []
    await objects.put("kept", b"1")
    assert await objects.get("kept") == b"1"


async def test_eventually_tells_the_last_failure() -> None:
    seen: list[int] = []

    def check() -> bool:
        seen.append(1)
        assert len(seen) > 1, "too early"
        return len(seen) > 2

    assert await eventually(check)
    with pytest.raises(AssertionError, match="still 0"):
        await eventually(lambda: 0, timeout_s=0.05)


async def test_what_an_async_check_asserts_is_waited_for_too() -> None:
    looks: list[int] = []

    async def third() -> int:
        looks.append(1)
        assert len(looks) == 3
        return 7

    assert await eventually(third) == 7
