"""How an attempt is started and stopped: the one place that knows who runs it.

An executor acts inside the transaction that records the decisions, so decisions and their effects
commit together. `BusExecutor` addresses agents, processes that announce themselves with
heartbeats and act on the events for their node; it is all that local processes need. An engine
that cannot take part in a Postgres transaction (Ray, Docker) goes behind the same door as an
agent (`agent.py`): a process beside the engine that announces the engine's capacity as a node,
starts an actor or a container when it is handed `AttemptPlaced`, and answers as every agent does.
Where an engine must be called from here instead, its executor writes a row in this transaction and
a worker of its own carries it out, as the outbox does for the bus.
"""

from collections.abc import Sequence
from typing import Protocol

from libs.contracts.events import AttemptPlaced, AttemptStopped
from libs.database import Transaction

Order = AttemptPlaced | AttemptStopped


class Executor(Protocol):
    async def carry_out(self, tx: Transaction, orders: Sequence[tuple[Order, str]]) -> None:
        """Each attempt is started, or told to stop, at least once if the transaction commits.

        An order comes with the traceparent it continues.
        """
        ...


class BusExecutor:
    """Agents on the platform's bus."""

    async def carry_out(self, tx: Transaction, orders: Sequence[tuple[Order, str]]) -> None:
        await tx.emit_all(orders)
