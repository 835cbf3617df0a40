"""Several agents of one machine, heard as one node: what one of them gives back, another may have.

An agent that falls silent takes its kinds and what it ran with it. To the scheduler the node is
then another incarnation, which runs what is left: what it does not list is tried again. So nothing
is said of a node before all its agents have had the time to speak.
"""

import msgspec

from services.scheduler.nodes import DEAF_S, HEALTHY, Liveness, gpus_of
from services.scheduler.stimuli import Heartbeat


class Voices:
    """As heard by one scheduler while it leads."""

    def __init__(self, now: float) -> None:
        self.said: dict[str, dict[str, Heartbeat]] = {}
        """By node, then by agent: what each said last."""
        self.agents = Liveness([], now)
        self.begun = Liveness([], now)
        """When each node was first heard of: what was missed while we were deaf does not count."""

    def heard_itself(self, now: float) -> None:
        self.agents.heard_itself(now)
        self.begun.heard_itself(now)

    def heard(self, one: Heartbeat, now: float) -> None:
        if one.node not in self.said:
            if not one.agent:
                return
            self.said[one.node] = {}
            self.begun.heard(one.node, now)
        self.said[one.node][one.agent] = one
        self.agents.heard(name_of(one), now)

    def whole(self, one: Heartbeat, now: float) -> Heartbeat | None:
        """What its node says with it; None while another may not have spoken yet."""
        parts = self.said.get(one.node)
        if parts is None:
            return one
        is_deaf = now - self.begun.ear > DEAF_S
        if is_deaf or not self.begun.is_silent(one.node, now):
            return None
        return together(parts)

    def bereft(self, now: float) -> list[Heartbeat]:
        """What nodes say now that one of their agents says nothing any more."""
        gone, found = set(self.agents.silent(now)), []
        for node, parts in list(self.said.items()) if gone else ():
            left = {agent: one for agent, one in parts.items() if name_of(one) not in gone}
            if not left:
                del self.said[node]
            elif len(left) < len(parts):
                self.said[node] = left
                found.append(together(left))
        for name in gone:
            del self.agents.seen[name]
        return found


def name_of(one: Heartbeat) -> str:
    return f"{one.node} {one.agent}"


def together(parts: dict[str, Heartbeat]) -> Heartbeat:
    """The machine is as large as the largest of them says; who is not ready takes no work."""
    each = [parts[agent] for agent in sorted(parts)]
    large = max(each, key=lambda one: gpus_of(one.capacity))
    ready = [one for one in each if one.health == HEALTHY] or each
    return Heartbeat(
        node=each[0].node,
        incarnation=" ".join(f"{one.agent}={one.incarnation}" for one in each),
        kinds=sorted({kind for one in ready for kind in one.kinds}),
        capacity=msgspec.structs.replace(
            large.capacity,
            cpu_milli=max(one.capacity.cpu_milli for one in each),
            memory_mib=max(one.capacity.memory_mib for one in each),
        ),
        running=sorted({run for one in each for run in one.running}),
        health=ready[0].health,
        gpu_model=large.gpu_model,
        labels={name: value for one in each for name, value in one.labels.items()},
    )
