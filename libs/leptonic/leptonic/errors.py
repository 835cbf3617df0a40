"""What a verb raises."""


class Error(Exception):
    """A request that failed, with the server's own words.

    `field` names what was wrong in the request, where the server said so; `code` is the gRPC
    status name, and `NOT_RUNNING` or `UNREACHABLE` where no server answered.
    """

    def __init__(self, message: str, *, field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.code = code
