"""What must hold after every fault, read from outside: doors, objects, spans.

Every look is at what is new since the last one; what was found whole before is not read again.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import BufferReader

from libs.contracts.artifacts import DatasetManifest, ModelManifest, digest_of
from libs.objectstore import Corrupt, Missing, ObjectStore
from tests.chaos.load import PIXELS, Acked, Answer
from tests.running import Stack

PAGE = 1000
TOLERANCE = 1e-5
"""Between one row alone and the same row in a batch."""
CHILD_AFTER_KILL_S = 60.0
"""What a killed process had begun goes on elsewhere for at most so long."""
CALLERS = {
    "ingest": {"ingest"},
    "preprocess": {"preprocess", "ingest", "registry", "inference"},
    "trainer": {"trainer", "preprocess", "registry", "scheduler"},
    "scheduler": {"scheduler", "trainer", "inference", "registry"},
    "registry": {"registry", "scheduler", "trainer", "inference"},
    "inference": {"inference", "registry", "scheduler"},
}
"""Service -> whose spans can be parents of its own: the edges of ARCHITECTURE.md's table."""


Place = tuple[int, int, int]
"""Of a record: its message's sequence, its index there, its key."""

Said = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""(label, probabilities) of every digit."""


class Kill(NamedTuple):
    victim: str
    at_s: float


class Found(msgspec.Struct):
    """What one audit found; problems are sentences."""

    landed: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    torn: int = 0
    orphans: int = 0
    problems: list[str] = []


class Audit:
    def __init__(self, stack: Stack, objects: ObjectStore, dataset: str, model: str) -> None:
        self.stack = stack
        self.objects = objects
        self.dataset = f"/v1/projects/default/datasets/{dataset}"
        self.model = f"/v1/projects/default/models/{model}/versions"
        self.parts: dict[str, Counter[Place]] = {}
        """Digest -> its records."""
        self.numbers: list[int] = []
        self.whole: set[str] = set()
        """Digests that verified."""
        self.expected: dict[str, Said] = {}
        """Model version -> what it says."""
        self.judged = 0
        self.gone: set[tuple[str, str]] = set()
        """Parents (trace, span) that will not come any more, explained or told."""

    async def rows(self) -> int:
        """Landed so far; 0 while ingest does not say."""
        return int((await self.stack.try_get("ingest", self.dataset)).get("rows", 0))

    async def records(self, books: Sequence[Acked], found: Found) -> None:
        """Every acked record in one part, once, where its ack said; and nothing else."""
        await self.read_parts()
        compare(self.parts.values(), books, found)
        if len(self.numbers) != len(set(self.numbers)) or len(self.parts) != len(self.numbers):
            found.problems.append(f"parts are listed twice: {self.numbers}")

    async def read_parts(self) -> None:
        while True:
            after = max(self.numbers, default=0)
            path = f"{self.dataset}/parts?after={after}&limit={PAGE}"
            page = (await self.stack.get("ingest", path)).get("parts", [])
            if not page:
                return
            for part in page:
                payload = await self.objects.get(part["key"])
                if digest_of(payload) != part["digest"]:
                    raise Corrupt(f"part {part['key']}")
                self.numbers.append(int(part["number"]))
                self.parts[part["digest"]] = records_of(payload)

    async def versions(self, found: Found) -> None:
        """Every dataset and model version: each blob verifies, nothing is in it twice."""
        datasets = (await self.stack.get("preprocess", f"{self.dataset}/versions"))["versions"]
        models = (await self.stack.get("registry", self.model)).get("versions", [])
        for one in datasets:
            await self.sound(found, f"dataset version {one['number']}", self.dataset_version(one))
        for one in models:
            await self.sound(found, f"model version {one['number']}", self.model_version(one))
        for what, values in (
            ("dataset versions with one digest", [one["digest"] for one in datasets]),
            ("model versions of one job", [one["job"] for one in models]),
            ("model versions with one number", [one["number"] for one in models]),
        ):
            if len(values) != len(set(values)):
                found.torn += 1
                found.problems.append(f"{what}: {Counter(values).most_common(1)}")

    async def sound(self, found: Found, name: str, reading: Any) -> None:
        try:
            await reading
        except (Corrupt, Missing, AssertionError) as error:
            found.torn += 1
            found.problems.append(f"{name}: {error!r}")

    async def dataset_version(self, version: dict[str, Any]) -> None:
        """Its rows are the records of its parts, each once."""
        if version["digest"] in self.whole:
            return
        manifest = msgspec.json.decode(
            await self.objects.get_blob(version["digest"]), type=DatasetManifest
        )
        held: Counter[Place] = Counter()
        for blob in manifest.splits.values():
            held.update(records_of(await self.objects.get_blob(blob.digest)))
        await self.objects.get_blob(manifest.transform.digest)
        assert len(manifest.parts) == len(set(manifest.parts)), "a part is in it twice"
        wanted: Counter[Place] = Counter()
        for digest in manifest.parts:
            wanted.update(self.parts[digest])
        assert held == wanted, f"{held.total()} rows of {wanted.total()} in its parts"
        self.whole.add(version["digest"])

    async def model_version(self, version: dict[str, Any]) -> None:
        """Manifest, weights, graph and transform verify; the graph's answers are kept."""
        if version["digest"] in self.whole:
            return
        manifest = msgspec.json.decode(
            await self.objects.get_blob(version["digest"]), type=ModelManifest
        )
        for blob in (manifest.weights, manifest.transform):
            await self.objects.get_blob(blob.digest)
        graph = await self.objects.get_blob(manifest.graph.digest)
        self.expected[str(version["number"])] = await asyncio.to_thread(answers_of, graph)
        self.whole.add(version["digest"])

    def answers(self, answers: Sequence[Answer], found: Found) -> None:
        """Each is what the version that claims it would say."""
        fresh = answers[self.judged :]
        self.judged = len(answers)
        wrong = [one for one in fresh if not is_right(one, self.expected)]
        found.wrong = len(wrong)
        found.problems += [f"wrong answer: {one}" for one in wrong[:3]]

    async def spans(self, since_s: float, kills: Sequence[Kill]) -> list[dict[str, Any]]:
        """Orphans that no kill explains, and that were not told before.

        A parent that is lost stays lost: what is delivered again much later has none either.
        """
        query = f"since_ns={int(since_s * 1e9)}&limit={PAGE}"
        orphans = (await self.stack.get("traces", f"/v1/orphans?{query}"))["spans"]
        self.gone |= {parent_of(one) for one in orphans if is_explained(one, kills)}
        return [one for one in orphans if parent_of(one) not in self.gone]


