"""What is checked before a request is read: its size, and the key."""

from __future__ import annotations

import secrets

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serve.api.errors import error_response
from finetune.serve.metrics import Metrics

# A context of 131,072 tokens is about 600 kB of text; this leaves room for JSON that escapes every character.
BODY_LIMIT = 4 << 20
CLIENT_GONE = 499  # as nginx counts them; nobody is told
TOO_LARGE = f"the body is larger than {BODY_LIMIT >> 20} MiB"


class Guard:
    """ASGI middleware: 413 for a body over the limit, 401 under /v1 without the key; counts requests."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, metrics: Metrics) -> None:
        self.app = app
        self._key = api_key.encode() if api_key else None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500
        read = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > BODY_LIMIT:
                raise HTTPException(413, TOO_LARGE)
            return message

        headers = dict(scope["headers"])
        try:
            if not self._has_key(scope["path"], headers.get(b"authorization", b"")):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                await error_response(401, message, code="invalid_api_key")(scope, receive, counted)
            elif _announced(headers) > BODY_LIMIT:
                await error_response(413, TOO_LARGE)(scope, receive, counted)
            else:
                await self.app(scope, limited, counted)
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            # The route's own path: what clients make up must not become names of counters.
            route = scope.get("route")
            self._metrics.requested(getattr(route, "path", "other"), status)

    def _has_key(self, path: str, authorization: bytes) -> bool:
        if self._key is None or not path.startswith("/v1/"):
            return True
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key)


def _announced(headers: dict[bytes, bytes]) -> int:
    length = headers.get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0
