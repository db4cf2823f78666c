"""Rows in the shapes that data sets come in, turned into harmony rows: `{"messages": [...], ...}`.

messages            messages (or conversations): [{role, content, thinking, tool_calls}, ...]
sharegpt            conversations (or messages): [{from, value}, ...]
prompt_completion   prompt, completion: texts or lists of messages; thinking
alpaca              instruction, input, output; history: [[question, answer], ...]; thinking
question_answer     question, answer; thinking

All may also have tools, system, reasoning_effort and current_date. `columns` maps these names to those of the
data: `{question: problem, thinking: solution, answer: answer}`. Every row must have the columns that are
mapped, but they may be null where the shape does not need them; other keys of a row are not read.

Two conventions of public data are read as what they mean. `<think>...</think>` at the start of an answer (in
all shapes but messages, which has `thinking` for it) is thinking. In question_answer without a thinking
column, an answer that ends with a line `#### 42` (GSM8K) is thinking before the mark and `42` as the answer;
with the shape prompt_completion and `columns: {prompt: question, completion: answer}` such an answer stays
one text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from finetune.chat import Conversation, read_conversation
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.data.read import Row
    from finetune.recipe import DataSpec, Source

HarmonyRow = dict[str, Any]

# Of the keys of a row that is no conversation.
SHOWN_NAMES = 8

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_SETTINGS = ("tools", "functions", "reasoning_effort", "current_date")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
_GSM8K = re.compile(r"(.*)\n#### *(-?[\d.,]*\d)\s*", re.DOTALL)


def row_to_conversation(row: Row, source: Source, spec: DataSpec) -> Conversation:
    """The conversation of a row, the source's `system` put in front.

    Raises:
        FinetuneError: what is wrong with the row, at its place.
    """
    try:
        return conversation(read_row(row, source), source, spec)
    except FinetuneError as error:
        raise FinetuneError(error.sentence, at=row.at) from None


def read_row(row: Row, source: Source) -> HarmonyRow:
    """`harmony_row` of a row that could be read; errors do not say where."""
    if row.problem:
        raise FinetuneError(row.problem)
    return harmony_row(row.value, source)


def conversation(row: HarmonyRow, source: Source, spec: DataSpec) -> Conversation:
    """A harmony row as a conversation; errors do not say where."""
    if source.system:
        row = {**row, "messages": _with_system(row["messages"], source.system)}
    found = read_conversation(row, reasoning_effort=spec.reasoning_effort, current_date=spec.current_date)
    called = next((call.name for message in found.messages for call in message.tool_calls), None)
    if called and not found.tools:
        # A model that learned this would call functions that it was never shown.
        raise FinetuneError(f"the conversation calls {called!r}, and the row has no tools; list it there")
    return found


def harmony_row(value: Mapping[str, Any], source: Source) -> HarmonyRow:
    """A row of any shape as `{"messages": [...]}` with tools and settings where it has them, to be checked by
    `read_conversation`.

    Raises:
        FinetuneError: a mapped column is missing, or the row does not have its shape.
    """
    value = _renamed(value, source.columns)
    shape = detect_shape(value) if source.shape == "auto" else source.shape
    row: HarmonyRow = {"messages": _MESSAGES[shape](value)}
    if value.get("system"):
        row["messages"] = _with_system(row["messages"], _text(value, "system"))
    row.update({key: value[key] for key in _SETTINGS if value.get(key)})
    return row


def detect_shape(value: Mapping[str, Any]) -> str:
    """The shape that the keys of a row tell.

    Raises:
        FinetuneError: none fits.
    """
    given = {key for key, item in value.items() if item is not None}
    if {"chosen", "rejected"} <= given:
        raise FinetuneError(
            "this row compares a chosen with a rejected answer, and sft learns from one; "
            "to learn the chosen one, map columns to it (columns: {completion: chosen})"
        )
    if given & {"messages", "conversations"}:
        first = _list(value)[:1]
        return "sharegpt" if first and isinstance(first[0], Mapping) and "from" in first[0] else "messages"
    for shape, keys in _KEYS.items():
        if keys <= given:
            return shape
    shapes = ", ".join(f"{shape} ({' and '.join(sorted(keys))})" for shape, keys in _KEYS.items())
    raise FinetuneError(
        f"cannot tell the shape of this row from its keys ({_names(value)}); known are messages (messages), "
        f"sharegpt (conversations), {shapes}; map other names to these with columns"
    )


def _renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    for ours, theirs in columns.items():
        if ours not in _NAMES:
            raise FinetuneError(f"columns: we have no name {ours!r}; known are {', '.join(_NAMES)}")
        if theirs not in value:
            raise FinetuneError(f"there is no column {theirs!r} for {ours}; this row has {_names(value)}")
    mapped = set(columns.values())
    rest = {key: item for key, item in value.items() if key not in mapped and key not in columns}
    return rest | {ours: value[theirs] for ours, theirs in columns.items()}


def _from_messages(value: Mapping[str, Any]) -> list[Any]:
    return _list(value)


def _from_sharegpt(value: Mapping[str, Any]) -> list[Any]:
    messages: list[Any] = []
    for number, turn in enumerate(_list(value), 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str) or "value" not in turn:
            raise FinetuneError(f"turn {number} must be an object with from and value")
        speaker, text = turn["from"], _text(turn, "value")
        if speaker == "function_call":
            messages.append(_calls(text, number))
        elif speaker not in _ROLES:
            known = ", ".join([*_ROLES, "function_call"])
            raise FinetuneError(f"turn {number} is from {speaker!r}; known are {known}")
        elif _ROLES[speaker] == "assistant":
            messages.append(_assistant(text))
        else:
            messages.append({"role": _ROLES[speaker], "content": text})
    return messages


def _calls(text: str, number: int) -> HarmonyRow:
    """An assistant message with the calls in `{"name", "arguments"}` or a list of such."""
    message = _assistant(text)
    try:
        calls = json.loads(message.pop("content"))
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FinetuneError(f"turn {number}: a function_call must be JSON with name and arguments") from None
    return message | {"tool_calls": [{"type": "function", "function": function} for function in functions]}


def _from_prompt_completion(value: Mapping[str, Any]) -> list[Any]:
    prompt, completion = _required(value, "prompt"), _required(value, "completion")
    before = prompt if isinstance(prompt, list) else [_user(_text(value, "prompt"))]
    if isinstance(completion, list):
        return before + completion
    return [*before, _assistant(_text(value, "completion"), value)]


def _from_alpaca(value: Mapping[str, Any]) -> list[Any]:
    messages: list[Any] = []
    for pair in _parsed_list(value.get("history") or [], "history"):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise FinetuneError("history must be a list of [question, answer] pairs of texts")
        messages += [_user(pair[0]), _assistant(pair[1])]
    question = _text(value, "instruction")
    if value.get("input"):
        question += "\n" + _text(value, "input")
    return [*messages, _user(question), _assistant(_text(value, "output"), value)]


def _from_question_answer(value: Mapping[str, Any]) -> list[Any]:
    answer = _text(value, "answer")
    split = None if value.get("thinking") else _GSM8K.fullmatch(answer)
    if split:
        reply: HarmonyRow = {"role": "assistant", "thinking": split[1].strip(), "content": split[2]}
    else:
        reply = _assistant(answer, value)
    return [_user(_text(value, "question")), reply]


def _user(text: str) -> HarmonyRow:
    return {"role": "user", "content": text}


def _assistant(text: str, row: Mapping[str, Any] | None = None) -> HarmonyRow:
    if row and row.get("thinking"):
        return {"role": "assistant", "thinking": _text(row, "thinking"), "content": text}
    if think := _THINK.fullmatch(text):
        thinking = {"thinking": think[1].strip()} if think[1].strip() else {}
        return {"role": "assistant", **thinking, "content": think[2]}
    return {"role": "assistant", "content": text}


def _with_system(messages: list[Any], system: str) -> list[Any]:
    """The instructions in front, joined with those that the conversation begins with."""
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer") and first.get("content"):
        own = first["content"]
        text = f"{system}\n\n"
        joined = text + own if isinstance(own, str) else [{"type": "text", "text": text}, *own]
        return [{**first, "content": joined}, *messages[1:]]
    return [{"role": "developer", "content": system}, *messages]


def _list(value: Mapping[str, Any]) -> list[Any]:
    key = "conversations" if value.get("messages") is None and "conversations" in value else "messages"
    return _parsed_list(_required(value, key), key)


def _parsed_list(value: Any, key: str) -> list[Any]:
    """A list, or the JSON text of one (as in a CSV file)."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            raise FinetuneError(f"{key} must be a list or the JSON text of one") from None
    if not isinstance(value, list):
        raise FinetuneError(f"{key} must be a list")
    return value


def _required(value: Mapping[str, Any], key: str) -> Any:
    if value.get(key) is None:
        if key in value:
            raise FinetuneError(f"{key} is null in this row")
        raise FinetuneError(f"this row has no {key}; it has {_names(value)}")
    return value[key]


def _text(value: Mapping[str, Any], key: str) -> str:
    text = _required(value, key)
    if isinstance(text, bool | int | float):
        return json.dumps(text)
    if not isinstance(text, str):
        raise FinetuneError(f"{key} must be text")
    return text


def _names(value: Mapping[str, Any]) -> str:
    names = [str(key) for key in itertools.islice(value, SHOWN_NAMES)]
    more = f" and {len(value) - SHOWN_NAMES} more" if len(value) > SHOWN_NAMES else ""
    return ", ".join(names) + more or "no keys"


_KEYS = {
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "question_answer": {"question", "answer"},
}
_NAMES = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history"),
    *("question", "answer", "thinking", "system", *_SETTINGS),
)
_MESSAGES: dict[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "question_answer": _from_question_answer,
}
