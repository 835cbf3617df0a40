"""The doors of a service: what it refuses, and with which status.

A servicer's method raises `Refused`; gRPC callers get the status, HTTP callers the same as JSON.
"""

import grpc

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
TEXT_CHARACTERS_MAX = 1000
"""Of an error: it travels in a header, and what a client sent may be quoted in it. A megabyte there
ends the client's connection."""


class Refused(Exception):
    """A request that is answered with an error; `field` names what was wrong where it applies."""

    code = grpc.StatusCode.UNKNOWN

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(shortened(f"{field}: {problem}" if field else problem))
        self.field = field
        self.problem = problem

    @property
    def http_status(self) -> int:
        return HTTP_STATUS.get(self.code, 500)


def shortened(text: str) -> str:
    if len(text) <= TEXT_CHARACTERS_MAX:
        return text
    return f"{text[:TEXT_CHARACTERS_MAX]}... ({len(text)} characters)"


class Invalid(Refused):
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(Refused):
    code = grpc.StatusCode.NOT_FOUND


class Conflict(Refused):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Exhausted(Refused):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(Refused):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Internal(Refused):
    code = grpc.StatusCode.INTERNAL


class Unavailable(Refused):
    code = grpc.StatusCode.UNAVAILABLE
