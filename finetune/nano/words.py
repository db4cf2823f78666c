"""Families of questions about the letters of a word."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from finetune.nano.problem import LETTERS, Problem, by_effort, random_word

ORDINALS = ("first", "second", "third", "fourth", "fifth")


def reverse(r: Random) -> Problem:
    word = random_word(r)
    back = word[::-1]
    templates = (
        "Reverse the word {}.",
        "Spell backwards: {}.",
        "What is {} backwards?",
        "Turn the word {} around.",
    )
    medium = f"letters {word}, backwards {back}"
    thinking = by_effort(word, medium, f"{medium}. Check: {word}")
    return Problem("reverse", word, r.choice(templates).format(word), thinking, back)


def capitals(r: Random) -> Problem:
    word = random_word(r, 3, 8)
    templates = (
        "Write {} in capitals.",
        "Put into upper case: {}.",
        "Capital letters for the word {}, please.",
    )
    medium = f"letters {word}, capitals {word.upper()}"
    thinking = by_effort(word, medium, f"{medium}. Check: {word}")
    return Problem("capitals", word, r.choice(templates).format(word), thinking, word.upper())


def sort_letters(r: Random) -> Problem:
    word = random_word(r)
    ordered = "".join(sorted(word))
    templates = ("Sort the letters of {}.", "Put in alphabetical order: {}.", "Letters of {} from a to z?")
    medium = f"letters {word}, sorted {ordered}"
    pairs = pairwise(ordered)
    check = ordered[0] + "".join(("=" if a == b else "<") + b for a, b in pairs)
    thinking = by_effort(ordered, medium, f"{medium}. Check: {check}")
    return Problem("sort_letters", word, r.choice(templates).format(word), thinking, ordered)


def count_letter(r: Random) -> Problem:
    word = random_word(r, 3, 8)
    letter = r.choice(word) if r.random() < 0.8 else r.choice(LETTERS)
    if r.random() < 0.4:
        # A second place for the letter; otherwise nearly every answer is 0 or 1.
        i = r.randrange(len(word))
        word = word[:i] + letter + word[i + 1 :]
    templates = (
        "How many times is {letter} in {word}?",
        "Count the letter {letter} in {word}.",
        "How often does {word} contain {letter}?",
    )
    running = [f"{c}{word[: i + 1].count(letter)}" for i, c in enumerate(word)]
    total = word.count(letter)
    medium = f"count {letter}: {' '.join(running)}"
    thinking = by_effort("".join(running), medium, f"{medium}. Check: {letter * total or 'none'}")
    question = r.choice(templates).format(letter=letter, word=word)
    return Problem("count_letter", f"{letter} {word}", question, thinking, str(total))


def pick_letter(r: Random) -> Problem:
    word = random_word(r, 3, 8)
    place = r.choice((*ORDINALS[: len(word)], "last", "last"))
    position = len(word) if place == "last" else ORDINALS.index(place) + 1
    templates = (
        "What is the {place} letter of {word}?",
        "Name the {place} letter in {word}.",
        "Which letter is {place} in the word {word}?",
    )
    numbered = [f"{c}{i + 1}" for i, c in enumerate(word[:position])]
    letter = word[position - 1]
    medium = f"{' '.join(numbered)}, so {letter}"
    thinking = by_effort(
        "".join(numbered), medium, f"{medium}. Check: {len(word)} letters, {place} is {letter}"
    )
    question = r.choice(templates).format(place=place, word=word)
    return Problem("pick_letter", f"{place} {word}", question, thinking, letter)
