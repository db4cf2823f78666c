"""What `finetune eval` measures: a run by its recipe, a model without one by a file of questions."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.evaluate.summary import Summary
    from finetune.recipe import EvalSpec


def measure(
    where: str, overrides: Sequence[str], *, task: Path | None, metric: str, limit: int | None
) -> Summary:
    """Evaluate `where`; the rows of `task` stand for the recipe's tasks.

    What a run writes for a `task` or under a `limit` goes to a folder in eval/, beside the whole evaluation.

    Raises:
        FinetuneError: as `evaluate`, or an override that a model without a run has no use for.
    """
    from finetune.evaluate.subject import find_run, require_model

    changes = [*([_as_override(task, metric)] if task else []), *overrides]
    require_model(where)
    from finetune.evaluate.compare import evaluate

    if find_run(where):
        aside = _name(task) if task else f"first-{limit}" if limit else None
        return evaluate(where, overrides=changes, limit=limit, aside=aside)
    return evaluate(where, spec=_eval_section(changes), limit=limit)


def _as_override(task: Path, metric: str) -> str:
    if not task.is_file():
        raise FinetuneError("there is no such file of questions", at=str(task))
    # JSON is YAML.
    return "eval.tasks=" + json.dumps([{"name": _name(task), "path": str(task.resolve()), "metric": metric}])


def _name(task: Path) -> str:
    """Results are filed under the task's name, so it keeps to what every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", task.stem).lstrip(".-_") or "task"


def _eval_section(changes: Sequence[str]) -> EvalSpec:
    """The defaults with changes to `eval`, checked like those of any recipe."""
    from finetune.recipe import load_recipe

    for change in changes:
        if not change.startswith("eval."):
            raise FinetuneError(
                "a model without a run has no recipe: only eval settings can be given", at=change
            )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text("name: eval\nmodel: {base: nano}\ndata: {train: [unused.jsonl]}\n", encoding="utf-8")
        return load_recipe(file, changes).eval
