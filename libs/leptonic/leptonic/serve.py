"""`leptonic serve PATH`: an inference server alone, without the rest of the platform."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from leptonic import launch

MODULE = "services.inference.serve"
MODES = click.Choice(["none", "explicit", "poll"])
OPTIONS = (
    click.option("--host", default="127.0.0.1", help="The address every door listens on."),
    click.option("--http-port", default=8000, help="Open Inference Protocol over HTTP; 0: any."),
    click.option("--grpc-port", default=8001, help="Open Inference Protocol over gRPC; 0: any."),
    click.option("--metrics-port", default=8002, help="Prometheus metrics; 0: any."),
    click.option(
        "--model-control-mode",
        type=MODES,
        default="none",
        help="Models are loaded at the start, by request, or whenever their files change.",
    ),
    click.option("--load-model", multiple=True, help="With explicit: at the start; * for all."),
    click.option("--poll-s", default=5.0, help="With poll: seconds between looks at the files."),
    click.option("--server-name", default="leptonic", help="The name in the server's metadata."),
    click.option("--otlp-endpoint", default="", help="host:port for OTLP/gRPC; empty: none."),
    click.option("--token", multiple=True, help="What callers must send as a bearer token."),
)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Those of the server; what they mean is said once, here and in docs/cli.md."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def line_of(path: Path, said: Mapping[str, Any]) -> list[str]:
    """The command that serves. Raises `Error` where only the client is installed."""
    launch.platform_root()
    return [sys.executable, "-m", MODULE, str(path), *words_of(said)]


def words_of(said: Mapping[str, Any]) -> Iterator[str]:
    """`{"http_port": 8000, "token": ("a", "b")}` as a command line has it."""
    for name, value in said.items():
        for one in value if isinstance(value, tuple) else (value,):
            yield f"--{name.replace('_', '-')}={one}"


def in_foreground(path: Path, said: Mapping[str, Any]) -> None:
    """Becomes the server: Ctrl-C and SIGTERM go straight to it."""
    line = line_of(path, said)
    os.execve(line[0], line, launch.environment())  # noqa: S606 - becoming it is the point
