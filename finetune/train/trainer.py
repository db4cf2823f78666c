"""TRL's SFTTrainer over packs that are ready to run, with checkpoints that hold no pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import trl.trainer.utils
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback
from trl import SFTTrainer

from finetune.data.packing import collate
from finetune.model.cpu_settings import keep_freed_memory, multiply_float32_fast, score_in_small_tiles
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from finetune.train import checkpoint
from finetune.train.schedule import learning_rate_factor

_IGNORED = -100
# Packs are padded to a multiple of so many tokens: for every new length libraries compile programs anew.
LENGTHS = 32


class Packs(Protocol):
    """Packed sequences: [i] gives input_ids, labels (not shifted) and position_ids, each int64 [L]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class PackTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """Trains `model`, a PeftModel, on `packs`.

    What differs from SFTTrainer: the data come packed, the loss of a step is the mean over all learned tokens
    of all its passes and processes, held-out loss likewise over all held-out tokens, checkpoints are those of
    `finetune.train.checkpoint`, and nothing is reported to anyone.
    """

    control: Any

    def __init__(
        self,
        *,
        recipe: Recipe,
        model: nn.Module,
        arguments: Any,
        tokenizer: Any,
        packs: Packs,
        held_out: Packs,
        run: RunDir,
        save_adapter: Callable[[Path], None],
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.recipe, self.held_out, self.run, self.save_adapter = recipe, held_out, run, save_adapter
        super().__init__(
            model=model,
            args=arguments,
            # TRL takes nothing but a datasets.Dataset: it gets the packs' numbers, the collator fetches them.
            train_dataset=_numbers(len(packs)),
            eval_dataset=_numbers(len(held_out)) if len(held_out) else None,
            data_collator=lambda rows: _with_tokens([packs[row["pack"]] for row in rows]),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        _score_learned_positions_only()
        if self.args.device.type == "cpu":
            score_in_small_tiles()
            multiply_float32_fast()
            keep_freed_memory()
        _leave_frozen_tensors_alone(self.model)

    # The training step, as far as it is ours: which tokens it counts, and its loss.

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The passes of one optimiser step, and the number of tokens they learn from over all processes."""
        batches, learned = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(int(batch.pop("tokens")) for batch in batches), device=device)
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))
        return batches, learned

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This pass's part of the step's loss: nats per learned token of the step.

        DDP averages gradients over processes, so the part is multiplied by their number; TRL's own version
        does the same, and gathers three further figures from all processes at every pass.
        """
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        learned = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (
            -outputs.log_probs.sum() / torch.as_tensor(learned).clamp(min=1) * self.accelerator.num_processes
        )
        if self.aux_loss_enabled:
            loss = (
                loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
            )
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        train = self.recipe.train
        factor = partial(
            learning_rate_factor,
            steps=num_training_steps,
            warmup=math.ceil(train.warmup * num_training_steps),
            shape=train.schedule,
        )
        self.lr_scheduler, self._created_lr_scheduler = LambdaLR(optimizer or self.optimizer, factor), True
        return self.lr_scheduler

    def _run_epoch(self, **arguments: Any) -> None:
        """Going on from the last step's checkpoint, transformers would take one more step before it stops."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**arguments)

    # Held-out loss.

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss in nats over all learned tokens that are held out; each process takes every n-th pack."""
        self.model.eval()
        total, learned = 0.0, 0
        for batch in self._held_out_batches():
            outputs = self.model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
            total -= outputs.log_probs.double().sum().item()
            learned += int(outputs.label_mask.sum())
        # float64 through the gather: float32 would round a count of more than 16 million tokens.
        sums = torch.tensor([total, learned], dtype=torch.float64, device=self.args.device)
        total, learned = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"eval_loss": total / max(learned, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train()
        return metrics

    def _held_out_batches(self) -> Any:
        """As many batches on every process, which sharded models need: one that learns nothing fills up."""
        count, processes = len(self.held_out), self.accelerator.num_processes
        for start in range(0, math.ceil(count / processes) * processes, processes):
            index = start + self.accelerator.process_index
            batch = collate([self.held_out[min(index, count - 1)]], multiple=LENGTHS)
            if index >= count:
                batch["labels"].fill_(_IGNORED)
            yield batch

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        states = gather_object([checkpoint.random_state()])
        if self.accelerator.is_main_process:
            folder = self.run.path / "checkpoints" / f"step-{self.state.global_step:06d}"
            with checkpoint.whole_directory(folder) as part:
                self.save_adapter(part)
                checkpoint.save_state(part, self.model, self.optimizer, self.lr_scheduler, states)
                self.state.save_to_json(str(part / "trainer_state.json"))
            checkpoint.keep_newest(self.run.checkpoints(), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_adapter_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            folder = Path(checkpoint_folder)
            checkpoint.load_state(folder, self.model, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.restore_random_state(Path(checkpoint_folder), self.accelerator.process_index)

    def _send_telemetry(self) -> None:
        """TRL tells its makers that a training began; a run here is nobody else's business."""


def _with_tokens(packs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, and how many of its `tokens` are not padding."""
    tokens = sum(len(pack["input_ids"]) for pack in packs)
    return collate(packs, multiple=LENGTHS) | {"tokens": torch.tensor(tokens)}


def _numbers(count: int) -> Dataset:
    return Dataset.from_dict({"pack": list(range(count))})


def _score_learned_positions_only() -> None:
    """Spare the output head the positions without a label on the CPU too: a quarter of a
    step's time where 30% of the tokens are learned (hidden 128, vocabulary 2048).

    TRL does so on GPUs only, for there are devices whose compilers want the same shape every time.
    """
    trl.trainer.utils._use_triton = lambda device: True


def _leave_frozen_tensors_alone(model: nn.Module) -> None:
    """Keep DDP from broadcasting the base: every process has read the same file.

    Into memory-mapped weights the broadcast would write, and so make a private copy in each process.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
