"""A line that says at every step what it may say: the rules, by who waits and nothing else."""

from typing import NamedTuple

from libs.contracts.pipeline import Batching
from services.inference.line import (
    BACK_NS_MAX,
    BACK_NS_MIN,
    BACK_SHARE,
    DELAYED,
    PACE_SHARE,
    PART_MIN,
    SLOW_NS_MIN,
    Turn,
)
from services.inference.tests.lines import (
    US,
    Answer,
    AnyLine,
    Configure,
    Join,
    Leave,
    Over,
    Pass,
    Step,
    Take,
)


class Ticket(NamedTuple):
    """What the test knows of one who waits."""

    key: int
    rows: int
    kind: int
    arrived_ns: int
    deadline_ns: int
    timeout_ns: int
    level: int

    @property
    def expires_ns(self) -> float:
        return min(self.deadline_ns or float("inf"), self.timeout_ns or float("inf"))


class Watched:
    """A line, and a list of who waits in it that is searched from end to end at every step."""

    def __init__(self, line: AnyLine, given: Batching) -> None:
        self.line = line
        self.limits = given
        self.now_ns = 1_000_000
        self.there: list[Ticket] = []
        """In order of arrival; who was delayed, in order of that behind them."""
        self.joined = 0
        self.over: list[int] = []
        """Keys that left in any way."""
        self.back, self.back_ns = 0, 0
        """Who may ask again, and until when."""
        self.running: list[int] = []
        """Requests of each batch that runs."""
        self.pace_ns = 0

    def step(self, step: Step) -> None:
        match step:
            case Join():
                self.join(step)
            case Leave(which):
                self.leave(which % (self.joined + 1))
            case Take(runners):
                self.take(runners)
            case Answer(requests, took_us):
                self.answer(requests, took_us * US)
            case Over(which) if self.running:
                self.line.over(self.running.pop(which % len(self.running)))
            case Pass(us):
                self.now_ns += us * US
            case Configure(given):
                self.limits = given
                self.line.configure(given)
        assert self.line.waiting == len(self.there)

    def join(self, asked: Join) -> None:
        if asked.rows > self.limits.max_batch_size:
            return
        key = self.joined + 1
        deadline_ns = self.now_ns + asked.deadline_us * US if asked.deadline_us else 0
        took = self.line.join(
            key,
            asked.rows,
            asked.kind,
            self.now_ns,
            deadline_ns,
            asked.timeout_us,
            asked.priority,
        )
        assert took == (len(self.there) < self.limits.max_queue_size)
        if took:
            self.back -= self.back > 0
            self.joined = key
            self.there.append(self.ticket(key, asked, deadline_ns))

    def answer(self, requests: int, took_ns: int) -> None:
        self.line.answered(requests, took_ns, self.now_ns)
        self.pace_ns += (took_ns - self.pace_ns) // (PACE_SHARE if self.pace_ns else 1)
        if took_ns // BACK_SHARE >= BACK_NS_MIN:
            until_ns = self.now_ns + min(took_ns // BACK_SHARE, BACK_NS_MAX)
            if self.back_ns <= self.now_ns:
                self.back = 0
            self.back += requests
            self.back_ns = max(self.back_ns, until_ns)

    def ticket(self, key: int, asked: Join, deadline_ns: int) -> Ticket:
        known = self.limits
        own_us = asked.timeout_us if known.allow_timeout_override else 0
        timeout_us = min(filter(None, (own_us, known.default_timeout_microseconds)), default=0)
        timeout_ns = self.now_ns + timeout_us * US if timeout_us else 0
        level = asked.priority
        if not 1 <= level <= known.priority_levels:
            level = known.default_priority_level or known.priority_levels
        return Ticket(key, asked.rows, asked.kind, self.now_ns, deadline_ns, timeout_ns, level)

    def leave(self, key: int) -> None:
        self.line.leave(key)
        for one in [one for one in self.there if one.key == key]:
            self.there.remove(one)
            self.over.append(key)

    def take(self, runners: int = 1) -> Turn:
        turn = self.line.take(self.now_ns, runners)
        self.check_late(turn)
        if turn.batch:
            self.check_batch(turn, runners)
            self.running.append(len(turn.batch))
        else:
            self.check_wait(turn)
        self.there = [one for one in self.there if one.key not in turn.batch]
        self.over += turn.batch
        return turn

    def check_late(self, turn: Turn) -> None:
        """Those whose time is over are told so or go behind everybody; nobody else is, and none
        of them is in the batch."""
        expired = [one for one in self.there if one.expires_ns <= self.now_ns]
        expired.sort(key=lambda one: (one.expires_ns, one.key))
        late = []
        for one in expired:
            self.there.remove(one)
            by_client = 0 < one.deadline_ns <= self.now_ns
            if by_client or self.limits.timeout_action == "REJECT":
                late.append((one.key, by_client))
            else:
                self.there.append(one._replace(level=DELAYED, timeout_ns=0))
        assert turn.late == late
        self.over += [key for key, _ in late]
        assert not {key for key, _ in late} & set(turn.batch)

    def equals(self) -> list[Ticket]:
        """The head of the line and all of its kind, in their order."""
        order = sorted(self.there, key=lambda one: one.level)
        return [one for one in order if one.kind == order[0].kind]

    def check_batch(self, turn: Turn, runners: int) -> None:
        """The head is in it, nobody of its kind is passed over, and it is as large as may be."""
        assert turn.wait_ns == 0
        equals = self.equals()
        is_full = sum(one.rows for one in equals) >= self.limits.max_batch_size
        is_enough = is_full or len(self.there) >= self.part(1)
        assert is_enough or not (self.is_free and self.back and self.now_ns < self.back_ns)
        assert turn.batch == [one.key for one in equals[: len(turn.batch)]]
        rows = [one.rows for one in equals]
        count, size = len(turn.batch), self.limits.max_batch_size
        assert count == 1 or sum(rows[:count]) <= size
        most = max(n for n in range(1, len(rows) + 1) if n == 1 or sum(rows[:n]) <= size)
        preferred = [p for p in self.limits.preferred_batch_size if p <= sum(rows[:most])]
        if preferred:
            assert count == 1 or sum(rows[:count]) <= max(preferred)
            assert count == most or sum(rows[: count + 1]) > max(preferred)
        else:
            is_quick = 0 < self.pace_ns < SLOW_NS_MIN
            is_shared = most == len(self.there) and not is_quick
            share = self.share(sum(rows[:most]), runners) if is_shared else size
            part = self.part(runners)
            assert count == 1 or (sum(rows[:count]) <= share and count <= part)
            assert count in (most, part) or sum(rows[: count + 1]) > share

    @property
    def is_free(self) -> bool:
        limits = self.limits
        return not limits.preferred_batch_size and not limits.max_queue_delay_microseconds

    def share(self, rows: int, runners: int) -> int:
        """Of each runner that has nothing to do, where a batch waits for nothing better."""
        return -(-rows // runners) if self.is_free else max(rows, 1)

    def part(self, runners: int) -> float:
        """Requests that one batch may take while others run slow ones: half a runner's share."""
        if not self.is_free or not self.running or self.pace_ns < SLOW_NS_MIN:
            return float("inf")
        everyone = len(self.there) + sum(self.running) + self.back
        return max(PART_MIN, -(-everyone // (2 * (runners + len(self.running)))))

    def check_wait(self, turn: Turn) -> None:
        """It waits only for what could make the batch better, and not past anybody's time."""
        if not self.there:
            assert turn.wait_ns == 0
            return
        equals = self.equals()
        enough = min(self.limits.preferred_batch_size, default=self.limits.max_batch_size)
        assert sum(one.rows for one in equals) < enough
        assert len(self.there) < self.part(1)
        due_ns = equals[0].arrived_ns + self.limits.max_queue_delay_microseconds * US
        if self.is_free and self.back:
            due_ns = self.back_ns
        look_ns = min(due_ns, *(one.expires_ns for one in self.there))
        assert turn.wait_ns == look_ns - self.now_ns > 0

    def drain(self) -> None:
        """With nobody new everybody has left after as many looks as there are reasons to look."""
        for _ in range(3 * len(self.there) + 1):
            if not self.there:
                return
            self.now_ns += self.take().wait_ns
        raise AssertionError(self.there)
