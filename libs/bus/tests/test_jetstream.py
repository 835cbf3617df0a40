"""What only the real broker's client does."""

from libs.bus import RECORDS
from libs.bus.jetstream import JetStreamBus


async def test_a_fetch_that_runs_out_of_time_is_empty(bus: JetStreamBus) -> None:
    """nats-py raises two kinds of timeout: the second in about 1 of 20 waits as short as these."""
    subscription = await bus.subscribe(RECORDS, "reader", ["records.>"])
    for n in range(150):
        assert await subscription.fetch(10, 0.002 + 0.0001 * (n % 100)) == []
