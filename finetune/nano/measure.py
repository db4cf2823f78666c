"""How often nano answers right: greedy completions, tool calls answered by the question's own result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

from finetune.chat.conversation import read_conversation
from finetune.chat.encode import HarmonyEncoder
from finetune.chat.parse import parse_completion
from finetune.evaluate.generation import generate
from finetune.nano.problem import EFFORTS, Effort, Problem
from finetune.nano.skills import FAMILIES, Row, problem, row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 160


def prompt(encoder: HarmonyEncoder, conversation: Row, messages: Sequence[Row]) -> list[int]:
    return encoder.prompt_ids(read_conversation({**conversation, "messages": list(messages)}))


def solved(
    model: PreTrainedModel, encoder: HarmonyEncoder, questions: Sequence[tuple[Problem, Effort]]
) -> list[bool]:
    """Whether each question is answered exactly right; one with a tool also needs exactly the right call."""
    rows = [row([asked], effort) for asked, effort in questions]
    messages = [list(r["messages"]) for r in rows]  # type: ignore[call-overload]
    right = [True] * len(rows)
    calling = [i for i, (asked, _) in enumerate(questions) if asked.call]
    first = generate(
        model,
        encoder,
        [prompt(encoder, rows[i], messages[i][:-3]) for i in calling],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=128,
    )
    for i, ids in zip(calling, first, strict=True):
        call = questions[i][0].call
        made = parse_completion(encoder, ids).tool_calls
        right[i] = call is not None and [(c.name, c.arguments) for c in made] == [(call.name, call.arguments)]
    # The right call stands in the history of the final answer: a wrong one has already failed.
    last = generate(
        model,
        encoder,
        [prompt(encoder, r, m[:-1]) for r, m in zip(rows, messages, strict=True)],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=128,
    )
    for i, ids in enumerate(last):
        completion = parse_completion(encoder, ids)
        right[i] &= completion.ended == "return" and completion.content == questions[i][0].answer
    return right


def accuracy(
    model: PreTrainedModel, encoder: HarmonyEncoder, *, count: int, seed: int
) -> Mapping[str, Mapping[Effort, float]]:
    """Share of held-out questions answered right, for each family and effort, `count` questions each."""
    r = Random(seed)
    asked = [(f, e, problem(r, f, held_out=True)) for f in FAMILIES for e in EFFORTS for _ in range(count)]
    right = solved(model, encoder, [(p, e) for _, e, p in asked])
    hits = Counter((f, e) for (f, e, _), ok in zip(asked, right, strict=True) if ok)
    return {family: {effort: hits[family, effort] / count for effort in EFFORTS} for family in FAMILIES}
