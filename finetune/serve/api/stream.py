"""Answers that are sent as they are made, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from finetune.serve.api.errors import error_body, told

T = TypeVar("T")
# For the OpenAPI document: the other form of an answer.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; with stream: true, events."}
}


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client goes; raises ClientDisconnect then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `close` is called when they end, or when the client goes before."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(_telling(events), headers={"Cache-Control": "no-store"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self.stream_response(send), receive)
        except ClientDisconnect:
            pass
        finally:
            self._close()


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event, as the format of the WHATWG's HTML standard (section 9.2) has it."""
    head = f"event: {name}\n" if name else ""
    # Without spaces: there is an event for every token.
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def _telling(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`events`; an error after the first of them can only be told as one more."""
    try:
        async for data in events:
            yield data
    except Exception as error:
        status, message, code = told(error)
        yield event(error_body(status, message, code=code), name="error")
