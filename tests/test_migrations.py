"""A schema can be one release ahead of the code: what is added never takes anything away."""

import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from libs.database import Contract
from services.inference.store import MIGRATIONS as INFERENCE
from services.ingest.store import MIGRATIONS as INGEST
from services.preprocess.store import MIGRATIONS as PREPROCESS
from services.registry.migrations import MIGRATIONS as REGISTRY
from services.scheduler.store import MIGRATIONS as SCHEDULER
from services.trainer.store import MIGRATIONS as TRAINER
from tests.running import ROOT

MIGRATIONS: dict[str, Sequence[str]] = {
    "ingest": INGEST,
    "preprocess": PREPROCESS,
    "trainer": TRAINER,
    "registry": REGISTRY,
    "inference": INFERENCE,
    "scheduler": SCHEDULER,
}
TAKES_AWAY = {
    "drops": r"\bdrop\b",
    "renames": r"\brename\b",
    "empties": r"\btruncate\b",
    "changes a type": r"\balter\s+(column\s+)?\S+\s+(set\s+data\s+)?type\b",
    "forbids null": r"\bset\s+not\s+null\b",
    "adds what old inserts lack": r"\badd\s+(column\s+)?(?!.*\bdefault\b).*\bnot\s+null\b",
    "adds a rule for old rows and inserts": r"\badd\s+(constraint|check|unique|foreign|primary)\b",
    "adds a rule on a table that is there": r"\bcreate\s+unique\s+index\b",
}
STORE_TESTS = {
    "ingest": ("test_landing.py",),
    "preprocess": ("test_worker.py", "test_request_log.py"),
    "trainer": ("test_service.py",),
    "registry": ("test_handlers.py", "test_server.py"),
    "inference": ("test_feedback.py", "test_serving.py"),
    "scheduler": ("test_writer.py",),
}
"""Of each service, those that write and read every table."""


def taken_away(statements: str) -> list[str]:
    """What the code of the release before would miss; nothing for a table made by the same."""
    made = set(re.findall(r"create\s+table\s+(?:if\s+not\s+exists\s+)?(\w+)", statements, re.I))
    found = []
    for statement in statements.split(";"):
        on = re.search(r"\b(?:alter\s+table|on)\s+(\w+)", statement, re.I)
        if on is None or on[1] not in made:
            found += [w for w, what in TAKES_AWAY.items() if re.search(what, statement, re.I)]
    return found


@pytest.mark.parametrize("service", MIGRATIONS)
def test_migrations_only_add(service: str) -> None:
    """Taking away is a `Contract`, a release after the one that stopped using it."""
    migrations = MIGRATIONS[service]
    found = [taken_away(one) for one in migrations if not isinstance(one, Contract)]
    assert found == [[]] * len(found)
    assert not isinstance(migrations[0], Contract)


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        ("drop table part", "drops"),
        ("alter table part drop column rows", "drops"),
        ("alter table part rename column rows to count", "renames"),
        ("truncate part", "empties"),
        ("alter table part alter column rows type int", "changes a type"),
        ("ALTER TABLE part ALTER rows SET DATA TYPE int", "changes a type"),
        ("alter table part alter column rows set not null", "forbids null"),
        ("alter table part add column at timestamptz not null", "adds what old inserts lack"),
        ("alter table part add check (rows > 0)", "adds a rule for old rows and inserts"),
        ("create unique index one on part (rows)", "adds a rule on a table that is there"),
    ],
)
def test_what_takes_away_is_found(statements: str, what: str) -> None:
    assert what in taken_away(statements)


@pytest.mark.parametrize(
    "statements",
    [
        "alter table part add column note text",
        "alter table part add column note text not null default ''",
        "create table other (id int); create unique index one on other (id)",
        "create index part_at on part (at)",
    ],
)
def test_what_adds_is_let_through(statements: str) -> None:
    assert taken_away(statements) == []


@pytest.mark.resilience
@pytest.mark.parametrize("service", STORE_TESTS)
def test_a_service_runs_on_the_schema_of_its_next_release(service: str) -> None:
    """Its own tests, while every table has a column more: see `tests/newer_schema.py`."""
    files = [f"services/{service}/tests/{name}" for name in STORE_TESTS[service]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.newer_schema", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "columns of the next release" in done.stdout
