"""Component tables for tests of the supervisor, which run it in a process of its own."""

import contextlib
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from stack.process import Program
from stack.state import Secrets


def leaving_strays(folder: Path, _: Mapping[str, int], __: Secrets) -> list[Program]:
    """`mother` has a child in a session of its own, which outlives it; `needy` needs it."""
    stray = folder / "stray"

    async def has_child() -> bool:
        return stray.exists() and stray.read_text().endswith("\n")

    script = f"setsid sh -c 'echo $$ > {stray}; exec sleep 1000' & exec sleep 1000"
    return [
        Program(name="mother", command=("sh", "-c", script), ready=has_child),
        Program(name="needy", command=("sleep", "1000"), ready=has_child, after=("mother",)),
    ]


def failing(folder: Path, _: Mapping[str, int], __: Secrets) -> list[Program]:
    """Fails three times before it stays."""
    tries = folder / "tries"

    async def stays() -> bool:
        return tries.exists() and len(tries.read_text()) > 3

    script = f"printf x >> {tries}; [ $(wc -c < {tries}) -gt 3 ] && exec sleep 1000; exit 7"
    return [Program(name="failing", command=("sh", "-c", script), ready=stays)]


SERVER = """
import pathlib, socket, sys
port, broken = int(sys.argv[1]), pathlib.Path(sys.argv[2])
if broken.exists():
    sys.exit("broken")
with socket.create_server(("127.0.0.1", port), reuse_port=True) as listener:
    while True:
        listener.accept()[0].close()
"""


def replaceable(folder: Path, port: Mapping[str, int], _: Secrets) -> list[Program]:
    """`door` shares its port; while the file `broken` is there, another one of it ends at once."""
    door = port["ingest_http"]

    async def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", door), 1):
            return True
        return False

    command = (sys.executable, "-c", SERVER, str(door), str(folder / "broken"))
    return [Program(name="door", command=command, ready=listens, doors=(door,))]
