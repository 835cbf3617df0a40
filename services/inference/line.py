"""Who waits for a model, and who is served together: a state machine that knows no clock.

The order is (priority, arrival). The head of it is in every batch, so nobody starves behind other
shapes; those of its kind follow until the next would be too many. A batch waits for more only while
`max_queue_delay_microseconds` of its head are left and more could help: not once it holds
`max_batch_size` rows, the next one of its kind does not fit, or a preferred size is reached (it is
then cut to the largest one).

Where batches are worth no wait (neither a delay nor preferred sizes), the runners that have nothing
to do share all that waits, unless one is done with it before another has woken up. While others run
slow batches, who takes leaves as much in line as it takes: when its batch is done, those whom it
has answered are still on their way, and there is something to go on with.

Who was just answered may well ask again at once. So after a slow batch the next one waits for as
many to join as were answered, a small part of the time that the batch took. Eight callers of a slow
model are then one batch of eight each time, and not two of four in turn. A caller alone waits for
nobody.

Whoever has expired is told so by the next `take`, in the order of expiry, then of arrival, before
anything else is decided; a request that expires now has expired. The client's own deadline says
more than a queue timeout, when both are over.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import NamedTuple

import msgspec

from libs.contracts.pipeline import Batching

US = 1000
"""In ns."""
DELAYED = 1 << 32
"""The level behind all priorities: of those whose timeout passed under DELAY."""
BACK_SHARE = 16
"""Of the time that a batch took: so long those whom it answered may take to ask again."""
BACK_NS_MIN, BACK_NS_MAX = 100_000, 5_000_000
"""Less is not worth a timer, which is 50 us late; who is not back by then is not coming back."""
PACE_SHARE = 8
"""Of the pace of batches the latest is an eighth."""
SLOW_NS_MIN = 150_000
"""Quicker batches cost about as much to hand out as to run: they are not made smaller."""
PART_MIN = 8
"""So many requests are one batch however many runners there are."""
STALE_MAX = 64
"""Expiries of requests that have left already which are kept beside those that count."""


class Turn(NamedTuple):
    """What to do now: answer `late` with an error, then run the batch, or look again."""

    batch: list[int]
    late: list[tuple[int, bool]]
    """(key, whether it was the client's deadline rather than a queue timeout)."""
    wait_ns: int
    """0 with an empty batch: nothing waits."""


class Item(msgspec.Struct, gc=False, eq=False):
    """One request in line. Times of 0 are none."""

    key: int
    rows: int
    kind: Hashable
    arrived_ns: int
    deadline_ns: int
    timeout_ns: int
    """When its queue timeout is over."""
    level: int


Row = OrderedDict[int, Item]
"""By key, in order of arrival: first and any can be taken out at once."""


class Line:
    """Every step costs the same however many wait (a batch: its own size)."""

    def __init__(self, limits: Batching) -> None:
        self.items: dict[int, Item] = {}
        self.levels: dict[int, Row] = {}
        """Everybody of a priority. No empty ones, here and in `kinds`."""
        self.kinds: dict[tuple[int, Hashable], Row] = {}
        """Those of a priority who may share a batch."""
        self.rows: dict[Hashable, int] = {}
        """Waiting of each kind."""
        self.expiries: list[tuple[int, int, Item]] = []
        """A heap of (when, how many had come before, who); who left already stays in it a while."""
        self.arrivals = 0
        self.back = 0
        """How many of those answered may ask again until `back_ns`."""
        self.back_ns = 0
        self.running = 0
        """Batches that were taken and are not over."""
        self.running_requests = 0
        self.pace_ns = 0
        """Of a batch, those answered last count most; 0: none was."""
        self.configure(limits)

    def configure(self, limits: Batching) -> None:
        """Priorities and timeouts of those who wait already stay as they are."""
        self.limits = limits
        self.delay_ns = limits.max_queue_delay_microseconds * US
        self.enough_rows = min(limits.preferred_batch_size, default=limits.max_batch_size)
        self.is_free = not limits.max_queue_delay_microseconds and not limits.preferred_batch_size
        """How long to wait for more is left to this line."""

    @property
    def waiting(self) -> int:
        return len(self.items)

    def join(
        self,
        key: int,
        rows: int,
        kind: Hashable,
        now_ns: int,
        deadline_ns: int = 0,
        timeout_us: int = 0,
        priority: int = 0,
    ) -> bool:
        """False when `max_queue_size` requests wait already. Nobody else has this key."""
        assert 1 <= rows <= self.limits.max_batch_size, rows
        assert key not in self.items, key
        if len(self.items) >= self.limits.max_queue_size:
            return False
        timeout_ns = self.timeout_ns(now_ns, timeout_us)
        level = self.level(priority)
        item = Item(key, rows, kind, now_ns, deadline_ns, timeout_ns, level)
        self.arrivals += 1
        self.back = max(0, self.back - 1)
        self.add(item)
        if deadline_ns or timeout_ns:
            self.remember(item, self.arrivals)
        return True

    def leave(self, key: int) -> None:
        """Nothing happens when it is not in line."""
        item = self.items.get(key)
        if item is not None:
            self.remove(item)

    def answered(self, requests: int, took_ns: int, now_ns: int) -> None:
        """A batch of so many, which took so long."""
        self.pace_ns += (took_ns - self.pace_ns) // (PACE_SHARE if self.pace_ns else 1)
        patience_ns = min(took_ns // BACK_SHARE, BACK_NS_MAX)
        if patience_ns >= BACK_NS_MIN:
            self.back = requests + (self.back if now_ns < self.back_ns else 0)
            self.back_ns = max(self.back_ns, now_ns + patience_ns)

    def over(self, requests: int) -> None:
        """A batch of so many that was taken is answered or failed."""
        self.running -= 1
        self.running_requests -= requests

    def parted(self, parts: int) -> None:
        """A batch that was taken goes on as so many."""
        self.running += parts - 1

    def take(self, now_ns: int, runners: int = 1) -> Turn:
        """`runners`: those who have nothing to do, the one that asks among them."""
        late = self.expire(now_ns)
        wait_ns = self.wait_ns(now_ns)
        if wait_ns or not self.items:
            return Turn([], late, wait_ns)
        batch = self.shared(self.cut(self.gather()), runners)
        for item in batch:
            self.remove(item)
        self.running += 1
        self.running_requests += len(batch)
        return Turn([item.key for item in batch], late, 0)

    def wait_ns(self, now_ns: int) -> int:
        """Until a batch is due or somebody expires. Of those who wait none has expired."""
        if not self.items:
            return 0
        head = self.head()
        due_ns = self.back_ns if self.is_free and self.back else head.arrived_ns + self.delay_ns
        wait_ns = due_ns - now_ns
        if wait_ns <= 0 or self.rows[head.kind] >= self.enough_rows:
            return 0
        if self.is_shared and len(self.items) >= self.part(1):
            return 0
        if self.expiries:
            wait_ns = min(wait_ns, self.expiries[0][0] - now_ns)
        return max(1, wait_ns)

    def head(self) -> Item:
        return next(iter(self.levels[min(self.levels)].values()))

    def gather(self) -> list[Item]:
        """The head, and those of its kind behind it until the next would be too many."""
        batch: list[Item] = []
        left = self.limits.max_batch_size
        for item in self.alike(self.head().kind):
            left -= item.rows
            if left < 0 and batch:
                break
            batch.append(item)
        return batch

    def alike(self, kind: Hashable) -> Iterator[Item]:
        for level in sorted(self.levels):
            yield from self.kinds.get((level, kind), {}).values()

    def cut(self, batch: list[Item]) -> list[Item]:
        """To the largest preferred size that it reaches; the head stays."""
        sums = list(accumulate(item.rows for item in batch))
        reached = [size for size in self.limits.preferred_batch_size if size <= sums[-1]]
        return batch[: max(1, bisect_right(sums, max(reached)))] if reached else batch

    def shared(self, batch: list[Item], runners: int) -> list[Item]:
        """What is left for others, and for the next batch; unless batches are worth a wait."""
        if not self.is_free:
            return batch
        sums = list(accumulate(item.rows for item in batch))
        whole = len(batch) < len(self.items) or 0 < self.pace_ns < SLOW_NS_MIN
        most = len(batch) if whole else bisect_right(sums, -(-sums[-1] // runners))
        if self.is_shared:
            most = min(most, self.part(runners))
        return batch[: max(1, most)]

    @property
    def is_shared(self) -> bool:
        """Other runners are at slow batches."""
        return self.is_free and self.running > 0 and self.pace_ns >= SLOW_NS_MIN

    def part(self, runners: int) -> int:
        """Half of what comes to each runner, of all requests that are known of."""
        everyone = len(self.items) + self.running_requests + self.back
        return max(PART_MIN, -(-everyone // (2 * (runners + self.running))))

    def expire(self, now_ns: int) -> list[tuple[int, bool]]:
        late = []
        while self.expiries:
            when, arrival, item = self.expiries[0]
            waits = self.items.get(item.key) is item
            if waits and when > now_ns:
                break
            heappop(self.expiries)
            if not waits:
                continue
            self.remove(item)
            by_client = 0 < item.deadline_ns <= now_ns
            if by_client or self.limits.timeout_action == "REJECT":
                late.append((item.key, by_client))
            else:
                self.delay(item, arrival)
        return late

    def delay(self, item: Item, arrival: int) -> None:
        item.level, item.timeout_ns = DELAYED, 0
        self.add(item)
        if item.deadline_ns:
            self.remember(item, arrival)

    def add(self, item: Item) -> None:
        key, level, kind = item.key, item.level, item.kind
        self.items[key] = item
        if level not in self.levels:
            self.levels[level] = OrderedDict()
        self.levels[level][key] = item
        if (level, kind) not in self.kinds:
            self.kinds[level, kind] = OrderedDict()
        self.kinds[level, kind][key] = item
        self.rows[kind] = self.rows.get(kind, 0) + item.rows

    def remove(self, item: Item) -> None:
        key, level, kind = item.key, item.level, item.kind
        del self.items[key]
        del self.levels[level][key]
        if not self.levels[level]:
            del self.levels[level]
        del self.kinds[level, kind][key]
        if not self.kinds[level, kind]:
            del self.kinds[level, kind]
        self.rows[kind] -= item.rows
        if not self.rows[kind]:
            del self.rows[kind]

    def remember(self, item: Item, arrival: int) -> None:
        """When it expires. Clears out those who left, once they are most of the heap."""
        when = min(filter(None, (item.deadline_ns, item.timeout_ns)))
        if len(self.expiries) > 2 * len(self.items) + STALE_MAX:
            self.expiries = [e for e in self.expiries if self.items.get(e[2].key) is e[2]]
            heapify(self.expiries)
        heappush(self.expiries, (when, arrival, item))

    def timeout_ns(self, now_ns: int, timeout_us: int) -> int:
        """When the request's queue timeout is over: the smaller one of its own and the default."""
        own_us = timeout_us if self.limits.allow_timeout_override else 0
        given = [us for us in (own_us, self.limits.default_timeout_microseconds) if us > 0]
        return now_ns + min(given) * US if given else 0

    def level(self, priority: int) -> int:
        if 1 <= priority <= self.limits.priority_levels:
            return priority
        return self.limits.default_priority_level or self.limits.priority_levels
