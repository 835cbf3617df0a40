"""What is kept of single requests: the spans of those that are traced, the log of those logged."""

from collections.abc import Callable, Sequence

from libs import telemetry
from services.inference.endpoint import Endpoint, context_of
from services.inference.journal import Entry, Journal
from services.inference.served import Noted, Rates


class Notes:
    def __init__(self, journal: Journal | None, replica: str, rates: Rates) -> None:
        self.journal = journal
        self.replica = replica
        self.rates = rates
        self.on_trace: Callable[[str], None] = lambda model: None
        """Told of each trace that no caller began."""

    def tell(self, endpoint: Endpoint, version: str, answered: Sequence[Noted]) -> None:
        """Spans and log entries of what a batch answered."""
        for noted in answered:
            if noted.note.place:
                self.record(endpoint, version, noted)
            if noted.note.logged and self.journal is not None:
                self.journal.put(self.entry(endpoint, version, noted))

    def record(self, endpoint: Endpoint, version: str, noted: Noted) -> None:
        """The request's span; its links lead to where the version came from and to its
        roll-out."""
        origin = endpoint.origins.get(version)
        registered = context_of(origin.registered) if origin else None
        note = noted.note
        if not telemetry.is_sampled(note.parent):
            self.on_trace(endpoint.name)
        telemetry.record(
            f"infer {endpoint.name}",
            place=note.place,
            parent=note.parent,
            began_ns=note.arrived_ns,
            ended_ns=noted.answered_ns,
            links=[place for place in (registered, endpoint.rolled_out) if place is not None],
            attributes={
                "leptonic.request_id": note.id,
                "leptonic.project": endpoint.project,
                "leptonic.model": endpoint.model,
                "leptonic.version": int(version) if version.isdigit() else version,
                "leptonic.generation": endpoint.generation,
                "leptonic.batch_rows": noted.batch_rows,
                "leptonic.queue_us": (note.taken_ns - note.arrived_ns) // 1000,
            },
        )

    def entry(self, endpoint: Endpoint, version: str, noted: Noted) -> Entry:
        note = noted.note
        return Entry(
            project=endpoint.project,
            request_id=note.id,
            model=endpoint.model,
            number=int(version),
            generation=endpoint.generation,
            replica=self.replica,
            inputs=noted.inputs,
            outputs=noted.outputs,
            traceparent=note.place or note.parent,
            at=telemetry.wall_time(noted.answered_ns).isoformat(),
        )
