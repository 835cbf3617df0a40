"""JSON on a command line."""

import json
import sys
from pathlib import Path
from typing import Any

import click


def parsed(text: str) -> Any:
    """JSON given as such, in @FILE, or on stdin."""
    try:
        if text == "-":
            return json.load(sys.stdin)
        return json.loads(Path(text[1:]).read_bytes() if text.startswith("@") else text)
    except OSError as error:
        raise click.BadParameter(f"{text[1:]}: {error.strerror}") from error
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
