"""Is an answer right? One pure function a metric."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.chat.conversation import ToolCall

# 1,234.5 or 1234 or -.5; a minus counts only where it joins nothing: "3-4" is 3 and 4, "COVID-19" is 19.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)")


def exact_match(answer: str, reference: str) -> bool:
    """The same text, but for white space around it; an empty answer is never right."""
    return bool(answer.strip()) and answer.strip() == reference.strip()


def number(answer: str, reference: str) -> bool:
    """The last number in both is the same: `$1,200.` is 1200.0 (GSM8K's rule; `#### 1200` works too)."""
    got, expected = last_number(answer), last_number(reference)
    return got is not None and got == expected


def last_number(text: str) -> Decimal | None:
    """The last decimal number in a text, thousands separators removed; None where there is none."""
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def tool_call(answer: ToolCall | None, reference: ToolCall | None) -> bool:
    """The same tool with arguments that are equal as JSON; a reference of None: no tool should be called.

    As JSON: the order of keys and white space do not count, `1` equals `1.0`, and `true` is not `1`.
    Arguments that are not JSON are never right.
    """
    if answer is None or reference is None:
        return answer is reference
    try:
        got, expected = json.loads(answer.arguments or "{}"), json.loads(reference.arguments or "{}")
    except ValueError:
        return False
    return answer.name == reference.name and json_equal(got, expected)


def json_equal(a: object, b: object) -> bool:
    """Equality of JSON values; Python alone would call `True` and `1` equal."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return a == b
