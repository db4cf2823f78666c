"""A conversation as the model sees it, read from a row in the shape of OpenAI's chat API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from finetune.chat.tools import Tool, check_name, kind, read_tools
from finetune.errors import FinetuneError

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]
_ROLES, _EFFORTS = get_args(Role), get_args(Effort)

# DeepSeek and older vLLM write reasoning_content, vLLM since 0.11 and OpenRouter reasoning.
_THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True)
class ToolCall:
    """A call of the function `name`; `arguments` is the JSON text exactly as it is shown and learned."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One message. `name` is the tool's on a tool result and the author's on a user message.

    An assistant message with tool calls shows its content as a preamble before them; one without is the
    final answer of its turn. `learn` False: the message is shown and not learned.
    """

    role: Role
    content: str = ""
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    learn: bool | None = None

    @property
    def is_final(self) -> bool:
        return self.role == "assistant" and not self.tool_calls


@dataclass(frozen=True)
class Conversation:
    """Messages in order, the tools offered, and what harmony's own system message says."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    reasoning_effort: Effort = "medium"
    current_date: str | None = None
    knowledge_cutoff: str = "2024-06"


def read_conversation(
    row: Mapping[str, object], *, reasoning_effort: Effort | None = None, current_date: str | None = None
) -> Conversation:
    """Read `{"messages": [...], "tools": [...], "reasoning_effort": ..., "current_date": ...}`.

    The arguments stand in where the row gives none. Keys that are not known are ignored (data files carry
    ids, scores and the like), null counts as absent. Raises FinetuneError with the reason; the caller adds
    the place.
    """
    raw = row.get("messages")
    if raw is None or raw == []:
        raise FinetuneError("the row has no messages")
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise FinetuneError(f"messages must be a list, not {kind(raw)}")
    effort = row.get("reasoning_effort") or reasoning_effort or "medium"
    if effort not in _EFFORTS:
        raise FinetuneError(f"reasoning_effort is {effort!r}; it is low, medium or high")
    date = row.get("current_date") or current_date
    if date is not None and not isinstance(date, str):
        raise FinetuneError(f"current_date must be text such as 2025-08-05, not {kind(date)}")
    # OpenAI's files named them functions until 2023
    tools = read_tools(row.get("tools") or row.get("functions"))
    messages = [_read_message(message, f"message {number}") for number, message in enumerate(raw, 1)]
    _check_calls(messages, tools)
    return Conversation(_name_results(messages), tools, cast(Effort, effort), date)


