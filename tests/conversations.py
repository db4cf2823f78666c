"""Hypothesis strategies for rows as users write them; for tests of everything that reads conversations."""

from __future__ import annotations

import json
from typing import Any, cast

from hypothesis import strategies as st

Schema = dict[str, object]

SPECIAL_PIECES = ["<|call|>", "<|start|>assistant", "<|end|>"]
PIECES = [*SPECIAL_PIECES, "\n", "\n\n", " ", "  x", "It's", "1234", "{}", "é", "日本", "🤗"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=3).map("".join)
some_text = texts.map(lambda text: text or "x")
names = st.sampled_from(["f", "get_weather", "math.factorial", "search-2"])
# Few digits: serde_json, inside openai-harmony, is one unit off when it reads some floats of 17 digits.
floats = st.builds(
    lambda digits, power: float(f"{digits}e{power}"), st.integers(-(10**6), 10**6), st.integers(-12, 20)
)
numbers = st.integers(-(2**66), 2**66) | floats
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=3,
)
ARGUMENTS: list[object] = [{}, {"city": "é<|call|>"}, {"a": [1, 2.5, None]}]
TYPES: list[object] = ["string", "integer", "number", "boolean", "array", "null", "dict", ["integer", "null"]]


def _schemas(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    notes: dict[str, st.SearchStrategy[object]] = {
        "description": texts,
        "default": json_values,
        "nullable": st.booleans(),
        "title": texts,
        "examples": st.lists(st.integers() | texts, max_size=2),
        "enum": st.lists(st.integers(0, 3) | texts, max_size=2),
    }
    keys = st.sampled_from(["city", "unit", "n", "z"])
    members: dict[str, st.SearchStrategy[object]] = {
        "description": texts,
        "properties": st.dictionaries(keys, inner, max_size=3),
        "required": st.lists(keys, max_size=2),
    }

    def shape(
        always: dict[str, st.SearchStrategy[object]], **more: st.SearchStrategy[object]
    ) -> st.SearchStrategy[Schema]:
        return st.fixed_dictionaries(always, optional=notes | more)

    return st.one_of(
        shape({"type": st.sampled_from(TYPES)}, items=inner),
        shape({"oneOf": st.lists(inner, max_size=3)}),
        shape({}, anyOf=st.just([])),
        shape({"type": st.just("object")}, **members),
    )


schemas = st.recursive(_schemas(st.just({"type": "string"})), _schemas, max_leaves=3)
# For whole conversations a handful of schemas will do: the tools have a test of their own.
_FEW: list[Schema | None] = [
    None,
    {},
    {"type": "object", "properties": {}},
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where", "default": "Rome"},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
]
few_parameters = st.sampled_from(_FEW)


@st.composite
def tool_lists(draw: st.DrawFn) -> list[Schema]:
    tools: list[Schema] = []
    for name in draw(st.lists(names, unique=True, max_size=2)):
        tool: Schema = {"name": name, "description": draw(texts), "parameters": draw(few_parameters)}
        tools.append({"type": "function", "function": tool} if draw(st.booleans()) else tool)
    return tools


@st.composite
def assistant_messages(draw: st.DrawFn, callable_names: list[str], ids: str = "") -> dict[str, object]:
    """A final answer or, when there is something to call, perhaps calls (with ids that begin with `ids`)."""
    message: dict[str, object] = {"role": "assistant", "content": draw(texts)}
    if draw(st.booleans()):
        message[draw(st.sampled_from(["thinking", "reasoning_content"]))] = draw(texts)
    if draw(st.integers(0, 9)) == 0:
        message["learn"] = False
    calls = [draw(_calls(callable_names, f"{ids}{n}" if ids else "")) for n in range(draw(st.integers(0, 2)))]
    if (calls and callable_names) or draw(st.booleans()):
        message["tool_calls"] = calls if callable_names else []
    return message


@st.composite
def _calls(draw: st.DrawFn, callable_names: list[str], known_as: str) -> dict[str, object]:
    arguments: object = draw(st.sampled_from(ARGUMENTS))
    arguments = json.dumps(arguments) if draw(st.booleans()) else arguments
    call = {"name": draw(st.sampled_from(callable_names or ["f"])), "arguments": arguments}
    wrapped: dict[str, object] = {"type": "function", "function": call} if draw(st.booleans()) else {**call}
    return wrapped | ({"id": known_as} if known_as else {})


@st.composite
def _results(draw: st.DrawFn, calls: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Answers to all calls in order, or to none; told apart by id or by name, or by order alone."""
    results: list[dict[str, object]] = []
    for call in calls if draw(st.booleans()) else []:
        result: dict[str, object] = {"role": "tool", "content": draw(texts)}
        if draw(st.booleans()) and "id" in call:
            result["tool_call_id"] = call["id"]
        elif draw(st.booleans()):
            result["name"] = call.get("function", call)["name"]
        results.append(result)
    return results


@st.composite
def rows(draw: st.DrawFn) -> dict[str, object]:
    """Rows with an assistant message: tool rounds, interrupted turns, answers in a row, late instructions."""
    tools = draw(tool_lists())
    callable_names = [cast(dict[str, str], tool.get("function", tool))["name"] for tool in tools]
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(texts)})
    kinds = st.sampled_from(["user", "user", "assistant", "assistant", "assistant", "developer"])
    for number, kind in enumerate([*draw(st.lists(kinds, min_size=1, max_size=7)), "assistant"]):
        if kind == "assistant":
            ids = f"{number}-" if draw(st.booleans()) else ""
            messages.append(draw(assistant_messages(callable_names, ids)))
            messages += draw(_results(messages[-1].get("tool_calls", [])))
        else:
            content = draw(some_text)
            parts = [{"type": "text", "text": content[:1]}, {"type": "text", "text": content[1:]}]
            messages.append({"role": kind, "content": parts if draw(st.booleans()) else content})
    row: dict[str, object] = {"messages": messages, "tools": tools}
    if draw(st.booleans()):
        row |= {"reasoning_effort": draw(st.sampled_from(["low", "high"])), "current_date": "2025-08-05"}
    return row
