"""One training session of a run, from base and data to the saved adapter."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import set_seed

from finetune.chat import HarmonyEncoder
from finetune.data import Prepared, prepare_data
from finetune.data.packing import PackedDataset
from finetune.errors import FinetuneError
from finetune.model import add_lora, fingerprint, hash_frozen, load_model, resolve, save_adapter
from finetune.model.recompute import keep_all_inputs, keep_attention
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from finetune.train.checkpoint import require_whole, whole_directory
from finetune.train.coverage import StopWithoutGradient
from finetune.train.profile import StepProfile
from finetune.train.progress import MetricsFile, ProgressDisplay
from finetune.train.settings import StepPlan, training_arguments
from finetune.train.stop import StopOnSignal
from finetune.train.trainer import PackTrainer


@dataclass(frozen=True)
class Outcome:
    """Where training ended; `stopped` if by a signal before its last step."""

    stopped: bool
    step: int
    steps: int


def fit(recipe: Recipe, run: RunDir, state: PartialState, console: Console) -> Outcome:
    """Train the recipe's adapter in `run`, from its latest checkpoint if it has one.

    Raises:
        FinetuneError: the base, the data or a checkpoint is not usable, an expert gets no gradient, the
            loss is not a number, the frozen weights changed, or the disk is full.
    """
    base = _base(recipe)
    data = _prepare(recipe, base, run.cache, state)
    plan = StepPlan.of(recipe, state.num_processes)
    going_on = run.latest_checkpoint()
    if going_on:
        require_whole(going_on)
    if state.is_main_process:
        _record_inputs(recipe, run, base, data, plan)
        _announce(console, data, plan, going_on)

    model, tokenizer = _load(recipe, state)
    frozen = hash_frozen(model) if recipe.train.verify_frozen and state.is_main_process else None
    save = partial(save_adapter, model, base=base, where=recipe.model.base)
    metrics, stop = MetricsFile(run.metrics), StopOnSignal()
    display = ProgressDisplay(console, metrics)
    trainer = PackTrainer(
        recipe=recipe,
        model=model,
        arguments=training_arguments(
            recipe, run.path, plan, held_out=len(data.held_out) > 0, going_on=going_on is not None
        ),
        tokenizer=tokenizer,
        packs=PackedDataset(data.train, plan.tokens_per_pass, recipe.train.seed),
        held_out=PackedDataset(data.held_out, plan.tokens_per_pass, recipe.train.seed),
        run=run,
        save_adapter=save,
        callbacks=[
            metrics,
            *([display] if state.is_main_process else []),
            stop,
            StopWithoutGradient(model, run),
            *([StepProfile(run.path / "profile")] if recipe.train.profile else []),
        ],
    )
    began = time.monotonic()
    stop.install()
    try:
        trainer.train(resume_from_checkpoint=str(going_on) if going_on else None)
    finally:
        stop.uninstall()
        display.close()

    if state.is_main_process:
        _add_seconds(run, time.monotonic() - began)
        if frozen is not None:
            _verify_frozen(run, frozen, hash_frozen(model))
        if not stop.stopped:
            with whole_directory(run.adapter) as part:
                save(part)
    outcome = Outcome(stop.stopped, trainer.state.global_step, trainer.state.max_steps)
    del trainer, model, save
    _free_memory()
    return outcome


def _base(recipe: Recipe) -> Path:
    place = resolve(recipe.model.base)
    if place.adapter is not None:
        raise FinetuneError(
            "model.base names a tuned model; a new adapter needs a base, or a model merged from the two",
            at=recipe.at("model", "base"),
        )
    return place.base


def _prepare(recipe: Recipe, base: Path, cache: Path, state: PartialState) -> Prepared:
    """The examples; the first process of each machine tokenises them, the others then read its cache."""
    encoder = HarmonyEncoder.from_dir(base)
    with state.local_main_process_first():
        return prepare_data(recipe, encoder, cache_dir=cache)


def _load(recipe: Recipe, state: PartialState) -> tuple[Any, Any]:
    """The base with a new adapter, which begins the same on every process and in every session of a run."""
    base = recipe.model
    model, tokenizer = load_model(
        base.base,
        dtype=torch.float32 if base.dense == "float32" else torch.bfloat16,
        device=state.device,
        nf4=base.dense == "nf4",
        experts_on=base.experts_on,
    )
    if recipe.train.offload_activations:
        keep_all_inputs(model)
    keep_attention(model, recipe.train.keep_attention)
    set_seed(recipe.train.seed)
    lora = recipe.lora
    return add_lora(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora
    ), tokenizer


def _record_inputs(recipe: Recipe, run: RunDir, base: Path, data: Prepared, plan: StepPlan) -> None:
    """Note base and data in run.json; a run that goes on must find the same ones."""
    report = data.report
    print_base, print_data = fingerprint(base), report.fingerprint
    before = run.info()
    for what, now in (("base", print_base), ("data", print_data)):
        if before.get(what, {}).get("fingerprint", now) != now:
            raise FinetuneError(
                f"the {what} changed since this run began, so it cannot go on: start a new run",
                at=str(run.path),
            )
    run.update(
        status="training",
        base={"where": recipe.model.base, "fingerprint": print_base},
        data={
            "fingerprint": print_data,
            "rows": report.rows,
            "tokens": report.tokens,
            "learned_tokens": report.learned_tokens,
            "train_examples": report.train_examples,
            "held_out_examples": report.held_out_examples,
        },
        tokens_per_step=plan.tokens_per_step,
    )


def _announce(console: Console, data: Prepared, plan: StepPlan, going_on: Path | None) -> None:
    console.print(f"{len(data.train):,} examples to learn from, {len(data.held_out):,} held out; {plan}")
    if going_on:
        console.print(f"going on from {going_on.name}")


def _add_seconds(run: RunDir, seconds: float) -> None:
    """Training time counts over all sessions of a run."""
    before = run.info().get("seconds", {})
    run.update(seconds={**before, "training": round(before.get("training", 0.0) + seconds, 1)})


def _free_memory() -> None:
    """The trainer and its callbacks refer to each other: without a collection the model would stay."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _verify_frozen(run: RunDir, before: str, after: str) -> None:
    run.update(frozen={"before": before, "after": after})
    if before != after:
        raise FinetuneError("the frozen weights changed during training, which is a bug: please report it")
