"""Tokens over HTTP: what is not open needs `authorization: Bearer <token>`."""

from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.inference.openapi import HEALTH
from services.inference.rpcs import is_token

OPEN = (HEALTH, "/health/", "/metrics", "/openapi.json")
"""Paths that begin so need none."""
UNAUTHORIZED = 401


class Guard:
    """In front of an application. No tokens: nobody is asked."""

    def __init__(self, app: ASGIApp, tokens: Collection[str]) -> None:
        self.app = app
        self.tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.tokens or scope["path"].startswith(OPEN):
            await self.app(scope, receive, send)
            return
        if is_token(dict(scope["headers"]).get(b"authorization", b""), self.tokens):
            await self.app(scope, receive, send)
            return
        problem = {"error": "send the header 'authorization: Bearer <token>'"}
        headers = {"WWW-Authenticate": "Bearer"}
        await JSONResponse(problem, UNAUTHORIZED, headers)(scope, receive, send)
