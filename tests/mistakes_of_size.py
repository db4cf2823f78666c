"""Mistakes about what training takes and where: see `tests.mistakes`."""

from __future__ import annotations

from tests.mistakes import Mistake, removed

NO_MEMORY = (
    "training takes ... GB at its peak, and this machine has ... GB: train.tokens_per_pass=... would make it "
    "fit, with ... GB; train.force_memory=true tries it all the same"
)

MISTAKES_OF_SIZE = [
    Mistake(
        "unknown GPU",
        ("check", "recipe.yaml", "--gpu", "h10"),
        "there is no GPU h10 in the table; did you mean h100-80? known are ...",
    ),
    Mistake(
        "data missing, asked about a GPU",
        ("check", "recipe.yaml", "--gpu", "h100-80"),
        "recipe.yaml:5: data.train.0.path: there is no file HERE/rows.jsonl",
        removed("rows.jsonl"),
    ),
    Mistake("no memory for the run", ("train", "recipe.yaml", "train.tokens_per_pass=900000000"), NO_MEMORY),
    Mistake(
        "no memory on a GPU",
        ("check", "recipe.yaml", "train.tokens_per_pass=90000000", "--gpu", "16gb"),
        NO_MEMORY.replace("this machine", "a 16 GB card (as an RTX 4080)"),
    ),
    Mistake(
        "no place of that name for experts",
        ("check", "recipe.yaml", "model.experts_on=hosts"),
        "override model.experts_on=hosts: model.experts_on: must be device or host, ... did you mean 'host'?",
    ),
    Mistake(
        "opponent is not installed",
        ("bench", "recipe.yaml", "--against", "unsloth"),
        "--against unsloth: the package unsloth is not installed here",
    ),
    Mistake(
        "unknown opponent",
        ("bench", "recipe.yaml", "--against", "axolotl"),
        "--against axolotl: known are trl and unsloth",
    ),
    Mistake(
        "figures are not JSON",
        ("bench", "recipe.yaml", "--out", "figures.txt"),
        "--out figures.txt: the figures are JSON, so the file's name ends in .json",
    ),
]
