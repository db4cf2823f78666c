"""Tools as JSON schema, and the TypeScript in which harmony shows them to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune.errors import FinetuneError


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is its JSON schema, None when it takes none."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] | None = None


def check_name(name: object, owner: str) -> str:
    """A function's name, without harmony's `functions.`; FinetuneError if no header can carry it."""
    if not isinstance(name, str) or not name:
        raise FinetuneError(f"{owner} has no name")
    name = name.removeprefix("functions.")
    # Headers are split at white space and at special tokens; such a name would not be read back as one.
    if not name or any(c.isspace() or c in "<>" for c in name):
        raise FinetuneError(f"{owner} has a name that no header can carry: {name!r}")
    return name


def read_tools(value: object) -> tuple[Tool, ...]:
    """The tools of a row: a list, or the JSON text of one, of schemas with or without the `function` wrapper.

    Raises FinetuneError when an entry is not a function.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise FinetuneError(f"tools is text, and not JSON: {error}") from None
    if value is None or value == "":
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise FinetuneError(f"tools must be a list, not {kind(value)}")
    return tuple(_read_tool(entry, f"tool {number}") for number, entry in enumerate(value, 1))


def _read_tool(entry: object, owner: str) -> Tool:
    if not isinstance(entry, Mapping):
        raise FinetuneError(f"{owner} must be a mapping, not {kind(entry)}")
    if entry.get("type") not in (None, "function"):
        raise FinetuneError(f"{owner} is of type {entry['type']!r}; only functions can be shown to the model")
    inner = entry.get("function") or entry
    if not isinstance(inner, Mapping):
        raise FinetuneError(f"the function of {owner} must be a mapping, not {kind(inner)}")
    name = check_name(inner.get("name"), owner)
    description = inner.get("description") or ""
    if not isinstance(description, str):
        raise FinetuneError(f"the description of tool {name!r} must be text, not {kind(description)}")
    parameters = inner.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise FinetuneError(f"the parameters of tool {name!r} must be a JSON schema, not {kind(parameters)}")
    return Tool(name, description, parameters)


def kind(value: object) -> str:
    """What a JSON value is, in a word that a user knows."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, Sequence) else type(value).__name__


def tools_section(tools: Sequence[Tool]) -> str:
    """The `# Tools` section of a developer message, as openai-harmony writes it."""
    lines = ["# Tools\n", "## functions\n", "namespace functions {\n"]
    for tool in tools:
        lines += [f"// {line}" for line in _lines(tool.description)]
        argument = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
        lines.append(f"type {tool.name} = ({argument}) => any;\n")
    lines.append("} // namespace functions")
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    """Lines as Rust counts them: only \\n ends one, with the \\r before it; str.splitlines knows ten more."""
    *ended, last = text.split("\n")
    return [line.removesuffix("\r") for line in ended] + ([last] if last else [])


def typescript(schema: object, indent: str = "") -> str:
    """A JSON schema as the TypeScript type that openai-harmony shows, its quirks included.

    `anyOf`, `$ref`, `const` and unknown types become `any`: that is what the model saw when it was trained.
    """
    if not isinstance(schema, Mapping):
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(f"\n{indent} | {_type(v, indent + '   ')}{_variant_comment(v)}" for v in variants)
    type_ = schema.get("type")
    if isinstance(type_, list):
        names = [name for name in type_ if isinstance(name, str)]
        if names:
            return " | ".join("number" if name == "integer" else name for name in names)
    if type_ == "object":
        return _object(schema, indent)
    if type_ == "string":
        values = schema.get("enum")
        texts = [v for v in values if isinstance(v, str)] if isinstance(values, list) else []
        return " | ".join(f'"{text}"' for text in texts) or "string"
    if type_ == "array":
        return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(type_), "any")


def _type(schema: object, indent: str) -> str:
    text = typescript(schema, indent)
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _object(schema: Mapping[str, object], indent: str) -> str:
    description = schema.get("description")
    out = [f"{indent}// {description}\n"] if isinstance(description, str) else []
    out.append("{\n")
    properties = schema.get("properties")
    names = schema.get("required")
    required = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    if isinstance(properties, Mapping):
        for key, value in properties.items():
            mark = "" if key in required else "?"
            out += _property(f"{key}{mark}", value if isinstance(value, Mapping) else {}, indent)
    out.append(f"{indent}}}")
    return "".join(out)


def _property(name: str, schema: Mapping[str, object], indent: str) -> Iterator[str]:
    title, description, examples = schema.get("title"), schema.get("description"), schema.get("examples")
    if isinstance(title, str):
        yield f"{indent}// {title}\n{indent}//\n"
    if isinstance(description, str) and "oneOf" not in schema:
        yield f"{indent}// {description}\n"
    if isinstance(examples, list) and examples:
        yield f"{indent}// Examples:\n"
        yield from (f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str))
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        yield from _one_of_property(name, schema, variants, indent)
        return
    yield f"{indent}{name}: {_type(schema, indent + '    ')},"
    if "default" in schema and "oneOf" not in schema:
        yield f" // {_default(schema)}"
    yield "\n"


def _one_of_property(
    name: str, schema: Mapping[str, object], variants: Sequence[object], indent: str
) -> Iterator[str]:
    first = variants[0] if variants else None
    description = schema.get("description")
    # harmony does not repeat the property's description where the first variant says the same
    above = isinstance(description, str) and not (
        isinstance(first, Mapping) and first.get("description") == description
    )
    if above:
        yield f"{indent}// {description}\n"
    if "default" in schema:
        yield f"{indent}// {_default(schema)}\n"
    yield f"{indent}{name}:\n"
    for number, variant in enumerate(variants):
        comments = []
        if isinstance(variant, Mapping):
            said = variant.get("description")
            if isinstance(said, str) and said != description and not (above and number == 0):
                comments.append(said)
            if "default" in variant:
                comments.append(_default(variant))
        comment = f" // {' '.join(comments)}" if comments else ""
        yield f"{indent} | {_type(variant, indent + '   ')}{comment}\n"
    yield f"{indent},\n"


def _variant_comment(variant: object) -> str:
    if not isinstance(variant, Mapping):
        return ""
    description = variant.get("description")
    comments = [description] if isinstance(description, str) else []
    if "default" in variant:
        default = variant["default"]
        quoted = isinstance(default, str) and not _is_enum(variant)
        comments.append(f'default: "{default}"' if quoted else f"default: {_json(default)}")
    return f" // {' '.join(comments)}" if comments else ""


def _default(schema: Mapping[str, object]) -> str:
    default = schema["default"]
    if not isinstance(default, str):
        return f"default: {_json(default)}"
    return f"default: {default}" if _is_enum(schema) else f'default: "{default}"'


def _is_enum(schema: Mapping[str, object]) -> bool:
    values = schema.get("enum")
    return isinstance(values, list) and bool(values)


def _json(value: object) -> str:
    """JSON as Rust's serde_json prints it: no spaces, floats in its own notation."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_json(str(key))}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        value = float(value)  # beyond 64 bits an integer becomes a float there
    if isinstance(value, float):
        digits, _, exponent = repr(value).partition("e")
        if exponent == "-05":
            return f"{'-' if value < 0 else ''}0.0000{digits.lstrip('-').replace('.', '')}"
        return f"{digits}e{int(exponent)}" if exponent else digits
    return json.dumps(value, ensure_ascii=False)
