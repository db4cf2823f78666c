"""Base against tuned: the held-out loss and every task of the recipe, measured with one base in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.chat import ToolCall
from finetune.chat.parse import parse_completion
from finetune.errors import FinetuneError, writing
from finetune.evaluate.answers import Answer
from finetune.evaluate.generation import generate
from finetune.evaluate.loss import held_out_loss
from finetune.evaluate.subject import Subject, Which, find_run, load_encoder, load_subject
from finetune.evaluate.summary import Score, Summary, TaskResult
from finetune.evaluate.tasks import Question, grade, read_questions
from finetune.recipe import EvalSpec, Recipe, load_recipe

if TYPE_CHECKING:
    from finetune.chat.encode import HarmonyEncoder
    from finetune.data.packing import PackedDataset
    from finetune.recipe import Task
    from finetune.rundir import RunDir


def evaluate(
    where: str | Path,
    *,
    overrides: Sequence[str] = (),
    spec: EvalSpec | None = None,
    limit: int | None = None,
    aside: str | None = None,
    console: Console | None = None,
) -> Summary:
    """Measure base and tuned model; writes eval/summary.json and eval/<task>.jsonl in the run.

    Args:
        where: a run; or one of its checkpoints, measured like the run and written to eval/ inside it; or a
            model without a run, which is measured on the tasks of `spec` alone, and nothing is written.
        overrides: changes to a run's recipe, `dotted.key=value`.
        spec: replaces the recipe's eval section.
        limit: at most so many questions of each task.
        aside: a folder in eval/ to write to instead, which leaves the run's own evaluation as it is.
        console: where progress is shown; standard error unless given.

    Raises:
        FinetuneError: nothing to measure, a bad task, overrides without a run, or an adapter of another base.
    """
    run = find_run(where)
    recipe = load_recipe(run.path / "recipe.yaml", overrides) if run else None
    if recipe is None and overrides:
        raise FinetuneError(
            f"this is not a run, so there is no recipe for {overrides[0]} to change", at=str(where)
        )
    spec = spec or (recipe.eval if recipe else EvalSpec())
    if recipe is None and not spec.tasks:
        raise FinetuneError(
            "this is not a run, so there are no held-out rows: name a task to measure it on", at=str(where)
        )
    notes: list[str] = []
    # Rows first: a bad task is found before minutes go into loading weights.
    questions = {task.name: read_questions(task, recipe, limit, notes.append) for task in spec.tasks}
    packs = _held_out(recipe, load_encoder(where), run) if recipe and run else None
    if not questions and packs is None:
        raise FinetuneError("there is nothing to measure: no task, and no rows were held out", at=str(where))
    subject = load_subject(where)
    with _progress(console) as progress:
        for note in notes:
            progress.console.print(note, markup=False)
        losses = _losses(subject, packs, progress) if packs is not None else {}
        answers = {
            task.name: _answers(subject, task, questions[task.name], spec, progress) for task in spec.tasks
        }
    results = {task.name: _result(task, answers[task.name]) for task in spec.tasks}
    summary = Summary(losses.get("base"), losses.get("tuned"), results)
    if run:
        inside = Path(where).resolve().parent
        folder = Path(where) / "eval" if inside.name == "checkpoints" else run.eval_dir
        _write(folder / aside if aside else folder, summary, questions, answers)
    return summary


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console or Console(stderr=True))


def _held_out(recipe: Recipe, encoder: HarmonyEncoder, run: RunDir) -> PackedDataset | None:
    """The run's held-out examples, packed as in training; None where nothing was held out."""
    from finetune.data import prepare_data
    from finetune.data.packing import PackedDataset

    examples = prepare_data(recipe, encoder, cache_dir=run.cache).held_out
    return PackedDataset(examples, recipe.tokens_per_pass, seed=0) if len(examples) else None


def _losses(subject: Subject, packs: PackedDataset, progress: Progress) -> dict[Which, float]:
    losses: dict[Which, float] = {}
    for which in subject.variants:
        bar = progress.add_task(f"held-out loss, {which}", total=len(packs))
        with subject.acting_as(which) as model:
            losses[which] = held_out_loss(model, packs, partial(progress.advance, bar))
    return losses


def _answers(
    subject: Subject, task: Task, questions: list[Question], spec: EvalSpec, progress: Progress
) -> dict[Which, list[Answer]]:
    prompts = [subject.encoder.prompt_ids(question.prompt) for question in questions]
    answers: dict[Which, list[Answer]] = {}
    for which in subject.variants:
        bar = progress.add_task(f"{task.name}, {which}", total=len(prompts))
        with subject.acting_as(which) as model:
            outputs = generate(
                model,
                subject.encoder,
                prompts,
                max_new_tokens=spec.max_new_tokens,
                batch_size=spec.batch_size,
                temperature=spec.temperature,
                seed=spec.seed,
                on_done=partial(progress.advance, bar),
            )
        answers[which] = []
        for question, ids in zip(questions, outputs, strict=True):
            completion = parse_completion(subject.encoder, ids)
            answers[which].append(Answer(completion, len(ids), grade(completion, question, task.metric)))
    return answers


def _result(task: Task, answers: dict[Which, list[Answer]]) -> TaskResult:
    scores = {which: Score(sum(a.right for a in given), len(given)) for which, given in answers.items()}
    counted = answers.get("tuned", answers["base"])
    return TaskResult(
        metric=task.metric,
        n=len(counted),
        base=scores["base"],
        tuned=scores.get("tuned"),
        empty=sum(answer.empty for answer in counted),
        truncated=sum(answer.truncated for answer in counted),
    )


def _write(
    folder: Path,
    summary: Summary,
    questions: dict[str, list[Question]],
    answers: dict[str, dict[Which, list[Answer]]],
) -> None:
    """The summary comes last: where it is, the files it sums up are whole."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, asked in questions.items():
            lines = [_line(question, answers[name], i) for i, question in enumerate(asked)]
            _replace(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        _replace(folder / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")


def _line(question: Question, answers: dict[Which, list[Answer]], i: int) -> str:
    expected = question.reference
    call = (
        {"name": expected.name, "arguments": expected.arguments} if isinstance(expected, ToolCall) else None
    )
    given = {which: each[i].to_dict() for which, each in answers.items()}
    return json.dumps({"question": question.text, "reference": call or expected, **given}, ensure_ascii=False)


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
