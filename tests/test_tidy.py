"""Style, checked: what cannot be seen by the formatter, the linter or the type checker."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("ingest", "preprocess", "trainer", "registry", "inference", "scheduler")
FILE_LINES_MAX = 420
FUNCTION_LINES_MAX = 60
EVERY_SERVICE_HAS = {
    "__init__.py",
    "__main__.py",
    "app.py",
    "domain.py",
    "handlers.py",
    "store.py",
    "server.py",
}
GRAB_BAGS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "shared"}
BROAD = {"Exception", "BaseException"}
MAY_CATCH_EVERYTHING = {
    "libs/bus/loop.py",  # whatever happened becomes a retry or a dead letter
    "services/scheduler/writer.py",  # a defect goes to who met it, the rest of its batch goes on
    "services/inference/busdoor.py",  # a bug becomes an answer
    "services/inference/rpc.py",  # a servicer's bug becomes a status
    "services/inference/served.py",  # a model's thread goes on
    "services/inference/streams.py",  # the other requests of a stream are answered
    "services/inference/worker.py",  # whatever a user's code raised becomes the answer
}


def tracked(*endings: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in endings and path.is_file()]


def is_generated(path: Path) -> bool:
    return path.stem.endswith(("_pb2", "_pb2_grpc")) or path.suffix == ".pyi"


SOURCES = [path for path in tracked(".py") if not is_generated(path)]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def handlers_of_errors() -> Iterator[tuple[Path, ast.ExceptHandler]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                yield path, node


def test_files_hold_one_idea() -> None:
    long = {name_of(p): n for p in SOURCES if (n := p.read_text().count("\n")) > FILE_LINES_MAX}
    assert not long


def test_functions_fit_a_screen() -> None:
    long = {
        f"{name_of(path)}:{one.lineno} {one.name}": one.end_lineno - one.lineno + 1
        for path, tree in TREES.items()
        for one in functions(tree)
        if one.end_lineno is not None and one.end_lineno - one.lineno + 1 > FUNCTION_LINES_MAX
    }
    assert not long


def test_only_the_bus_loop_catches_everything() -> None:
    broad = {
        f"{name_of(path)}:{one.lineno}"
        for path, one in handlers_of_errors()
        if (one.type is None or (isinstance(one.type, ast.Name) and one.type.id in BROAD))
        and name_of(path) not in MAY_CATCH_EVERYTHING
    }
    assert not broad


def test_no_error_is_swallowed() -> None:
    swallowed = {
        f"{name_of(path)}:{one.lineno}"
        for path, one in handlers_of_errors()
        if all(isinstance(statement, ast.Pass) for statement in one.body)
    }
    assert not swallowed


def test_nothing_is_mocked_or_left_to_do() -> None:
    """A test may lower a limit (`monkeypatch.setattr(server, "BODY_BYTES_MAX", 10)`), no more."""
    forbidden = re.compile(
        r"unittest\.mock|Magic" + r"Mock|\bTO" + r"DO\b|\bFIX" + r"ME\b|NotImplemented" + r"Error"
        r"|monkeypatch\.setattr\((?!.*\b[A-Z_]+\")"
    )
    found = {
        f"{name_of(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    }
    assert not found


def test_tests_do_not_sleep() -> None:
    """`asyncio.sleep(0)` only yields; anything longer is a guess at how fast the machine is."""
    sleeping = re.compile(r"\b(time|asyncio)\.sleep\((?!0\))")
    found = {
        f"{name_of(path)}:{number}"
        for path in SOURCES
        if "/tests/" in f"/{name_of(path)}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if sleeping.search(line)
    }
    assert not found


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_the_same_rooms(service: str) -> None:
    folder = ROOT / "services" / service
    names = {path.name for path in folder.glob("*.py")}
    assert names >= EVERY_SERVICE_HAS
    below = {p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert below == {"tests"}


@pytest.mark.parametrize("service", SERVICES)
def test_the_domain_never_awaits(service: str) -> None:
    tree = ast.parse((ROOT / "services" / service / "domain.py").read_text())
    waiting = [
        node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.Await)
    ]
    assert not waiting


@pytest.mark.parametrize("service", SERVICES)
def test_handlers_end_in_their_table(service: str) -> None:
    last = ast.parse((ROOT / "services" / service / "handlers.py").read_text()).body[-1]
    assert isinstance(last, ast.AnnAssign | ast.Assign)
    target = last.target if isinstance(last, ast.AnnAssign) else last.targets[0]
    assert isinstance(target, ast.Name)
    assert target.id == "HANDLERS"


def test_nothing_is_a_grab_bag() -> None:
    assert not [name_of(p) for p in SOURCES if GRAB_BAGS & set(p.with_suffix("").parts[-2:])]


def test_text_names_no_place_of_one_machine() -> None:
    """No absolute folder of a machine, no package registry: it works wherever it is cloned."""
    machine = re.compile("/wo" + r"rk/|/ro" + r"ot/|/opt/wh" + r"eels|py" + r"pi\.org")
    texts = tracked(".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ".json", ".proto")
    found = [
        name_of(path) for path in [*texts, ROOT / "Makefile"] if machine.search(path.read_text())
    ]
    assert not found


def test_no_rule_is_switched_off_without_a_reason() -> None:
    silent = re.compile(r"# noqa(?!: [A-Z]+[0-9]+(, [A-Z]+[0-9]+)* - )|# type: ignore(?!\[)")
    found = {
        f"{name_of(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if silent.search(line) and path != Path(__file__)
    }
    assert not found
