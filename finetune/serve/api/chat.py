"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from finetune.serve.answer import Piece, ScoredToken
from finetune.serve.api.chat_schema import (
    AnswerMessage,
    CalledFunction,
    ChatCompletion,
    ChatRequest,
    Choice,
    Logprobs,
    TokenDetails,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from finetune.serve.api.errors import RESPONSES
from finetune.serve.api.stream import STREAMED, EventStream, event, unless_gone
from finetune.serve.service import Answer, Service

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**RESPONSES, **STREAMED})
async def complete_chat(body: ChatRequest, request: Request) -> Any:
    """Answer a conversation; what the model thought stands apart, as `reasoning_content`."""
    service: Service = request.app.state.service
    answer = await service.ask(body.model, body.conversation(), body.asked())
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": service.fingerprint(body.model),
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(answer, head, service, usage=usage, logprobs=body.logprobs), answer.close)
    try:
        return await unless_gone(_whole(answer, head, service, logprobs=body.logprobs), request.receive)
    finally:
        answer.close()


async def _whole(answer: Answer, head: dict[str, Any], service: Service, *, logprobs: bool) -> ChatCompletion:
    reasoning, content = "", ""
    calls: list[ToolCall] = []
    tokens: list[ScoredToken] = []
    async for piece in answer.pieces():
        if piece.kind == "reasoning":
            reasoning += piece.text
        elif piece.kind == "content":
            content += piece.text
            tokens += piece.tokens
        elif piece.kind == "call":
            calls.append(ToolCall(id=call_id(), function=CalledFunction(name=piece.text, arguments="")))
        else:
            calls[-1].function.arguments += piece.text
    message = AnswerMessage(
        content=content or (None if calls else ""),
        reasoning_content=reasoning or None,
        tool_calls=calls or None,
    )
    choice = Choice(
        message=message,
        logprobs=Logprobs(content=[logprob(service, token) for token in tokens]) if logprobs else None,
        finish_reason=answer.finish,
    )
    return ChatCompletion(**head, choices=[choice], usage=usage_of(answer))


async def _chunks(
    answer: Answer, head: dict[str, Any], service: Service, *, usage: bool, logprobs: bool
) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}

    def chunk(delta: dict[str, Any], finish: str | None = None, scored: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": scored, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    calls = 0
    async for piece in answer.pieces():
        scored = None
        if logprobs and piece.kind == "content":
            scored = {"content": [logprob(service, token).model_dump() for token in piece.tokens]}
        calls += piece.kind == "call"
        yield chunk(_delta(piece, calls - 1), scored=scored)
    yield chunk({}, answer.finish)
    if usage:
        yield event({**head, "choices": [], "usage": usage_of(answer).model_dump()})
    yield b"data: [DONE]\n\n"


def _delta(piece: Piece, call: int) -> dict[str, Any]:
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "call":
        function = {"name": piece.text, "arguments": ""}
        return {"tool_calls": [{"index": call, "id": call_id(), "type": "function", "function": function}]}
    return {"tool_calls": [{"index": call, "function": {"arguments": piece.text}}]}


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def usage_of(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.tokens,
        total_tokens=answer.prompt_tokens + answer.tokens,
        completion_tokens_details=TokenDetails(reasoning_tokens=answer.reasoning_tokens),
    )


def logprob(service: Service, token: ScoredToken) -> TokenLogprob:
    top = [TopLogprob(**_named(service, id_, value)) for id_, value in token.scored.top]
    return TokenLogprob(**_named(service, token.id, token.scored.logprob), top_logprobs=top)


def _named(service: Service, token: int, value: float) -> dict[str, Any]:
    raw = service.encoder.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}
