"""Component tables for tests of the supervisor, which run it in a process of its own."""

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
