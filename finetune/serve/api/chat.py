"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
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
from finetune.serve.api.stream import STREAMED, EventStream, close, event, merged, unless_gone
from finetune.serve.service import Answer, Service, count_tokens

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**RESPONSES, **STREAMED})
async def complete_chat(body: ChatRequest, request: Request) -> Any:
    """Answer a conversation; what the model thought stands apart, as `reasoning_content`."""
    service: Service = request.app.state.service
    answers = await service.ask(body.model, body.conversation(), body.asked())
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": service.fingerprint(body.model),
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(answers, head, service, usage=usage, logprobs=body.logprobs), answers)
    try:
        drafts = await unless_gone(_drafts(answers), request.receive)
    finally:
        close(answers)
    choices = [
        Choice(
            index=index,
            message=draft.message(),
            logprobs=Logprobs(content=[logprob(service, token) for token in draft.tokens])
            if body.logprobs
            else None,
            finish_reason=answer.finish,
        )
        for index, (answer, draft) in enumerate(zip(answers, drafts, strict=True))
    ]
    return ChatCompletion(**head, choices=choices, usage=usage_of(answers))


@dataclass
class _Draft:
    """An answer as far as it is known."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        if piece.kind == "reasoning":
            self.reasoning += piece.text
        elif piece.kind == "content":
            self.content += piece.text
            self.tokens += piece.tokens
        elif piece.kind == "call":
            self.calls.append(ToolCall(id=call_id(), function=CalledFunction(name=piece.text, arguments="")))
        else:
            self.calls[-1].function.arguments += piece.text

    def message(self) -> AnswerMessage:
        return AnswerMessage(
            content=self.content or (None if self.calls else ""),
            reasoning_content=self.reasoning or None,
            tool_calls=self.calls or None,
        )


async def _drafts(answers: Sequence[Answer]) -> list[_Draft]:
    drafts = [_Draft() for _ in answers]
    async for index, piece in merged(answers):
        if piece is not None:
            drafts[index].add(piece)
    return drafts


async def _chunks(
    answers: Sequence[Answer], head: dict[str, Any], service: Service, *, usage: bool, logprobs: bool
) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, scored: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": scored, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    calls = [0] * len(answers)
    async for index, piece in merged(answers):
        if piece is None:
            yield chunk(index, {}, answers[index].finish)
            continue
        scored = None
        if logprobs and piece.kind == "content":
            scored = {"content": [logprob(service, token).model_dump() for token in piece.tokens]}
        calls[index] += piece.kind == "call"
        yield chunk(index, _delta(piece, calls[index] - 1), scored=scored)
    if usage:
        yield event({**head, "choices": [], "usage": usage_of(answers).model_dump()})
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


def usage_of(answers: Sequence[Answer]) -> Usage:
    prompt, made = count_tokens(answers)
    reasoning = sum(answer.reasoning_tokens for answer in answers)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=made,
        total_tokens=prompt + made,
        completion_tokens_details=TokenDetails(reasoning_tokens=reasoning),
    )


def logprob(service: Service, token: ScoredToken) -> TokenLogprob:
    top = [TopLogprob(**_named(service, id_, value)) for id_, value in token.scored.top]
    return TokenLogprob(**_named(service, token.id, token.scored.logprob), top_logprobs=top)


def _named(service: Service, token: int, value: float) -> dict[str, Any]:
    raw = service.encoder.token_bytes(token)
    return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}
