"""Answers that are sent as they are made, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from finetune.serve.answer import Piece
from finetune.serve.api.errors import error_body, told
from finetune.serve.service import Answer

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


def close(answers: Sequence[Answer]) -> None:
    """Stop the engine's work on what is left of them."""
    for answer in answers:
        answer.close()


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece | None]]:
    """Pieces of all answers as they come, each with its answer's number; None is the end of one."""
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        yield 0, None
        return
    arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def listen(index: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                arrived.put_nowait((index, piece))
            arrived.put_nowait((index, None))
        except Exception as error:
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(listen(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            left -= found is None
            yield index, found
    finally:
        for task in tasks:
            task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of `answers`, which are closed when they end, or when the client goes before."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answers: Sequence[Answer]) -> None:
        super().__init__(_telling(events), headers={"Cache-Control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self.stream_response(send), receive)
        except ClientDisconnect:
            pass
        finally:
            close(self._answers)


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
