"""From a recipe to the settings of TRL's trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.train.surroundings import wanted_packages

_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}

# Evaluation at the end only: an interval that no run reaches.
_NEVER = 10**9


@dataclass(frozen=True)
class StepPlan:
    """How an optimiser step is made of passes: each process runs `passes` packs of `tokens_per_pass`."""

    tokens_per_pass: int
    passes: int
    processes: int
    asked: int

    @classmethod
    def of(cls, recipe: Recipe, processes: int) -> StepPlan:
        asked, each = recipe.train.tokens_per_step, recipe.tokens_per_pass
        return cls(each, max(1, round(asked / (each * processes))), processes, asked)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all processes when every pack is full."""
        return self.tokens_per_pass * self.passes * self.processes

    def __str__(self) -> str:
        text = f"up to {self.tokens_per_step:,} tokens a step"
        parts = [f"{self.processes} processes"] if self.processes > 1 else []
        parts += [f"{self.passes} passes"] if self.passes > 1 else []
        text += f" ({' x '.join([*parts, f'{self.tokens_per_pass:,} tokens'])})" if parts else ""
        return text if self.tokens_per_step == self.asked else f"{text}; the recipe asks for {self.asked:,}"


def training_arguments(recipe: Recipe, run: Path, plan: StepPlan, *, held_out: bool, going_on: bool) -> Any:
    """The SFTConfig for a recipe.

    Raises:
        FinetuneError: bitsandbytes or W&B is asked for and its package is missing.
    """
    from trl import SFTConfig

    train = recipe.train
    _require_packages(recipe)
    arguments = SFTConfig(
        output_dir=str(run / "checkpoints"),
        use_cpu=not torch.cuda.is_available(),
        seed=train.seed,
        data_seed=train.seed,
        # Batches: one pack a pass, made by our own packing.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.passes,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        dataloader_pin_memory=torch.cuda.is_available(),
        # The optimisation.
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        optim=_OPTIMIZERS[train.optimizer],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        router_aux_loss_coef=train.router_aux_loss,
        # The model's own dtype is what is computed in: no autocast.
        bf16=False,
        fp16=False,
        # On a CPU what is kept is on the host as it is.
        activation_offloading=train.offload_activations and torch.cuda.is_available(),
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        use_cache=False,
        # Every trained tensor gets a gradient in every pass, even if a zero one: an expert's LoRA is a slice.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # When to save, measure and tell.
        save_strategy="steps",
        save_steps=train.save_every_steps,
        save_total_limit=train.keep_checkpoints,
        eval_strategy="steps" if held_out else "no",
        eval_steps=train.eval_every_steps or _NEVER,
        eval_on_start=held_out and not going_on,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=["none"] if recipe.tracking.wandb == "off" else ["wandb"],
        run_name=run.name,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    # Unless told otherwise, it takes the launcher's --mixed_precision.
    arguments.mixed_precision = "no"
    return arguments


def _require_packages(recipe: Recipe) -> None:
    for package, (section, key, value) in wanted_packages(recipe).items():
        try:
            __import__(package)
        except ImportError as error:
            raise FinetuneError(
                f"{section}.{key}: {value} needs the package {package}, which does not load here: {error}",
                at=recipe.at(section, key),
            ) from error
