"""Families of questions about whole numbers."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from finetune.nano.problem import Problem, by_effort

PLACES = ("ones", "tens", "hundreds", "thousands")


def digits(number: int) -> list[int]:
    """The decimal digits, ones first."""
    return [int(d) for d in reversed(str(number))]


def number(r: Random, largest: int) -> int:
    """A number below `largest`, short ones as often as long ones."""
    return r.randrange(10 ** r.randint(1, len(str(largest - 1))))


def named(steps: list[str]) -> str:
    return ", ".join(f"{place} {step}" for place, step in zip(PLACES, steps, strict=False))


def add_steps(a: int, b: int) -> list[str]:
    """Column addition, ones first: "7+6=13", then "4+8+1=13" where the one is carried."""
    x, y = digits(a), digits(b)
    steps, carry = [], 0
    for i in range(max(len(x), len(y))):
        terms = [column[i] for column in (x, y) if i < len(column)] + [1] * carry
        total = sum(terms)
        steps.append("+".join(map(str, terms)) + f"={total}")
        carry = total // 10
    return steps


def subtract_steps(a: int, b: int) -> list[str]:
    """Column subtraction for a >= b, ones first: "12-7=5", then "4-1-2=1" where the one was borrowed."""
    x, y = digits(a), digits(b)
    steps, borrow = [], 0
    for i, top in enumerate(x):
        terms = [1] * borrow + ([y[i]] if i < len(y) else [])
        lent = 10 if top < sum(terms) else 0
        steps.append("-".join(map(str, [top + lent, *terms])) + f"={top + lent - sum(terms)}")
        borrow = 1 if lent else 0
    return steps


def multiply_steps(a: int, b: int) -> list[str]:
    """A digit times a number, ones first: "7*8=56", then "7*4+5=33" where the five is carried."""
    steps, carry = [], 0
    for digit in digits(b):
        total = a * digit + carry
        steps.append(f"{a}*{digit}" + (f"+{carry}" if carry else "") + f"={total}")
        carry = total // 10
    return steps


def add(r: Random) -> Problem:
    a, b = number(r, 1000), number(r, 1000)
    templates = ("What is {} plus {}?", "Add {} and {}.", "{} + {} = ?", "Sum of {} and {}?")
    question = r.choice(templates).format(a, b)
    steps = add_steps(a, b)
    medium = named(steps)
    thinking = by_effort(" ".join(steps), medium, f"{medium}. Check: {a + b}-{b}={a}")
    return Problem("add", f"{min(a, b)}+{max(a, b)}", question, thinking, str(a + b))


def subtract(r: Random) -> Problem:
    b, a = sorted((number(r, 1000), number(r, 1000)))
    templates = (
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "{a} - {b} = ?",
        "Take {b} away from {a}.",
    )
    steps = subtract_steps(a, b)
    medium = named(steps)
    thinking = by_effort(" ".join(steps), medium, f"{medium}. Check: {a - b}+{b}={a}")
    return Problem("subtract", f"{a}-{b}", r.choice(templates).format(a=a, b=b), thinking, str(a - b))


def multiply(r: Random) -> Problem:
    a, b = r.randint(2, 9), number(r, 1000)
    templates = ("What is {} times {}?", "Multiply {} by {}.", "{} * {} = ?")
    steps = multiply_steps(a, b)
    medium = named(steps)
    parts = [str(a * d * 10**i) for i, d in enumerate(digits(b))]
    thinking = by_effort(" ".join(steps), medium, f"{medium}. Check: {'+'.join(parts)}={a * b}")
    key = f"{min(a, b)}*{max(a, b)}"
    return Problem("multiply", key, r.choice(templates).format(a, b), thinking, str(a * b))


def extreme(r: Random, family: str, word: str) -> Problem:
    numbers = [number(r, 1000) for _ in range(r.randint(3, 5))]
    best = max if family == "largest" else min
    listed = ", ".join(map(str, numbers))
    templates = (
        "Which is the {} of {}?",
        "Find the {}: {}.",
        "{} number in {}?",
        "What is the {} number: {}?",
    )
    template = r.choice(templates)
    question = template.format(word.capitalize() if template.startswith("{}") else word, listed)
    # The best number so far, after each number that is read.
    so_far = [str(best(numbers[: i + 1])) for i in range(len(numbers))]
    medium = f"so far {', '.join(so_far)}"
    sign = ">=" if family == "largest" else "<="
    check = ", ".join(f"{so_far[-1]}{sign}{n}" for n in numbers)
    thinking = by_effort(" ".join(so_far), medium, f"{medium}. Check: {check}")
    return Problem(family, listed, question, thinking, so_far[-1])


def largest(r: Random) -> Problem:
    return extreme(r, "largest", r.choice(("largest", "biggest")))


def smallest(r: Random) -> Problem:
    return extreme(r, "smallest", r.choice(("smallest", "lowest")))


def even_odd(r: Random) -> Problem:
    n = number(r, 10_000)
    answer = "odd" if n % 2 else "even"
    templates = ("Is {} even or odd?", "Even or odd: {}?", "Tell me whether {} is odd or even.")
    last = n % 10
    medium = f"last digit {last} is {answer}"
    half = f"{last // 2}+{last // 2}" + ("+1" if n % 2 else "")
    thinking = by_effort(f"{last}", medium, f"{medium}. Check: {last}={half}")
    return Problem("even_odd", str(n), r.choice(templates).format(n), thinking, answer)


def compare(r: Random) -> Problem:
    a = number(r, 10_000)
    # Close numbers half of the time: otherwise the first digit nearly always decides.
    b = (
        number(r, 10_000)
        if r.random() < 0.5
        else max(0, a + r.choice((-1, 1)) * r.choice((1, 3, 10, 20, 100)))
    )
    if a == b:
        b += 1
    templates = ("Which is larger, {} or {}?", "Larger of {} and {}?", "Is {} or {} the larger number?")
    x, y = str(a), str(b)
    steps = []
    if len(x) != len(y):
        steps.append(f"{len(x)}{'>' if len(x) > len(y) else '<'}{len(y)} digits")
    else:
        for i, j in zip(x, y, strict=True):
            steps.append(f"{i}{'=' if i == j else '>' if i > j else '<'}{j}")
            if i != j:
                break
    medium = f"compare {', '.join(steps)}, so {max(a, b)}"
    thinking = by_effort(" ".join(steps), medium, f"{medium}. Check: {max(a, b)}>{min(a, b)}")
    key = f"{min(a, b)},{max(a, b)}"
    return Problem("compare", key, r.choice(templates).format(a, b), thinking, str(max(a, b)))


def sequence(r: Random) -> Problem:
    step, shown = r.randint(1, 12), r.randint(3, 5)
    start = r.randint(0, 99)
    terms = [start + step * i for i in range(shown + 1)]
    if r.random() < 0.3:
        terms.reverse()
        step = -step
    listed = ", ".join(map(str, terms[:-1]))
    templates = ("What comes next: {}?", "Next number: {}, ...", "Continue the sequence {}.")
    last, answer = terms[-2], terms[-1]
    gaps = [f"{b}-{a}={b - a}" for a, b in pairwise(terms[:-1])]
    step_text = f"{last}{step:+d}={answer}"
    thinking = by_effort(
        step_text, f"step {gaps[0]}, next {step_text}", f"steps {', '.join(gaps)}, next {step_text}"
    )
    return Problem("sequence", listed, r.choice(templates).format(listed), thinking, str(answer))
