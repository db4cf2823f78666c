from __future__ import annotations

from decimal import Decimal

import pytest

from finetune.chat import ToolCall
from finetune.evaluate.graders import exact_match, last_number, number, tool_call
from finetune.evaluate.intervals import wilson


def test_exact_match_ignores_only_white_space_around_the_answer() -> None:
    assert exact_match(" 42\n", "42")
    assert not exact_match("4 2", "42")
    assert not exact_match("Forty", "forty")


def test_an_empty_answer_is_never_an_exact_match() -> None:
    assert not exact_match("", "")
    assert not exact_match(" \n", " ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 12.", "12"),
        ("#### 1,234,567.50", "1234567.5"),
        ("$1,200.", "1200"),
        ("first 3, then 4", "4"),
        ("it is -7", "-7"),
        ("it is \N{MINUS SIGN}7", "-7"),
        ("pages 3-4", "4"),
        ("COVID-19", "19"),
        ("about .5", "0.5"),
        ("1,2345", "2345"),
    ],
)
def test_the_last_number_of_a_text_is_read_as_people_write_it(text: str, value: str) -> None:
    assert last_number(text) == Decimal(value)


def test_numbers_are_compared_as_numbers_and_none_is_never_right() -> None:
    assert number("So she pays $18.00", "work it out\n#### 18")
    assert not number("eighteen", "18")
    assert not number("no idea", "no number")


def call(arguments: str, name: str = "weather") -> ToolCall:
    return ToolCall(name, arguments)


def test_a_tool_call_is_right_when_name_and_json_arguments_are() -> None:
    assert tool_call(call('{"a": 1, "b": [1.0]}'), call('{ "b":[1], "a":1 }'))
    assert not tool_call(call('{"a": 1}'), call('{"a": 2}'))
    assert not tool_call(call('{"a": 1}'), call('{"a": 1, "b": null}'))
    assert not tool_call(call("{}", "wether"), call("{}"))


def test_json_true_is_not_the_number_one() -> None:
    assert not tool_call(call('{"a": true}'), call('{"a": 1}'))
    assert not tool_call(call('{"a": [0]}'), call('{"a": [false]}'))
    assert tool_call(call('{"a": [false]}'), call('{"a": [false]}'))


def test_arguments_that_are_not_json_are_wrong_even_when_the_text_is_the_same() -> None:
    assert not tool_call(call('{"a": '), call('{"a": '))


def test_no_call_is_right_exactly_when_none_was_wanted() -> None:
    assert tool_call(None, None)
    assert not tool_call(call("{}"), None)
    assert not tool_call(None, call("{}"))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_stays_within_zero_and_one() -> None:
    assert wilson(5, 5)[1] == 1.0
    assert wilson(0, 5)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)
