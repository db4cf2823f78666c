"""JSON schemas become the TypeScript that the model was trained on (openai-harmony judges the rest)."""

from __future__ import annotations

import pytest

from finetune.chat import Tool
from finetune.chat.tools import tools_section, typescript


def test_a_tool_is_shown_with_its_description_and_commented_parameters() -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city", "examples": ["Rome", "Oslo"]},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
        },
        "required": ["location"],
    }
    tools = [Tool("get_weather", "Looks up\r\nthe weather\n", schema), Tool("now")]
    assert tools_section(tools) == (
        "# Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// Looks up\n// the weather\n"
        "type get_weather = (_: {\n"
        '// The city\n// Examples:\n// - "Rome"\n// - "Oslo"\nlocation: string,\n'
        'format?: "celsius" | "fahrenheit", // default: celsius\n'
        "days?: number[] | null,\n"
        "}) => any;\n\n"
        "type now = () => any;\n\n"
        "} // namespace functions"
    )


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({}, "any"),
        (True, "any"),
        ({"type": "dict"}, "any"),
        ({"anyOf": [{"type": "string"}]}, "any"),
        ({"type": "array"}, "Array<any>"),
        ({"type": ["integer", "null"]}, "number | null"),
        (
            {"oneOf": [{"type": "string"}, {"type": "number", "default": 1}]},
            "\n | string\n | number // default: 1",
        ),
    ],
)
def test_types_are_shown_as_harmony_shows_them(schema: object, shown: str) -> None:
    assert typescript(schema) == shown


@pytest.mark.parametrize(
    ("default", "shown"),
    [
        ("x", '"x"'),
        (None, "null"),
        (True, "true"),
        (1e-5, "0.00001"),
        (-1e-5, "-0.00001"),
        (1e-6, "1e-6"),
        (1e16, "1e16"),
        (1e15, "1000000000000000.0"),
        (2**64, "1.8446744073709552e19"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
    ],
)
def test_defaults_are_written_as_rust_writes_json(default: object, shown: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "default": default}}}
    assert typescript(schema) == f"{{\na?: string, // default: {shown}\n}}"
