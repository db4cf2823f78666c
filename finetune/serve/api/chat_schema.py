"""Requests and answers of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.chat import Conversation, read_conversation
from finetune.serve.api.schema import (
    Drawn,
    Effort,
    FunctionTool,
    MaxTokens,
    NotStored,
    ObjectFormat,
    StreamOptions,
    Strict,
    TextFormat,
    TopLogprobs,
    describe_format,
    form_of,
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


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool


class Named(Strict):
    name: str


class NamedTool(Strict):
    """The one tool to call."""

    type: Literal["function"]
    function: Named


class ChatMessage(BaseModel):
    """A message as OpenAI's API has it; `reasoning_content` is what the assistant thought.

    Further keys, which clients send back as they got them (`refusal`, `annotations`), say nothing.
    """

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Drawn):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Effort = "medium"
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] = (
        TextFormat(type="text")
    )
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
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
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]
        row = {
            "messages": instruct(messages, self.response_format.told()),
            "tools": tools if self.tool_choice != "none" else [],
            "reasoning_effort": self.reasoning_effort,
        }
        return read_conversation(row)

    def asked(self) -> Asked:
        """Raises FinetuneError where a tool has to be called and is not there."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        tools = [tool.function for tool in self.tools]
        return Asked(
            self.sampling(
                self.max_tokens or self.max_completion_tokens,
                (self.top_logprobs or 0) if self.logprobs else None,
            ),
            answers=self.n,
            stops=tuple(self.stop),
            form=form_of(self.response_format.schema_asked(), tools, self.tool_choice, named),
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
