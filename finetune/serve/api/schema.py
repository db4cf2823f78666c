"""What requests to all endpoints share. What is not here is refused: nothing is taken and then ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from finetune.errors import FinetuneError
from finetune.serve.constrain import OBJECT

MAX_STOPS = 4  # as OpenAI's API


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
One = Annotated[int, _only(1, "one answer a request is all that is supported; send several requests")]
NoPenalty = Annotated[float, _only(0, "penalties are not supported; 0 is the only value")]
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
# The model decides, or gets to see no tools: that is what can be kept.
ToolChoice = Literal["auto", "none"]
Effort = Literal["low", "medium", "high"]


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

    def schema_asked(self) -> dict[str, Any]:
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
