"""Requests of /v1/responses, and the conversation they make."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.chat import Conversation, read_conversation
from finetune.errors import FinetuneError
from finetune.serve.api.schema import (
    Effort,
    FunctionTool,
    MaxTokens,
    NotStored,
    ObjectFormat,
    Strict,
    Temperature,
    TextFormat,
    TopLogprobs,
    TopP,
    describe_format,
    form_of,
    instruct,
)
from finetune.serve.sampling import Sampling
from finetune.serve.service import Asked

LOGPROBS = "message.output_text.logprobs"


class SchemaFormat(Strict):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    # Enforced whatever is asked for.
    strict: bool | None = None

    def schema_asked(self) -> dict[str, Any]:
        return self.schema_

    def told(self) -> str:
        return describe_format(self.name, self.description, self.schema_)


class TextSetting(Strict):
    format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] = TextFormat(
        type="text"
    )


class Reasoning(Strict):
    effort: Effort = "medium"


class Tool(FunctionTool):
    type: Literal["function"]


class NamedTool(Strict):
    """The one tool to call."""

    type: Literal["function"]
    name: str


class ResponseRequest(Strict):
    model: str
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    reasoning: Reasoning = Reasoning()
    text: TextSetting = TextSetting()
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: TopLogprobs | None = None
    stream: bool = False
    truncation: Literal["disabled"] = "disabled"
    store: NotStored = False
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16, description="Comes back as it is.")
    user: Annotated[str | None, Field(description="Names the caller; changes nothing.")] = None

    @model_validator(mode="after")
    def _go_together(self) -> ResponseRequest:
        if self.top_logprobs is not None and LOGPROBS not in self.include:
            raise ValueError(f"top_logprobs needs {LOGPROBS!r} in include")
        return self

    def conversation(self) -> Conversation:
        """Raises FinetuneError for items that make no conversation."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = read_items(items)
        if self.instructions:
            messages = [{"role": "developer", "content": self.instructions}, *messages]
        tools = [tool.model_dump(exclude_none=True, exclude={"type", "strict"}) for tool in self.tools]
        row = {
            "messages": instruct(messages, self.text.format.told()),
            "tools": tools if self.tool_choice != "none" else [],
            "reasoning_effort": self.reasoning.effort,
        }
        return read_conversation(row)

    def asked(self) -> Asked:
        """Raises FinetuneError where a tool has to be called and is not there."""
        named = self.tool_choice.name if isinstance(self.tool_choice, NamedTool) else None
        sampling = Sampling(
            max_tokens=self.max_output_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_logprobs=(self.top_logprobs or 0) if LOGPROBS in self.include else None,
        )
        form = form_of(self.text.format.schema_asked(), self.tools, self.tool_choice, named)
        return Asked(sampling, form=form)


def read_items(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items of a response's input or output as messages of the chat API.

    Thinking goes to what the assistant does next; a call follows the assistant's words before it as their
    own. Raises FinetuneError for an item of a kind that cannot be shown to the model.
    """
    messages: list[dict[str, Any]] = []
    thinking: list[str] = []
    for number, item in enumerate(items, 1):
        kind = item.get("type", "message")
        if kind == "reasoning":
            thinking += _texts(item.get("content"), number)
            continue
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not (messages and messages[-1]["role"] == "assistant") or thinking:
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
            messages.append({"role": "tool", **output})
        else:
            raise FinetuneError(
                f"item {number} of the input is of type {kind!r}, which cannot be shown to the model"
            )
        if thinking and messages[-1]["role"] == "assistant":
            messages[-1]["thinking"] = "\n".join(thinking)
        thinking = []
    return messages


def _texts(parts: Any, number: int) -> list[str]:
    if not isinstance(parts, list):
        return []
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise FinetuneError(f"item {number} of the input has reasoning without text")
    return [str(text) for text in texts]
