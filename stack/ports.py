"""Loopback ports: finding free ones, and finding out that one is taken."""

import contextlib
import socket

LOOPBACK = "127.0.0.1"


def free(count: int) -> list[int]:
    """So many different free ports; all are held until all are found."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind((LOOPBACK, 0))
        return [listener.getsockname()[1] for listener in listeners]


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with contextlib.closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