def compare(parts: Iterable[Counter[Place]], books: Iterable[Acked], found: Found) -> None:
    """What is there more than once counts as doubled, and so does what nobody was told of."""
    landed: Counter[Place] = Counter()
    for rows in parts:
        landed.update(rows)
    acked = {(b.sequence, i, key) for b in books for i, key in enumerate(b.keys)}
    found.landed = landed.total()
    found.lost = len(acked - landed.keys())
    found.doubled = landed.total() - len(landed) + len(landed.keys() - acked)


def is_right(one: Answer, expected: Mapping[str, Said]) -> bool:
    """An answer of a version that nobody registered is wrong, whatever it says."""
    if one.version not in expected or not one.id_matches:
        return False
    labels, probabilities = expected[one.version]
    close = np.allclose(one.probabilities, probabilities[one.row], atol=TOLERANCE)
    return bool(close and labels[one.row] == one.label)


def parent_of(span: dict[str, Any]) -> tuple[str, str]:
    return span["trace_id"], span["parent_id"]


def is_explained(orphan: dict[str, Any], kills: Iterable[Kill]) -> bool:
    """Its parent was in a process that was killed before it could send it."""
    return any(
        kill.victim in CALLERS[orphan["service"]]
        and orphan["start_ns"] / 1e9 < kill.at_s + CHILD_AFTER_KILL_S
        and orphan["end_ns"] / 1e9 > kill.at_s - CHILD_AFTER_KILL_S
        for kill in kills
    )


def records_of(parquet: bytes) -> Counter[Place]:
    table: pa.Table = pq.read_table(BufferReader(parquet), columns=["_sequence", "_index", "key"])
    columns = (column.to_pylist() for column in table.itercolumns())
    return Counter(zip(*columns, strict=True))


def answers_of(graph: bytes) -> Said:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    labels, probabilities = session.run(
        ["label", "probabilities"], {"pixels": PIXELS.astype(np.float32)}
    )
    return labels, probabilities
