"""When a version is built. Pure."""

import msgspec

from libs.contracts.pipeline import DriftTrigger, Pipeline, Triggers

RECORDS, DRIFT, MANUAL = "records", "drift", "manual"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Where a pipeline stands. Positions count the parts of its dataset in order of arrival."""

    project: str
    pipeline: str
    revision: int
    spec: Pipeline
    through_position: int = 0
    """The last part that its newest version holds."""
    measured_position: int = 0
    """The last part whose drift is in the window."""
    fresh_position: int = 0
    """The parts after this one, up to `through_position`, were new to its newest version."""
    version_digest: str = ""
    version_revision: int = 0
    learned: dict[str, list[int]] = {}
    wanted: str = ""
    """`drift` while a drift waits for its version."""
    wanted_traceparent: str = ""

    @property
    def dataset(self) -> str:
        return self.spec.dataset.name

    @property
    def drift(self) -> DriftTrigger:
        """The bounds drift is measured by, also where it triggers nothing."""
        return self.spec.triggers.drift or DriftTrigger()


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One landed part, at its position among those of its dataset."""

    digest: str
    key: str
    rows: int
    first_sequence: int
    position: int
    traceparent: str = ""


def due(triggers: Triggers, wanted: str, rows_since: int) -> str:
    """Why a version should be built now, or "". A drift and a full count are one build."""
    if wanted:
        return wanted
    if triggers.records is not None and rows_since >= max(1, triggers.records):
        return RECORDS
    return ""


def landing_order(parts: list[Part]) -> list[Part]:
    """By the stream, whatever the order of their events."""
    return sorted(parts, key=lambda part: (part.first_sequence, part.digest))


def rows_after(parts: list[Part], position: int) -> int:
    return sum(part.rows for part in parts if part.position > position)


def is_news(state: State, digest: str) -> bool:
    """Whether the pipeline, as it is now, has not yet been told of this version."""
    return (state.version_digest, state.version_revision) != (digest, state.revision)
