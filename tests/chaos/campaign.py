"""One stack under load, one fault after the other, an audit after each."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable
from time import monotonic, time
from typing import Any

from libs.bus import DEAD_LETTERS, EVENTS, ID_HEADER, RECORDS
from libs.bus.jetstream import JetStreamBus, connect
from stack.testing import eventually
from tests.chaos import load, schedule
from tests.chaos.controls import Controls, Ground
from tests.chaos.invariants import Audit, Found, Kill, parent_of
from tests.chaos.load import Predictor, Publisher, predicting
from tests.chaos.report import Row
from tests.chaos.schedule import Fault
from tests.running import Stack, digits_pipeline

DATASET, PROBE = "chaos", "probe"
VERSION_EVERY = 2000
"""Records: so models are trained, gated and rolled out all the time."""
OVER_S = 4.0
"""What is published around a fault that takes no time is spread over so long."""
RECOVERY_S = 120.0
ORPHANS_S = 60.0
EVENTS_AGAIN = 300
BATCHES_AGAIN = 60
"""Of the newest, and as many of the oldest: past the stream's window of deduplication."""


class Campaign:
    def __init__(
        self,
        stack: Stack,
        controls: Controls,
        bus: JetStreamBus,
        predictor: Predictor,
        audit: Audit,
    ) -> None:
        self.stack = stack
        self.controls = controls
        self.bus = bus
        self.predictor = predictor
        self.audit = audit
        self.records = Publisher(bus, DATASET)
        self.probes = Publisher(bus, PROBE)
        self.kills: list[Kill] = []
        self.began_s = time()
        self.letters = 0
        """The last dead letter that was told."""

    async def play(self, fault: Fault, records: int) -> Row:
        """The fault, the way back, and what there is then."""
        row = Row(fault=fault.label, kind=self.controls.kind)
        failed, answered = self.predictor.failures.total(), len(self.predictor.answers)
        acked = len(self.records.books)
        publishing = asyncio.create_task(self.records.run(records, fault.seconds or OVER_S))
        await self.inflict(fault)
        ended_s = monotonic()
        row.lands_s, row.predicts_s, row.back_s, row.caught_up_s = await asyncio.gather(
            self.until(self.lands(), ended_s),
            self.until(self.predictor.success_after(ended_s), ended_s),
            self.until(self.all_back(fault), ended_s),
            self.catch_up(publishing),
        )
        row.acked = sum(len(one.keys) for one in self.records.books[acked:])
        await self.look(row)
        row.failed = self.predictor.failures.total() - failed
        row.answered = len(self.predictor.answers) - answered
        return row

    async def until(self, what: Awaitable[Any], since_s: float) -> float:
        """Seconds it took; `RECOVERY_S` at most, and then the audit tells what is missing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECOVERY_S):
                await what
        return monotonic() - since_s

    async def catch_up(self, publishing: asyncio.Task[None]) -> float:
        """Seconds from the last ack until everything had landed."""
        await publishing
        return await self.until(self.all_landed(), monotonic())

    async def inflict(self, fault: Fault) -> None:
        """Returns when nothing is broken on purpose any more."""
        match fault.kind:
            case schedule.KILL:
                now_s = time()
                self.kills += [Kill(victim, now_s) for victim in fault.victims]
                await asyncio.gather(*map(self.controls.kill, fault.victims))
            case schedule.RESTART:
                await asyncio.gather(*map(self.controls.restart, fault.victims))
            case schedule.PAUSE:
                (victim,) = fault.victims
                await self.controls.pause(victim)
                await load.pause(fault.seconds)
                await self.controls.resume(victim)
            case schedule.DISCONNECT:
                (victim,) = fault.victims
                await self.controls.disconnect(victim)
                await load.pause(fault.seconds)
                await self.controls.connect(victim)
            case schedule.FILL:
                await self.controls.fill()
                await load.pause(fault.seconds)
                await self.controls.unfill()
            case schedule.DUPLICATES:
                await self.publish_again()
            case schedule.REORDER:
                await self.reorder(random.Random(fault.seed))
            case schedule.STORM:
                for part in fault.parts:
                    await self.inflict(part)
            case unknown:
                raise ValueError(unknown)

    async def all_back(self, fault: Fault) -> None:
        victims = {victim for one in (fault, *fault.parts) for victim in one.victims}
        await asyncio.gather(*map(self.controls.back, victims))

    async def lands(self) -> None:
        """A record that is published now has landed."""
        await self.probes.batch(1)
        wanted = len(self.probes.books)

        async def landed() -> bool:
            path = f"/v1/projects/default/datasets/{PROBE}"
            found = await self.stack.try_get("ingest", path)
            return int(found.get("rows", 0)) >= wanted

        await eventually(landed, RECOVERY_S)

    async def all_landed(self) -> None:
        wanted = sum(len(one.keys) for one in self.records.books)

        async def landed() -> bool:
            return await self.audit.rows() >= wanted

        await eventually(landed, RECOVERY_S)

    async def look(self, row: Row) -> None:
        found = Found()
        await self.audit.records(self.records.books, found)
        await self.audit.versions(found)
        self.audit.answers(self.predictor.answers, found)
        await self.dead_letters(found)
        await self.orphans(found)
        for name in ("lost", "doubled", "wrong", "torn", "orphans", "problems"):
            setattr(row, name, getattr(found, name))

    async def dead_letters(self, found: Found) -> None:
        """Nothing that was sent here is bad: what was given up, was given up for the fault."""
        for letter in await self.bus.read(DEAD_LETTERS, "dlq.>", self.letters, BATCHES_AGAIN):
            self.letters = letter.sequence
            found.problems.append(f"{letter.subject}: {letter.headers['Leptonic-Reason']}")

    async def orphans(self, found: Found) -> None:
        """A parent that is still open comes later; one that does not come is lost."""
        left: list[dict[str, Any]] = []

        async def none() -> bool:
            nonlocal left
            left = await self.audit.spans(self.began_s, self.kills)
            return not left

        try:
            await eventually(none, ORPHANS_S)
        except AssertionError:
            self.audit.gone |= {parent_of(one) for one in left}
            found.orphans = len(left)
            names = sorted({f"{one['service']} {one['name']}" for one in left})
            found.problems.append(f"without their parents: {', '.join(names)}")

    async def whole(self) -> str:
        """One version of everything, built by hand: every acked record is in it, once."""
        path = self.audit.dataset + "/versions"
        acked = sum(len(one.keys) for one in self.records.books)

        async def built() -> Any:
            """What has just landed is told to who builds by an event, a moment later."""
            response = await self.stack.http.post(self.stack.endpoint("preprocess") + path, json={})
            response.raise_for_status()
            version = response.json()
            assert int(version["rows"]) == acked, f"{version['rows']} rows of {acked} acked"
            return version

        version = await eventually(built, RECOVERY_S)
        await self.audit.read_parts()
        await self.audit.dataset_version(version)
        return (
            f"{acked} records acked, {version['rows']} in the last of {version['number']} dataset "
            f"versions; {len(self.audit.expected)} model versions whole"
        )

    async def publish_again(self) -> None:
        """The newest and the oldest batches with their ids, and the newest events with theirs."""
        books = self.records.books
        await load.again(self.bus, self.records, [*books[:BATCHES_AGAIN], *books[-BATCHES_AGAIN:]])
        await self.deliver_again(
            await self.bus.read(EVENTS, "events.>", -EVENTS_AGAIN, EVENTS_AGAIN)
        )

    async def reorder(self, chance: random.Random) -> None:
        """Events and records come once more in any order, from several sides at once."""
        events = await self.bus.read(EVENTS, "events.>", -EVENTS_AGAIN, EVENTS_AGAIN)
        records = await self.bus.read(RECORDS, "records.>", -BATCHES_AGAIN, BATCHES_AGAIN)
        mixed = [*events, *records]
        chance.shuffle(mixed)
        await asyncio.gather(*(self.deliver_again(mixed[side::4]) for side in range(4)))

    async def deliver_again(self, deliveries: Any) -> None:
        """Past the stream's deduplication, as if their acks had been lost.

        An event has its id inside and gets another on the wire. A record's id is the one on the
        wire: the stream takes it again once it has forgotten it, and then ingest must know it.
        """
        for delivery in deliveries:
            is_record = delivery.subject.startswith("records.")
            known = delivery.headers[ID_HEADER] if is_record else uuid.uuid4().hex
            await self.bus.publish(delivery.subject, delivery.payload, id=known)


@contextlib.asynccontextmanager
async def begun(ground: Ground) -> AsyncIterator[Campaign]:
    """The pipelines applied, a first model served, the predictor asking."""
    async with connect(ground.nats, name="stranger") as bus:
        for name, records in ((DATASET, VERSION_EVERY), (PROBE, None)):
            await ground.stack.apply(pipeline(name, records))
        async with predicting(ground.inference, DATASET) as predictor:
            audit = Audit(ground.stack, ground.objects, DATASET, DATASET)
            campaign = Campaign(ground.stack, ground.controls, bus, predictor, audit)
            await campaign.records.run(VERSION_EVERY, 0.0)
            async with asyncio.timeout(RECOVERY_S):
                await predictor.success_after(0.0)
            yield campaign


def pipeline(name: str, records: int | None) -> dict[str, Any]:
    """Digits with a key, so that a record can be told from another with the same pixels."""
    made = digits_pipeline(name, VERSION_EVERY)
    made["train"]["params"] |= {"epochs": 2, "batch_size": 256}
    made["dataset"]["schema"]["key"] = {"type": "int64", "role": "ignore"}
    made["preprocess"] = [step for step in made["preprocess"] if "drop_duplicates" not in step]
    made["deployment"]["canary"] = {"trafficPercent": 50, "min_requests": 20}
    made["triggers"] = {} if records is None else {"records": records}
    return made
