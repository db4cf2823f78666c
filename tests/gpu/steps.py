"""A training step as `finetune train` takes it, without data files and trainer around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model.recompute import keep_all_inputs

logger = logging.getLogger(__name__)


def optimizer_for(parameters: list[nn.Parameter], name: str) -> tuple[torch.optim.Optimizer, str]:
    """The recipe's optimizer, or torch's AdamW where bitsandbytes does not load; and which it is."""
    if name != "adamw":
        try:
            from bitsandbytes import optim

            kind = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[name]
            return kind(parameters, lr=2e-4), name
        except (ImportError, RuntimeError) as error:
            logger.warning("bitsandbytes does not load (%s): AdamW in float32", error)
    return torch.optim.AdamW(parameters, lr=2e-4, fused=parameters[0].is_cuda), "adamw"


def with_fused_head(model: Any) -> str:
    """Have `model(..., fused_lm_head=True)` score labels without logits; says who does."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    return "trl"


def offloading(model: nn.Module) -> AbstractContextManager[Any]:
    """TRL's context in which activations go to the host."""
    keep_all_inputs(model)
    if not torch.cuda.is_available():
        return nullcontext()
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    context: AbstractContextManager[Any] = get_act_offloading_ctx_manager(model=model)
    return context


class Stepper:
    """Steps of one pass on the same packed ids: documents of `document` tokens, every token learned from."""

    def __init__(self, model: Any, tokens: int, document: int, optimizer: str, offload: bool = False) -> None:
        self.model = model
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.optimizer_name = optimizer_for(self.trained, optimizer)
        self.offload: Callable[[], AbstractContextManager[Any]] = nullcontext
        if offload:
            context = offloading(model)
            self.offload = lambda: context
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=random)
        self.batch = {
            "input_ids": ids.to(self.device),
            "labels": ids.to(self.device),
            "position_ids": (torch.arange(tokens) % document).unsqueeze(0).to(self.device),
        }

    def loss(self) -> Tensor:
        """Mean over the pack's tokens, in nats."""
        outputs = self.model(**self.batch, use_cache=False, fused_lm_head=True)
        loss: Tensor = -outputs.log_probs.sum() / outputs.label_mask.sum()
        return loss

    def __call__(self) -> float:
        """One step of the optimizer; returns the loss before it."""
        with self.offload():
            loss = self.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
