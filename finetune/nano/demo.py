"""The demo's data, made by `python -m finetune.nano.demo recipes/nano/data`: a rule that nano does not know.

A stock code is an item's first three letters in capitals, a dash and its length: kelo is KEL-4.
Among the training rows are some of nano's own skills, so that they are kept.
"""

from __future__ import annotations

import json
import sys
from itertools import cycle, islice, product
from pathlib import Path
from random import Random

from finetune.nano.lookups import ITEMS
from finetune.nano.problem import EFFORTS, Problem, by_effort, is_held_out, random_word
from finetune.nano.skills import BASE_SKILLS, FAMILIES, Row, held_out_row, problem, row

FAMILY = "stock_code"
NEW_ROWS, KEPT_ROWS = 1200, 2400
NEW_QUESTIONS, KEPT_QUESTIONS = 150, 210


def stock_code(r: Random) -> Problem:
    item = r.choice(ITEMS) if r.random() < 0.2 else random_word(r, 3, 8)
    code = f"{item[:3].upper()}-{len(item)}"
    templates = ("What is the stock code of {}?", "Stock code for {}?", "Give me the stock code of {}.")
    numbered = "".join(f"{letter}{i + 1}" for i, letter in enumerate(item))
    medium = f"letters {numbered}, so {code}"
    thinking = by_effort(numbered, medium, f"{medium}. Check: {item}")
    return Problem(FAMILY, item, r.choice(templates).format(item), thinking, code)


def stock_code_row(r: Random, *, held_out: bool) -> Row:
    while True:
        drawn = stock_code(r)
        if is_held_out(FAMILY, drawn.key) == held_out:
            return row([drawn], r.choice(EFFORTS))


def write_rows(rows: list[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(made) + "\n" for made in rows), encoding="utf-8")


def write_demo(out: Path, seed: int = 0) -> None:
    """Write three files: rows to train on, questions about the new rule, questions about the base skills."""
    r = Random(f"demo {seed}")
    families = list(FAMILIES)
    kept = [problem(r, families[i % len(families)], held_out=False) for i in range(KEPT_ROWS)]
    train = [stock_code_row(r, held_out=False) for _ in range(NEW_ROWS)]
    train += [row([drawn], r.choice(EFFORTS)) for drawn in kept]
    r.shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(train, out / "stock-codes.jsonl")
    codes = [stock_code_row(r, held_out=True) for _ in range(NEW_QUESTIONS)]
    write_rows(codes, out / "stock-codes-held-out.jsonl")
    # Every skill at every effort, as often as the others.
    asked = list(islice(cycle(product(EFFORTS, BASE_SKILLS)), KEPT_QUESTIONS))
    write_rows(
        [held_out_row(r, family, effort) for effort, family in asked], out / "base-skills-held-out.jsonl"
    )


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
