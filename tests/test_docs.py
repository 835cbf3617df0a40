"""Every setting, command, option, event, stream and dead letter is documented, and nothing else."""

import importlib
import re
from pathlib import Path

import click
import pytest
from leptonic.cli import main

from libs.bus import STREAMS
from libs.contracts.events import EVENTS
from libs.settings import SERVICES, Common, variables

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CLIENT_VARIABLES = {"LEPTONIC_ENDPOINTS": "", "LEPTONIC_STACK": "", "LEPTONIC_TOKEN": ""}
ELSEWHERE = {"edge": "stack.edge", "agent": "services.scheduler.agents"}
COMMON_OPTIONS = {"--json", "--project", "--data-dir", "--stack"}


def rows(text: str) -> dict[str, list[str]]:
    """First cell in back-quotes -> the other cells of its row."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            first, *others = (cell.strip() for cell in line.strip("|").split("|"))
            found[first.strip("`")] = others
    return found


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next of its kind."""
    below = text.split(f"## {title}\n", 1)
    assert len(below) == 2, f"no section {title!r}"
    return below[1].split("\n## ", 1)[0]


def documented_settings() -> dict[str, str]:
    """Variable -> default, as docs/settings.md says."""
    found = rows((DOCS / "settings.md").read_text())
    return {name: default.strip("`") for name, (default, _) in found.items()}


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """Variable -> default, as the code says."""
    known = dict(CLIENT_VARIABLES)
    for service in (*SERVICES, *ELSEWHERE):
        module = ELSEWHERE.get(service, f"services.{service}.app")
        kind = importlib.import_module(module).Settings
        assert issubclass(kind, Common)
        known |= {name: str(field.default) for name, field in variables(kind, service).items()}
    return known


def test_every_setting_is_documented_with_its_default(settings: dict[str, str]) -> None:
    assert documented_settings() == settings


def options_of(command: click.Command) -> set[str]:
    return {max(p.opts, key=len) for p in command.params if isinstance(p, click.Option)}


def test_every_command_and_option_is_documented() -> None:
    text = (DOCS / "cli.md").read_text()
    titles = re.findall(r"^## (leptonic .+)$", text, re.MULTILINE)
    assert {title.split()[1] for title in titles} == set(main.commands)
    for title in titles:
        command = main.commands[title.split()[1]]
        assert options_of(command) >= COMMON_OPTIONS
        assert set(rows(section(text, title))) == options_of(command) - COMMON_OPTIONS, title
        arguments = [p.human_readable_name for p in command.params if isinstance(p, click.Argument)]
        assert [word.strip("[]") for word in title.split()[2:]] == arguments


def test_every_event_is_documented_with_its_subject() -> None:
    found = rows(section((DOCS / "events.md").read_text(), "Events"))
    subjects = {name: cells[0].strip("`") for name, cells in found.items()}
    known = {kind.__name__: f"events.<project>.{kind.entity}.{kind.verb}" for kind in EVENTS}
    assert subjects == known


def test_every_stream_is_documented_with_its_subjects() -> None:
    found = rows(section((DOCS / "events.md").read_text(), "Streams"))
    subjects = {name: cells[0].strip("`") for name, cells in found.items()}
    assert subjects == {stream.name: ", ".join(stream.subjects) for stream in STREAMS}


def test_every_header_of_a_dead_letter_is_documented() -> None:
    code = [*ROOT.glob("services/*/*.py"), *ROOT.glob("libs/bus/*.py")]
    used = {name for file in code for name in re.findall(r'"(Leptonic-[\w-]+)"', file.read_text())}
    found = rows(section((DOCS / "events.md").read_text(), "Dead letters"))
    assert {name for name in found if name.startswith("Leptonic-")} == used
