"""Tokens over HTTP: what is not open needs `authorization: Bearer <token>`."""

import hmac
from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.inference.openapi import HEALTH

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
        if self.knows(Request(scope).headers.get("authorization", "")):
            await self.app(scope, receive, send)
            return
        problem = {"error": "send the header 'authorization: Bearer <token>'"}
        headers = {"WWW-Authenticate": "Bearer"}
        await JSONResponse(problem, UNAUTHORIZED, headers)(scope, receive, send)

    def knows(self, header: str) -> bool:
        """In constant time for each token, and all of them are looked at."""
        scheme, _, token = header.partition(" ")
        given = token.strip().encode()
        matching = [hmac.compare_digest(given, known) for known in self.tokens]
        return scheme.lower() == "bearer" and any(matching)
