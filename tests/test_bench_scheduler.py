"""What the scheduler's figures belong to: a part is measured again when something it is made of has
changed, and only then. And what is counted is what happened.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.part import PARTS, made_of
from bench.rows import ROOT
from bench.scheduler import sources, stands

PATHS = (":(glob)service/*.py", "native/placement*")
IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None) or "")
"""
ALSO_RUN = {
    "durable": ["services.scheduler.app"],
    "kill_points": ["services.scheduler.tests.test_crash"],
}
PURE = ("openb", "philly")
NO_MATTER = ("libs/bus/", "libs/database/", "libs/doors/", "libs/settings/", "libs/telemetry/")
"""What a simulation imports with the service and has no use for."""


def git(repository: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    command = ["git", "-C", str(repository), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(repository: Path) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "t")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    made = tmp_path / "repository"
    for name in ("service/domain.py", "service/tests/test_domain.py", "native/placement.h", "a.md"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("1")
    git(made, "init", "-q")
    commit(made)
    return made


def test_a_commit_that_changes_nothing_of_it_costs_nothing(
    repository: Path, tmp_path: Path
) -> None:
    before = sources(repository, PATHS, tmp_path)
    (repository / "a.md").write_text("2")
    (repository / "service/tests/test_domain.py").write_text("2")
    assert sources(repository, PATHS, tmp_path) == before
    commit(repository)
    assert sources(repository, PATHS, tmp_path) == before != ""


@pytest.mark.parametrize("name", ["service/domain.py", "native/placement.h", "service/new.py"])
def test_a_change_is_nothing_to_belong_to_until_it_is_committed(
    repository: Path, tmp_path: Path, name: str
) -> None:
    before = sources(repository, PATHS, tmp_path)
    (repository / name).write_text("2")
    assert sources(repository, PATHS, tmp_path) == ""
    commit(repository)
    assert sources(repository, PATHS, tmp_path) not in ("", before)
    git(repository, "revert", "--no-edit", "HEAD")
    assert sources(repository, PATHS, tmp_path) == before


def test_other_traces_are_other_figures(repository: Path, tmp_path: Path) -> None:
    before = sources(repository, PATHS, tmp_path)
    (tmp_path / "trace.csv").write_text("1")
    one = sources(repository, PATHS, tmp_path)
    (tmp_path / "trace.csv").write_text("2")
    assert len({before, one, sources(repository, PATHS, tmp_path)}) == 3


def test_where_git_is_not_there_figures_belong_to_nothing(tmp_path: Path) -> None:
    assert sources(tmp_path, PATHS, tmp_path) == ""


def test_what_failed_or_belongs_to_others_or_to_nothing_is_measured_again() -> None:
    row = {"ours": "1", "sources": "a"}
    assert stands([row], "a")
    assert not stands([row], "b")
    assert not stands([row, {**row, "ours": "failed"}], "a")
    assert not stands([], "a")
    assert not stands([{**row, "sources": ""}], "")


def listed(*paths: str) -> set[str]:
    return set(git(ROOT, "ls-files", "-co", "--exclude-standard", "--", *paths).splitlines())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_names_all_that_it_imports(name: str) -> None:
    paths = made_of(name)
    assert all(map(listed, paths))
    modules = [f"bench.{name}", *ALSO_RUN.get(name, [])]
    command = [sys.executable, "-c", IMPORTED, *modules]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    files = {Path(line) for line in done.stdout.splitlines() if line.startswith(f"{ROOT}/")}
    ours = {file.relative_to(ROOT).as_posix() for file in files if file.stat().st_size}
    missing = (ours & listed()) - listed(*paths)
    if name in PURE:
        missing = {file for file in missing if not file.startswith(NO_MATTER)}
    assert not missing


def test_kill_points_are_counted_by_who_kills(tmp_path: Path) -> None:
    test = tmp_path / "test_kills.py"
    test.write_text(
        "import pytest\n"
        "@pytest.mark.long\n"
        "def test_kills(record_property):\n"
        "    record_property('kills', 7)\n"
    )
    code = "import sys; from pathlib import Path; from bench.kill_points import kills; "
    command = [sys.executable, "-c", code + "print(kills(Path(sys.argv[1])))", str(test)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    test.write_text("import pytest\n@pytest.mark.long\ndef test_kills():\n    assert False\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pytest ended with" in done.stderr
