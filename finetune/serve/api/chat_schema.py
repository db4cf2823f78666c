"""Requests and answers of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.chat import Conversation, read_conversation
from finetune.serve.api.schema import (
    Effort,
    MaxTokens,
    NoPenalty,
    NotStored,
    ObjectFormat,
    One,
    Seed,
    Stops,
    StreamOptions,
    Strict,
    Temperature,
    TextFormat,
    ToolChoice,
    TopLogprobs,
    TopP,
    describe_format,
    instruct,
)
from finetune.serve.service import Asked


class NamedSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    # Enforced whatever is asked for.
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def schema_asked(self) -> dict[str, Any]:
        return self.json_schema.schema_

    def told(self) -> str:
        named = self.json_schema
        return describe_format(named.name, named.description, named.schema_)


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Literal[False], Field(description="Arguments are not constrained.")] = False


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChatMessage(BaseModel):
    """A message as OpenAI's API has it; `reasoning_content` is what the assistant thought.

    Further keys, which clients send back as they got them (`refusal`, `annotations`), say nothing.
    """

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Strict):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Effort = "medium"
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] = (
        TextFormat(type="text")
    )
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    stop: Stops = Field(default_factory=list)
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: One = 1
    frequency_penalty: NoPenalty = 0.0
    presence_penalty: NoPenalty = 0.0
    store: NotStored = False
    user: Annotated[str | None, Field(description="Names the caller; changes nothing.")] = None

    @model_validator(mode="after")
    def _go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        return self

    def conversation(self) -> Conversation:
        """Raises FinetuneError for messages that make no conversation."""
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        row = {
            "messages": instruct(messages, self.response_format.told()),
            "tools": tools if self.tool_choice == "auto" else [],
            "reasoning_effort": self.reasoning_effort,
        }
        return read_conversation(row)

    def asked(self) -> Asked:
        return Asked(
            max_tokens=self.max_tokens or self.max_completion_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stops=tuple(self.stop),
            schema=self.response_format.schema_asked(),
        )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TokenDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: TokenDetails


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
