"""The questions nano is made of: their answers are right, and a tenth of them is never trained on."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from finetune.chat.conversation import read_conversation
from finetune.nano.demo import stock_code, write_demo
from finetune.nano.problem import EFFORTS, Problem, is_held_out
from finetune.nano.skills import FAMILIES, KINDS, problem, training_row

DRAWS = 300
ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "last": -1}
# Words of all phrasings; without its capital, where a question begins with one.
PHRASINGS = {
    *(
        "everse the word",
        "pell backwards",
        "hat is backwards",
        "urn around",
        "rite in capitals",
        "ut into upper case",
    ),
    *(
        "apital letters for the word please",
        "ort the letters of",
        "ut in alphabetical order",
        "etters from a to z",
    ),
    *("first second third fourth fifth last letter", "ame in", "hich", "stock code of", "tock for", "ive me"),
}
FIXED_WORDS = {word for phrasing in PHRASINGS for word in phrasing.split()}


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def minus(question: str) -> int:
    a, b = numbers(question)
    return b - a if question.startswith(("Subtract", "Take")) else a - b


def slot(question: str) -> str:
    """The word that a question is about: the one that none of the phrasings contains."""
    (found,) = [word for word in re.findall(r"[a-z]+", question) if word not in FIXED_WORDS]
    return str(found)


def count(question: str) -> int:
    if match := re.search(r"How often does (\w+) contain (\w)\?", question):
        return match[1].count(match[2])
    match = re.search(r"(?:is|letter) (\w) in (\w+)", question)
    assert match
    return match[2].count(match[1])


def picked(question: str) -> str:
    place = next(name for name in ORDINALS if f" {name} " in question)
    return slot(question)[ORDINALS[place]]


def next_term(question: str) -> int:
    terms = numbers(question)
    return terms[-1] + terms[1] - terms[0]


ANSWERS: dict[str, Callable[[str], object]] = {
    "add": lambda q: sum(numbers(q)),
    "subtract": minus,
    "multiply": lambda q: numbers(q)[0] * numbers(q)[1],
    "largest": lambda q: max(numbers(q)),
    "smallest": lambda q: sorted(numbers(q))[0],
    "even_odd": lambda q: ("even", "odd")[numbers(q)[0] & 1],
    "compare": lambda q: max(numbers(q)),
    "sequence": next_term,
    "reverse": lambda q: "".join(reversed(slot(q))),
    "capitals": lambda q: slot(q).upper(),
    "sort_letters": lambda q: "".join(sorted(slot(q))),
    "count_letter": count,
    "pick_letter": picked,
}


def drawn(family: str, seed: int = 0) -> list[Problem]:
    r = Random(seed)
    return [FAMILIES[family](r) for _ in range(DRAWS)]


@pytest.mark.parametrize("family", ANSWERS)
def test_every_answer_is_right_by_a_second_reckoning(family: str) -> None:
    for made in drawn(family):
        assert made.answer == str(ANSWERS[family](made.question)), made.question


def test_a_price_is_the_looked_up_one_times_the_count() -> None:
    for made in drawn("price"):
        assert made.call
        item = json.loads(made.call.arguments)["item"]
        assert re.search(rf"\b{item}\?", made.question)
        assert made.answer == f"{numbers(made.question)[0] * json.loads(made.call.result)['price']} dollars"


def test_the_weather_is_the_looked_up_one() -> None:
    for made in drawn("weather"):
        assert made.call
        result = json.loads(made.call.result)
        assert json.loads(made.call.arguments)["city"] in made.question
        assert made.answer == f"{result['sky'].capitalize()}, {result['degrees']} degrees."


def test_the_steps_of_arithmetic_are_true() -> None:
    for family in ("add", "subtract", "multiply", "sequence"):
        for made in drawn(family):
            for left, right in re.findall(r"(?<![\d+*-])(\d+(?:[-+*]\d+)+)=(-?\d+)", made.thinking["high"]):
                assert eval(left) == int(right), made.thinking["high"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_three_phrasings_and_thinks_more_with_more_effort(family: str) -> None:
    openings = {re.sub(r"\d+", "0", made.question)[:6] for made in drawn(family)}
    assert len(openings) >= 3
    lengths = {effort: sum(len(made.thinking[effort]) for made in drawn(family)) for effort in EFFORTS}
    assert 0 < lengths["low"] < lengths["medium"] < lengths["high"]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_questions_are_never_drawn_for_training(family: str) -> None:
    r = Random(1)
    sides: dict[bool, set[str]] = defaultdict(set)
    for held_out in (False, True):
        for _ in range(DRAWS):
            made = problem(r, family, held_out=held_out)
            assert is_held_out(family, made.key) == held_out
            sides[held_out].add(made.question)
    assert not sides[False] & sides[True]


def test_training_conversations_hold_no_held_out_question() -> None:
    r = Random(2)
    held_out = {problem(r, family, held_out=True).question for family in FAMILIES for _ in range(DRAWS)}
    asked = set()
    for _ in range(2000):
        conversation = read_conversation(training_row(r, {}))
        asked |= {m.content for m in conversation.messages if m.role == "user"}
    assert not held_out & asked


def test_the_demos_skill_is_in_no_training_question() -> None:
    r = Random(3)
    asked = " ".join(make(r).question for make in KINDS.values() for _ in range(DRAWS)).lower()
    assert "stock" not in asked and "code of" not in asked and "code for" not in asked


def test_the_demos_files_are_what_the_project_generates(tmp_path: Path) -> None:
    write_demo(tmp_path)
    shipped = Path(__file__).resolve().parents[2] / "recipes" / "nano" / "data"
    assert {file.name for file in shipped.iterdir()} == {file.name for file in tmp_path.iterdir()}
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (shipped / made.name).read_bytes()


def test_the_demos_questions_are_in_none_of_its_training_rows(tmp_path: Path) -> None:
    write_demo(tmp_path)
    asked = {}
    for file in tmp_path.iterdir():
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        asked[file.stem] = {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}
    train = asked.pop("stock-codes")
    assert len(asked) == 2
    for questions in asked.values():
        assert not questions & train


def test_a_stock_code_is_three_capitals_and_the_length() -> None:
    r = Random(4)
    for _ in range(DRAWS):
        made = stock_code(r)
        item = slot(made.question)
        assert made.answer == f"{item[:3].upper()}-{len(item)}"
