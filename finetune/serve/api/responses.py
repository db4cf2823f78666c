"""/v1/responses: an answer as a list of items, thinking and calls among them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request

from finetune.serve.answer import Piece
from finetune.serve.api.chat import call_id, logprob
from finetune.serve.api.errors import RESPONSES
from finetune.serve.api.responses_schema import LOGPROBS, ResponseRequest
from finetune.serve.api.stream import STREAMED, EventStream, event, unless_gone
from finetune.serve.service import Answer, Service

router = APIRouter()

Event = dict[str, Any]


@router.post("/v1/responses", responses={**RESPONSES, **STREAMED})
async def respond(body: ResponseRequest, request: Request) -> Any:
    """Answer with items: reasoning, a message, calls of functions. Nothing is stored."""
    service: Service = request.app.state.service
    (answer,) = await service.ask(body.model, body.conversation(), body.asked())
    builder = Builder(body, service)
    if body.stream:
        return EventStream(_events(answer, builder), [answer])
    try:
        return await unless_gone(_whole(answer, builder), request.receive)
    finally:
        answer.close()


async def _whole(answer: Answer, builder: Builder) -> dict[str, Any]:
    async for piece in answer.pieces():
        for _ in builder.add(piece):
            pass
    for _ in builder.end(answer):
        pass
    return builder.response


async def _events(answer: Answer, builder: Builder) -> AsyncIterator[bytes]:
    number = 0

    def numbered(events: Iterator[Event]) -> Iterator[bytes]:
        nonlocal number
        for data in events:
            yield event({**data, "sequence_number": number}, name=data["type"])
            number += 1

    for data in numbered(builder.begin()):
        yield data
    async for piece in answer.pieces():
        for data in numbered(builder.add(piece)):
            yield data
    for data in numbered(builder.end(answer)):
        yield data


class Builder:
    """Puts pieces together to a response, telling of each change as OpenAI's events do."""

    def __init__(self, body: ResponseRequest, service: Service) -> None:
        self._service = service
        self._logprobs = LOGPROBS in body.include
        self._open: dict[str, Any] | None = None
        self._kind: str | None = None
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": body.model,
            "output": [],
            "usage": None,
            "previous_response_id": None,
            **body.model_dump(exclude={"model", "input", "include", "stream"}, by_alias=True),
        }

    def begin(self) -> Iterator[Event]:
        yield {"type": "response.created", "response": self.response}
        yield {"type": "response.in_progress", "response": self.response}

    def add(self, piece: Piece) -> Iterator[Event]:
        """What a piece changes."""
        kind = "call" if piece.kind == "arguments" else piece.kind
        if self._kind != kind or piece.kind == "call":
            yield from self._close("completed")
            yield from self._begin_item(kind, piece.text)
        if piece.kind == "call":
            return
        assert self._open is not None
        if piece.kind == "arguments":
            self._open["arguments"] += piece.text
            yield self._about("response.function_call_arguments.delta", delta=piece.text)
            return
        part = self._open["content"][0]
        part["text"] += piece.text
        place: dict[str, Any] = {"content_index": 0, "delta": piece.text}
        if piece.kind == "content":
            scored = [logprob(self._service, token).model_dump() for token in piece.tokens]
            part["logprobs"] += scored
            place["logprobs"] = scored
        yield self._about(f"response.{_PART[piece.kind]}.delta", **place)

    def end(self, answer: Answer) -> Iterator[Event]:
        """The last item's end and the response's."""
        cut = answer.finish == "length"
        yield from self._close("incomplete" if cut else "completed")
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = {
            "input_tokens": len(answer.prompt),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": len(answer.prompt) + answer.tokens,
        }
        yield {"type": f"response.{self.response['status']}", "response": self.response}

    def _begin_item(self, kind: str, name: str) -> Iterator[Event]:
        self._kind, self._open = kind, _new_item(kind, name)
        self.response["output"].append(self._open)
        yield self._about("response.output_item.added", item=self._open)
        if kind != "call":
            part: dict[str, Any] = {"type": _PART[kind], "text": ""}
            if kind == "content":
                part |= {"annotations": [], "logprobs": []}
            self._open["content"].append(part)
            yield self._about("response.content_part.added", content_index=0, part=part)

    def _close(self, status: str) -> Iterator[Event]:
        item, kind = self._open, self._kind
        if item is None or kind is None:
            return
        item["status"] = status
        if kind == "call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._about("response.function_call_arguments.done", **done)
        else:
            part = item["content"][0]
            scored = {"logprobs": part["logprobs"]} if kind == "content" else {}
            text = {"content_index": 0, "text": part["text"], **scored}
            yield self._about(f"response.{_PART[kind]}.done", **text)
            yield self._about("response.content_part.done", content_index=0, part=part)
        yield self._about("response.output_item.done", item=item)
        self._open = self._kind = None

    def _about(self, type_: str, **what: Any) -> Event:
        """An event about the open item; those about the item as a whole hold it, the others name it."""
        assert self._open is not None
        name = {} if "item" in what else {"item_id": self._open["id"]}
        return {"type": type_, "output_index": len(self.response["output"]) - 1, **name, **what}


_PART = {"reasoning": "reasoning_text", "content": "output_text"}


def _new_item(kind: str, name: str) -> dict[str, Any]:
    unique = uuid.uuid4().hex
    if kind == "call":
        call = {"call_id": call_id(), "name": name, "arguments": ""}
        return {"type": "function_call", "id": f"fc_{unique}", "status": "in_progress", **call}
    if kind == "reasoning":
        return {
            "type": "reasoning",
            "id": f"rs_{unique}",
            "status": "in_progress",
            "summary": [],
            "content": [],
        }
    return {
        "type": "message", "id": f"msg_{unique}", "status": "in_progress", "role": "assistant", "content": []
    }  # fmt: skip
