"""What `finetune new` writes: a recipe with a comment on every key, and two rows to replace."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.errors import FinetuneError, writing

_RECIPE = """\
# Every setting: finetune check recipe.yaml shows them all, with their defaults.

# Runs are written to runs/<name>-<time>.
name: {name}

model:
  # nano is the small model that comes with finetune; then openai/gpt-oss-20b, or a folder with a checkpoint.
  base: nano
  # The dtype of attention, embeddings and the computation: float32 suits nano, bf16 the large models.
  dense: float32

lora:
  # Size of the adapter; its effect is scaled by alpha / rank.
  rank: 16
  # Twice the rank is a common start.
  alpha: 32
  # Attention and every expert; add router to let it send tokens elsewhere.
  targets: [attention, experts]

data:
  # Your conversations: JSONL, JSON, Parquet or CSV. Two examples are there to replace.
  train: [{{path: data/train.jsonl}}]
  # A share of the rows to keep from training and measure on, such as 0.05, or a path; 0 keeps none.
  held_out: 0
  # Learn the last turn of a conversation; all_turns makes an example of each.
  learn: last_turn
  # Longest example in tokens; a longer one stops the run (too_long: drop or truncate says otherwise).
  max_tokens: 1024

train:
  # Passes over the data.
  epochs: 1
  # Tokens between two updates; 65536 suits the large models.
  tokens_per_step: 4096
  # 2e-4 suits the large models.
  learning_rate: 2e-3

eval:
  # Questions to compare base and tuned model on, as in [{{name: mine, path: data/test.jsonl}}].
  tasks: []

export:
  # What to write after training.
  formats: [adapter]
"""

_ROWS = [
    {
        "messages": [
            {"role": "system", "content": "You answer for the library of Elm Street."},
            {"role": "user", "content": "When do you close on Saturdays?"},
            {
                "role": "assistant",
                "thinking": "They ask for the closing time on Saturdays: four o'clock.",
                "content": "On Saturdays we close at four o'clock.",
            },
        ],
        "reasoning_effort": "low",
    },
    {
        "messages": [
            {"role": "system", "content": "You answer for the library of Elm Street."},
            {"role": "user", "content": "Can I keep a book for longer?"},
            {
                "role": "assistant",
                "content": "Yes: renew it once, for two more weeks, at the desk or by phone.",
            },
        ]
    },
]


def write_starter(folder: Path) -> list[Path]:
    """Write recipe.yaml and data/train.jsonl in a new folder, and return their paths.

    Raises:
        FinetuneError: the folder has something in it, its name cannot name a run, or it cannot be written.
    """
    name = folder.resolve().name
    if (
        not name
        or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
        or not name[0].isalnum()
    ):
        raise FinetuneError(f"{name!r} cannot name a run: use letters, digits, dots, dashes and underscores")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FinetuneError("this is there already; choose another name", at=str(folder))
    recipe, rows = folder / "recipe.yaml", folder / "data" / "train.jsonl"
    with writing(folder):
        rows.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(_RECIPE.format(name=name), encoding="utf-8")
        rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS), encoding="utf-8")
    return [recipe, rows]
