"""`leptonic serve` becomes the server, with the options it was given."""

import sys
from pathlib import Path

import click
from leptonic import serve
from leptonic.cli import main


def test_every_option_reaches_the_server() -> None:
    said = {"http_port": 0, "load_model": ("a", "b"), "server_name": "mine", "token": ()}
    line = serve.line_of(Path("models"), said)
    assert line == [
        sys.executable, "-m", serve.MODULE, "models",
        "--http-port=0", "--load-model=a", "--load-model=b", "--server-name=mine",
    ]  # fmt: skip


def test_the_server_takes_the_options_of_the_command() -> None:
    from services.inference.serve import parser

    command = main.commands["serve"]
    options = {max(p.opts, key=len): p for p in command.params if isinstance(p, click.Option)}
    known = parser().parse_args(["models"])
    for name in set(options) - {"--json", "--project", "--data-dir", "--stack"}:
        default = options[name].default
        field = name.removeprefix("--").replace("-", "_")
        assert getattr(known, field) == (default if not options[name].multiple else []), name
