"""/v1/completions: text as it is, without a conversation around it."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from finetune.chat import HarmonyEncoder, Segment
from finetune.chat.encode import HARMONY_TOKENS
from finetune.errors import FinetuneError
from finetune.serve.answer import ScoredToken
from finetune.serve.api.errors import RESPONSES
from finetune.serve.api.schema import (
    Drawn,
    MaxTokens,
    StreamOptions,
)
from finetune.serve.api.stream import STREAMED, EventStream, close, event, merged, unless_gone
from finetune.serve.service import Answer, Asked, Service, count_tokens

router = APIRouter()

_SPECIAL = re.compile("(" + "|".join(map(re.escape, HARMONY_TOKENS)) + ")")
MAX_PROMPTS = 64
Ids = list[Annotated[int, Field(ge=0)]]


class CompletionRequest(Drawn):
    model: str
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(max_length=MAX_PROMPTS)]
    max_tokens: MaxTokens = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: Annotated[Literal[1], Field(description="Nothing is written and left out.")] = 1
    echo: Annotated[Literal[False], Field(description="The prompt is not repeated.")] = False
    user: Annotated[str | None, Field(description="Names the caller; changes nothing.")] = None

    @model_validator(mode="after")
    def _go_together(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def prompts(self, encoder: HarmonyEncoder) -> list[list[int]]:
        """Token ids of each prompt; harmony's special tokens are read where a text spells them.

        Raises:
            FinetuneError: a prompt is empty, or holds an id that is no token.
        """
        single = isinstance(self.prompt, str) or any(isinstance(item, int) for item in self.prompt)
        given: list[Any] = [self.prompt] if single else list(self.prompt)
        made = [raw_ids(encoder, text) if isinstance(text, str) else list(text) for text in given]
        if not made or not all(made):
            raise FinetuneError("the prompt is empty")
        last = encoder.tokenizer.get_vocab_size() - 1
        worst = max(max(ids) for ids in made)
        if worst > last:
            raise FinetuneError(f"the prompt holds the token {worst}, and the last one there is is {last}")
        return made

    def asked(self) -> Asked:
        return Asked(self.sampling(self.max_tokens, self.logprobs), self.n, tuple(self.stop))


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str


def raw_ids(encoder: HarmonyEncoder, text: str) -> list[int]:
    """Ids of a text in which special tokens may be spelled."""
    parts = [part for part in _SPECIAL.split(text) if part]
    return encoder.encode([Segment(part, part in HARMONY_TOKENS, False) for part in parts]).ids


@router.post("/v1/completions", response_model=Completion, responses={**RESPONSES, **STREAMED})
async def complete_text(body: CompletionRequest, request: Request) -> Any:
    """Go on from a text, or from several, each in a choice of its own."""
    service: Service = request.app.state.service
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": service.fingerprint(service.model(body.model)),
    }
    prompts = await asyncio.to_thread(body.prompts, service.encoder)
    answers = service.go_on(body.model, prompts, body.asked())
    if body.stream:
        return EventStream(_chunks(answers, head, service, body), answers)
    try:
        choices = await unless_gone(_choices(answers, service, body), request.receive)
    finally:
        close(answers)
    return Completion(**head, choices=choices, usage=_usage(answers))


async def _choices(
    answers: list[Answer], service: Service, body: CompletionRequest
) -> list[CompletionChoice]:
    scored = body.logprobs is not None
    texts = [""] * len(answers)
    tokens: list[list[ScoredToken]] = [[] for _ in answers]
    async for index, piece in merged(answers):
        if piece:
            texts[index] += piece.text
            tokens[index] += piece.tokens
    return [
        CompletionChoice(
            index=index,
            text=texts[index],
            logprobs=_logprobs(service, tokens[index]) if scored else None,
            finish_reason=_finish(answer),
        )
        for index, answer in enumerate(answers)
    ]


async def _chunks(
    answers: list[Answer], head: dict[str, Any], service: Service, body: CompletionRequest
) -> AsyncIterator[bytes]:
    head = {**head, "object": "text_completion"}
    async for index, piece in merged(answers):
        scored = None
        if piece and body.logprobs is not None:
            scored = _logprobs(service, list(piece.tokens)).model_dump()
        finish = None if piece else _finish(answers[index])
        text = piece.text if piece else ""
        choice = {"index": index, "text": text, "logprobs": scored, "finish_reason": finish}
        yield event({**head, "choices": [choice]})
    if body.stream_options and body.stream_options.include_usage:
        yield event({**head, "choices": [], "usage": _usage(answers).model_dump()})
    yield b"data: [DONE]\n\n"


def _finish(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.finish == "length" else "stop"


def _usage(answers: list[Answer]) -> CompletionUsage:
    prompt, made = count_tokens(answers)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)


def _logprobs(service: Service, tokens: list[ScoredToken]) -> CompletionLogprobs:
    def name(token: int) -> str:
        return service.encoder.token_bytes(token).decode(errors="replace")

    return CompletionLogprobs(
        tokens=[name(token.id) for token in tokens],
        token_logprobs=[token.scored.logprob for token in tokens],
        top_logprobs=[{name(id_): value for id_, value in token.scored.top} for token in tokens],
        text_offset=[token.start for token in tokens],
    )
