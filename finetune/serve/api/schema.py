"""What requests to all endpoints share. What is not here is refused: nothing is taken and then ignored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from finetune.errors import FinetuneError
from finetune.serve.constrain import OBJECT, Form, Schema
from finetune.serve.sampling import Sampling

MAX_STOPS = 4  # as OpenAI's API
# Answers to one request: they take the places of as many other requests.
MAX_ANSWERS = 16


class Strict(BaseModel):
    """Unknown parameters are refused; null is the same as leaving one out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _not_empty(stops: list[str]) -> list[str]:
    if not all(stops):
        raise ValueError("a stop string must not be empty")
    return stops


def _only(value: Any, says: str) -> AfterValidator:
    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(says)
        return given

    return AfterValidator(check)


# Parameters that clients send with their default, and that are known here by that alone.
NotStored = Annotated[bool, _only(False, "nothing is stored here; false is the only value")]
Stops = Annotated[
    list[str],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    AfterValidator(_not_empty),
    Field(max_length=MAX_STOPS),
]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
MaxTokens = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# By token id, which JSON has as text.
LogitBias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Effort = Literal["low", "medium", "high"]


class Drawn(Strict):
    """How many answers, and how their tokens are chosen: what chats and completions share."""

    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    seed: Annotated[Seed | None, Field(description="The first answer's; the next one's is one more.")] = None
    stop: Stops = Field(default_factory=list)
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: LogitBias = Field(default_factory=dict)

    def sampling(self, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
        return Sampling(
            max_tokens=max_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            top_logprobs=top_logprobs,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
        )


class FunctionTool(Strict):
    """A function; with `strict`, or where it has to be called, its arguments fit `parameters`."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


def form_of(
    final: Schema | None, tools: Sequence[FunctionTool], choice: object, named: str | None
) -> Form | None:
    """The form of an answer: `final` is the schema of the final message, `named` the one tool to call.

    `choice` is a request's `tool_choice`; None where the model may answer as it likes.

    Raises:
        FinetuneError: a tool has to be called, and there is none, or none of that name.
    """
    offered = [tool for tool in tools if choice != "none" and named in (None, tool.name)]
    must_call = choice == "required" or named is not None
    if must_call and not offered:
        raise FinetuneError(f"tool_choice asks for a call of {named or 'a tool'}, and there is no such tool")
    if final is None and not must_call and not any(tool.strict for tool in offered):
        return None
    calls = {
        tool.name.removeprefix("functions."): ((tool.strict or must_call) and tool.parameters) or OBJECT
        for tool in offered
    }
    return Form(final, calls, must_call)


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]

    def schema_asked(self) -> None:
        return None

    def told(self) -> str:
        return ""


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]

    def schema_asked(self) -> Schema:
        return OBJECT

    def told(self) -> str:
        return ""


def instruct(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """`messages` with `text` at the end of the instructions that they begin with."""
    if not text:
        return messages
    first, content = messages[0] if messages else {}, ""
    if first.get("role") in ("system", "developer"):
        if not isinstance(first.get("content"), str):
            raise FinetuneError("instructions have to be plain text where response_format is a schema")
        content, messages = f"{first['content']}\n\n", messages[1:]
    return [{"role": "developer", "content": content + text}, *messages]


def describe_format(name: str, description: str | None, schema: dict[str, Any]) -> str:
    """How harmony tells the model of the form its answer is to have (openai/harmony, docs/format.md)."""
    lines = ["# Response Formats", "", f"## {name}", ""]
    lines += [f"// {line}" for line in (description or "").splitlines()]
    return "\n".join([*lines, json.dumps(schema, ensure_ascii=False)])