def _read_message(raw: object, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise FinetuneError(f"{where} must be a mapping with role and content, not {kind(raw)}")
    role = raw.get("role")
    if role is None:
        raise FinetuneError(f"{where} has no role")
    role = "tool" if role == "function" else role  # the chat API's name for it until 2023
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise FinetuneError(f"{where} has the unknown role {role!r}; a role is one of {known}")
    where = f"{where} ({role})"
    content, thinking, calls = _read_content(raw.get("content"), where)
    thinking = _read_thinking(raw, where) or thinking or None
    calls += _read_tool_calls(raw, where)
    learn = _read_learn(raw, where)
    if role != "assistant" and (thinking or calls or learn):
        what = "thinking" if thinking else "tool_calls" if calls else '"learn": true'
        raise FinetuneError(f"{where} has {what}, which only an assistant message can have")
    if content is None and not calls:
        needs = "neither content nor tool_calls" if role == "assistant" else "no content"
        raise FinetuneError(f"{where} has {needs}")
    name, call_id = _optional_text(raw, "name", where), _optional_text(raw, "tool_call_id", where)
    return Message(cast(Role, role), content or "", thinking, tuple(calls), name, call_id, learn)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise FinetuneError(f"{what} must be text, not {kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise FinetuneError(f"{what} holds {half}, which is half a character") from None
    return value


def _optional_text(raw: Mapping[str, object], key: str, where: str) -> str | None:
    value = raw.get(key)
    return None if value is None or value == "" else _text(value, f"the {key} of {where}")


def _read_thinking(raw: Mapping[str, object], where: str) -> str | None:
    return next((text for key in _THINKING_KEYS if (text := _optional_text(raw, key, where))), None)


def _read_content(value: object, where: str) -> tuple[str | None, str | None, list[ToolCall]]:
    """Content, thinking and calls of a `content` that is text or a list of typed parts."""
    if value is None or isinstance(value, str):
        return (None if value is None else _text(value, f"the content of {where}")), None, []
    if not isinstance(value, Sequence):
        raise FinetuneError(f"the content of {where} must be text or a list of parts, not {kind(value)}")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for part in value:
        if not isinstance(part, Mapping):
            raise FinetuneError(f"a part of the content of {where} must be a mapping, not {kind(part)}")
        type_ = part.get("type")
        inner = next((part[key] for key in ("text", "value", "thinking") if part.get(key) is not None), None)
        if type_ in _TEXT_PARTS:
            texts.append(_text(inner, f"a text part of {where}"))
        elif type_ in _THINKING_PARTS:
            thoughts.append(_text(inner, f"a thinking part of {where}"))
        elif type_ == "tool_call":
            owner = f"a tool call of {where}"
            calls.append(_read_call(_json_object(inner, owner), owner))
        else:
            raise FinetuneError(f"{where} has content of type {type_!r}; the model reads text only")
    return ("".join(texts) if texts or not calls else None), "".join(thoughts), calls


def _read_tool_calls(raw: Mapping[str, object], where: str) -> list[ToolCall]:
    calls = raw.get("tool_calls")
    if calls is None:
        legacy = raw.get("function_call")
        calls = [] if legacy is None else [legacy]
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise FinetuneError(f"the tool_calls of {where} must be a list, not {kind(calls)}")
    return [_read_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls, 1)]


def _read_call(call: object, owner: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise FinetuneError(f"{owner} must be a mapping, not {kind(call)}")
    function = call.get("function") or call
    if not isinstance(function, Mapping):
        raise FinetuneError(f"the function of {owner} must be a mapping, not {kind(function)}")
    name = check_name(function.get("name"), owner)
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        text = "{}"  # how several APIs write a call without arguments
    elif isinstance(arguments, Mapping):
        text = _text(json.dumps(arguments, ensure_ascii=False), f"the arguments of {owner}")
    else:
        _json_object(arguments, f"the arguments of {owner}")
        text = _text(arguments, f"the arguments of {owner}")
    return ToolCall(name, text, _optional_text(call, "id", owner))


def _json_object(value: object, what: str) -> Mapping[str, object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise FinetuneError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise FinetuneError(f"{what} must be a JSON object, not {kind(value)}")
    return value


def _read_learn(raw: Mapping[str, object], where: str) -> bool | None:
    learn = raw.get("learn")
    if learn is None and raw.get("weight") is not None:  # OpenAI's fine-tuning files: 0 or 1
        weight = raw["weight"]
        if weight not in (0, 1):
            raise FinetuneError(f"the weight of {where} is {weight!r}; it is 0 or 1")
        return False if weight == 0 else None
    if learn is not None and not isinstance(learn, bool):
        raise FinetuneError(f"learn of {where} must be true or false, not {kind(learn)}")
    return learn


def _check_calls(messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    known = {tool.name for tool in tools}
    for number, message in enumerate(messages, 1):
        for call in message.tool_calls:
            if known and call.name not in known:
                listed = ", ".join(sorted(known))
                where = f"message {number} (assistant)"
                raise FinetuneError(f"{where} calls {call.name!r}, which is not among its tools: {listed}")


def _name_results(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Give every tool result the name of the call that it answers.

    A result answers the open call with its tool_call_id, else one with its name, else the next open call of
    the latest round. Some data answers several calls with one result: calls may stay open.
    """
    named: list[Message] = []
    calls: list[ToolCall] = []
    round_start = 0
    previous: Role | None = None
    for number, message in enumerate(messages, 1):
        if message.role == "tool":
            call = _answered(message, calls, round_start, f"message {number} (tool)")
            position = next(i for i, candidate in enumerate(calls) if candidate is call)
            del calls[position]
            round_start -= position < round_start
            message = replace(message, name=call.name)
        elif message.tool_calls:
            round_start = round_start if previous == "assistant" else len(calls)
            calls.extend(message.tool_calls)
        previous = message.role
        named.append(message)
    return tuple(named)


def _answered(message: Message, calls: Sequence[ToolCall], round_start: int, where: str) -> ToolCall:
    name = message.name and message.name.removeprefix("functions.")
    latest = calls[round_start:]
    named = [call for call in (*latest, *reversed(calls[:round_start])) if name in (None, call.name)]
    if message.tool_call_id is not None:
        # ids that start anew each round: the latest round's come first
        matches = [call for call in named if call.id == message.tool_call_id]
        matches = matches or [call for call in latest if call.id is None and name in (None, call.name)]
        reason = f"answers the call {message.tool_call_id!r}" + (f" of {name!r}" if name else "")
    elif name:
        matches, reason = named, f"answers a call of {name!r}"
    else:
        matches, reason = list(latest), "answers a call"
    if not matches:
        raise FinetuneError(f"{where} {reason}, and no such call is open before it")
    return matches[0]
