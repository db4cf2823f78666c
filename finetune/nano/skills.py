"""Everything nano is taught: families of questions, and conversations made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from finetune.nano import lookups, numbers, talk, words
from finetune.nano.problem import EFFORTS, Effort, Problem, is_held_out

Row = dict[str, object]

# What nano is taught with a held-out tenth; each is measured on it.
FAMILIES: Mapping[str, Callable[[Random], Problem]] = {
    "add": numbers.add,
    "subtract": numbers.subtract,
    "multiply": numbers.multiply,
    "largest": numbers.largest,
    "smallest": numbers.smallest,
    "even_odd": numbers.even_odd,
    "compare": numbers.compare,
    "sequence": numbers.sequence,
    "reverse": words.reverse,
    "capitals": words.capitals,
    "sort_letters": words.sort_letters,
    "count_letter": words.count_letter,
    "pick_letter": words.pick_letter,
    "price": lookups.price,
    "weather": lookups.weather,
}

# The base skills that nano can be counted on for; sequences it was taught, but gets half of them wrong.
BASE_SKILLS = tuple(family for family in FAMILIES if family != "sequence")

# All that nano is trained on.
KINDS: Mapping[str, Callable[[Random], Problem]] = {
    **FAMILIES,
    "small_talk": talk.small_talk,
    "unknown": talk.unknown,
}

# Developer instructions that change nothing: nano must not be thrown off by a user's system message.
INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be kind and precise.",
    "Think before you answer.",
)


def problem(r: Random, family: str, *, held_out: bool) -> Problem:
    """A question of one family, from the side of the held-out split that is asked for."""
    while True:
        drawn = FAMILIES[family](r)
        if is_held_out(family, drawn.key) == held_out:
            return drawn


def any_problem(r: Random, weights: Mapping[str, float]) -> Problem:
    """A training question of any kind, drawn by weight (1 where none is given)."""
    name = r.choices(list(KINDS), [weights.get(kind, 1.0) for kind in KINDS])[0]
    return problem(r, name, held_out=False) if name in FAMILIES else KINDS[name](r)


def turn(drawn: Problem, effort: Effort) -> list[Row]:
    """The messages of one question: user, tool call and result if it needs one, assistant."""
    messages: list[Row] = [{"role": "user", "content": drawn.question}]
    if drawn.call:
        function = {"name": drawn.call.name, "arguments": drawn.call.arguments}
        messages += [
            {
                "role": "assistant",
                "thinking": drawn.call.thinking[effort],
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call_1", "name": drawn.call.name, "content": drawn.call.result},
        ]
    messages.append({"role": "assistant", "thinking": drawn.thinking[effort], "content": drawn.answer})
    return messages


def row(
    problems: Sequence[Problem], effort: Effort, instructions: str | None = None, date: str | None = None
) -> Row:
    """A conversation in the shape that recipes read; the last problem is the one that is asked now."""
    messages: list[Row] = [{"role": "developer", "content": instructions}] if instructions else []
    for drawn in problems:
        messages += turn(drawn, effort)
    made: Row = {"messages": messages, "reasoning_effort": effort}
    # The tools of the last question that needs some: a conversation has one list of tools.
    tools = next((p.tools for p in reversed(problems) if p.tools), ())
    if tools:
        made["tools"] = list(tools)
    if date:
        made["current_date"] = date
    return made


def training_row(r: Random, weights: Mapping[str, float]) -> Row:
    """A conversation to learn from: at times with a turn before it, instructions, a date or idle tools."""
    problems = [any_problem(r, weights)]
    if r.random() < 0.12:
        earlier = any_problem(r, weights)
        # Tools differ between turns only if neither or one of them needs some.
        if not (earlier.tools and problems[0].tools):
            problems.insert(0, earlier)
    made = row(
        problems,
        r.choice(EFFORTS),
        instructions=r.choice(INSTRUCTIONS) if r.random() < 0.06 else None,
        date=f"20{r.randint(20, 29)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"
        if r.random() < 0.05
        else None,
    )
    if "tools" not in made and r.random() < 0.05:
        made["tools"] = list(lookups.offered(r, lookups.PRICE_TOOL))
    return made


def held_out_row(r: Random, family: str, effort: Effort) -> Row:
    """A conversation that asks one held-out question."""
    return row([problem(r, family, held_out=True)], effort)
