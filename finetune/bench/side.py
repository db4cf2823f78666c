"""One side of a benchmark, in a process of its own: finetune.bench.side SIDE WORK RESULT GRADIENTS."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from trl import SFTConfig, SFTTrainer

from finetune.bench.conditions import conditions, forget_peak, resident_gib
from finetune.bench.work import Measured, Side, Work
from finetune.model import load_adapter, load_base
from finetune.model.attention import NAME as PACKED_ATTENTION
from finetune.model.attention import use_packed_attention
from finetune.model.cpu_settings import keep_freed_memory, multiply_float32_fast, score_in_small_tiles

_OPTIMIZERS = {
    "adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
GIB = 2**30


def run(side: Side, work: Work, gradients: Path) -> Measured:
    """Train `work.warm_up + work.steps` steps; the gradients of the first go to a file."""
    if work.threads:
        torch.set_num_threads(work.threads)
    cuda = torch.cuda.is_available()
    libraries = resident_gib("VmRSS")
    model = _model(side, work)
    if not cuda:
        score_in_small_tiles()
        if side == "finetune":  # as `finetune train` does
            multiply_float32_fast()
            keep_freed_memory()
    if work.routing == "balanced":
        balance(model)
    loading = _peak_gb(cuda)
    _forget(cuda)
    clock = _Clock(gradients, cuda)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=_arguments(folder, work, cuda),
            train_dataset=_rows(work, model.config.vocab_size),
            data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]},
            processing_class=_no_tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    return Measured(
        step_seconds=[round(value, 5) for value in clock.seconds[work.warm_up :]],
        losses=clock.losses,
        peak_gb=round(_peak_gb(cuda), 4),
        libraries_gb=0.0 if cuda else round(libraries * GIB / 1e9, 4),
        loading_peak_gb=round(loading, 4),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        conditions=conditions(),
    )


def _model(side: Side, work: Work) -> Any:
    checkpoint, adapter = Path(work.checkpoint), Path(work.adapter)
    dtype = getattr(torch, work.dtype)
    if side == "finetune":
        return load_adapter(load_base(checkpoint, dtype=dtype), adapter, base=checkpoint, trainable=True)
    if side == "trl":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stock = GptOssForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=PACKED_ATTENTION, device_map={"": device}
        )
        use_packed_attention(stock)
        return PeftModel.from_pretrained(stock, str(adapter), is_trainable=True)
    return _unsloth_model(checkpoint, work)


def _unsloth_model(checkpoint: Path, work: Work) -> Any:
    """Unsloth patches attention and experts by itself; its adapter begins as its own seed makes it."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=work.tokens, dtype=getattr(torch, work.dtype), load_in_4bit=False
    )
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"] if "attention" in work.targets else []
    experts = ["gate_up_proj", "down_proj"] if "experts" in work.targets else []
    return FastLanguageModel.get_peft_model(
        model,
        r=work.rank,
        lora_alpha=2 * work.rank,
        target_modules=attention + experts,
        use_gradient_checkpointing="unsloth" if work.checkpointing else False,
    )


def balance(model: nn.Module) -> None:
    """Give every expert as many tokens as any other: token t goes to the k experts from t * k on.

    Scores stay those of the router for these experts, so that its gradient flows as it would.
    """

    def forward(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states, router.weight, router.bias)  # [T, E]
        first = torch.arange(logits.shape[0], device=logits.device).unsqueeze(1) * router.top_k
        indices = (first + torch.arange(router.top_k, device=logits.device)) % router.num_experts  # [T, k]
        return logits, logits.gather(1, indices).softmax(1), indices

    for module in model.modules():
        if isinstance(module, GptOssTopKRouter):
            module.forward = forward.__get__(module)


def _rows(work: Work, vocabulary: int) -> Dataset:
    """Random tokens, the same on both sides, with positions that restart at every document."""
    generator = torch.Generator().manual_seed(0)
    steps = work.warm_up + work.steps
    positions = (torch.arange(work.tokens) % work.document).tolist()
    ids = [torch.randint(0, vocabulary, (work.tokens,), generator=generator).tolist() for _ in range(steps)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": [positions] * steps})


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """TRL asks for one, although there is no text here."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def _arguments(folder: str, work: Work, cuda: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=folder,
        use_cpu=not cuda,
        bf16=False,
        seed=0,
        max_steps=work.warm_up + work.steps,
        per_device_train_batch_size=1,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=work.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if work.checkpointing else None,
        router_aux_loss_coef=0.0,
        optim=_OPTIMIZERS[work.optimizer],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Seconds and loss of every step, and the gradients of the first, a part of the warm-up."""

    def __init__(self, gradients: Path, cuda: bool) -> None:
        self.gradients, self.cuda = gradients, cuda
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 0:
            found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
            save_file({name: grad.float().cpu().contiguous() for name, grad in found.items()}, self.gradients)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._began)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _peak_gb(cuda: bool) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if cuda else resident_gib() * GIB / 1e9


def _forget(cuda: bool) -> None:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def main(words: Sequence[str]) -> None:
    """Write what was measured to RESULT."""
    side, work, result, gradients = words
    measured = run(side, Work.read(Path(work)), Path(gradients))  # type: ignore[arg-type]
    Path(result).write_text(json.dumps(measured.to_dict()))


if __name__ == "__main__":
    main(sys.argv[1:])
