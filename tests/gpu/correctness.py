"""Is everything right on this device? Prints one JSON object: for each check its error and what is allowed.

python -m tests.gpu.correctness [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from finetune.model import add_lora, load_base
from finetune.model.attention import NAME, Packing, attend_packed, use_packed_attention
from finetune.model.kernels.stream import ExpertStream
from tests.checkpoints import write_random_checkpoint
from tests.gpu import layer
from tests.gpu.models import take_the_gpu_path
from tests.gpu.steps import Stepper, with_fused_head
from tests.unit.test_model_attention import positions

# Relative to the norm: a bfloat16 is off by up to 2 ** -9, and a result passes some ten roundings.
BF16 = 2**-6
# Losses are means over many tokens, whose roundings cancel.
LOSS = 5e-3
# Over a whole model some tokens change experts when their scores are rounded.
WHOLE_MODEL = 0.1

Errors = dict[str, tuple[float, float]]  # found, allowed
Check = Callable[[torch.device], Errors]


def _norm_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN counts as infinite."""
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def kernels(device: torch.device) -> Errors:
    """Every Triton kernel, and the small expert layer on them, in a process of their own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.interpreted_kernels", device.type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    of_layer = found.pop("whole layer")
    allowed = {"float32": 1e-5, "bfloat16": 2**-7}
    errors = {
        f"{name}, {dtype}": (error, allowed[dtype])
        for name, each in found.items()
        for dtype, error in each.items()
    }
    # Relative to the largest value, in bfloat16.
    return errors | {f"small layer, {name}": (error, 2**-4) for name, error in of_layer.items()}


def expert_layer(device: torch.device) -> Errors:
    """One layer's experts of 20b, forward and all gradients, in bfloat16 against float64."""
    case = layer.make_case(*(("20b", 1024) if device.type == "cuda" else ("tiny", 64)), device)
    pairs = zip(layer.NAMES, layer.run(case), layer.by_definition(case), strict=True)
    return {f"layer, {name}": (_norm_error(found, expected), BF16) for name, found, expected in pairs}


def streamed_experts(device: torch.device) -> Errors:
    """Experts in host memory give bit for bit what resident ones give, first and second step."""
    size = "20b" if device.type == "cuda" else "tiny"
    case = layer.make_case(size, 256, device)
    expected = layer.run(case)
    case.experts.keep_on_host(ExpertStream(device))
    case.experts.to("cpu").to(device)  # moves all but the packed bytes, which are on the host now
    found = [layer.run(case) for _ in range(3)][-1]
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return {"experts on host, differences": (0.0 if same else 1.0, 0.0)}


def attention(device: torch.device) -> Errors:
    """Packed attention, with and without a window, against dense attention in float64."""
    heads, key_heads, size = (64, 8, 64) if device.type == "cuda" else (4, 2, 8)
    where, random = positions([300, 1, 127, 128, 468]).to(device), torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, torch.bfloat16).requires_grad_()

    narrow = [values(1, heads, 1024, size), *(values(1, key_heads, 1024, size) for _ in "kv"), values(heads)]
    d_out, errors = values(1, heads, 1024, size).detach(), Errors()
    for window in (None, 128):
        query, key, value, sinks = narrow
        out = attend_packed(query, key, value, sinks, Packing(where, 128), window, size**-0.5)
        found = [out, *torch.autograd.grad(out, narrow, d_out)]
        wide = [t.detach().double().requires_grad_() for t in narrow]
        by_definition = _dense(wide, where, window)
        expected = [by_definition, *torch.autograd.grad(by_definition, wide, d_out.double())]
        for name, a, b in zip(("output", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
            errors[f"attention, window {window}, {name}"] = (_norm_error(a, b), BF16)
    return errors


def _dense(inputs: list[Tensor], where: Tensor, window: int | None) -> Tensor:
    """One softmax over all keys that may be seen and the sink, `[1, Hq, L, D]`."""
    query, key, value, sinks = inputs
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    document, place = (where == 0).cumsum(1), torch.arange(where.shape[1], device=where.device)
    seen = (document.unsqueeze(2) == document.unsqueeze(1)) & (place.unsqueeze(1) >= place)
    if window is not None:
        seen &= place.unsqueeze(1) - place < window
    scores = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    with_sink = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    return with_sink.softmax(-1)[..., :-1] @ value


def training(device: torch.device) -> Errors:
    """Three steps on this device in bfloat16 against the CPU's in float32, and against stock transformers."""
    with tempfile.TemporaryDirectory() as folder:
        # Sizes that FlexAttention and grouped products accept on a GPU.
        base = write_random_checkpoint(
            Path(folder) / "base", hidden=128, intermediate=128, heads=8, kv_heads=2, head_dim=64,
            experts=8, top_k=4, layers=2, vocab=512, sliding_window=128,
        )  # fmt: skip
        here = _losses_and_gradients(load_base(base, dtype=torch.bfloat16, device=device))
        cpu = _losses_and_gradients(load_base(base, dtype=torch.float32, device="cpu"))
        nf4 = _losses_and_gradients(load_base(base, dtype=torch.bfloat16, device=device, nf4=True))
        stock = _losses_and_gradients(_stock(base, device))
    errors = {}
    for name, other in (("the CPU's", cpu), ("stock transformers'", stock)):
        worst = max(abs(a - b) / b for a, b in zip(here[0], other[0], strict=True))
        errors[f"losses against {name}"] = (worst, LOSS)
        errors[f"gradients against {name}"] = (_norm_error(here[1], other[1]), WHOLE_MODEL)
    errors["losses over NF4 against bf16"] = (abs(nf4[0][-1] - here[0][-1]) / here[0][-1], 0.05)
    return errors


def _stock(base: Path, device: torch.device) -> Any:
    """transformers' own model and PEFT's own LoRA, on attention and masks of ours."""
    stock = GptOssForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation=NAME)
    use_packed_attention(stock)
    return stock.requires_grad_(False).to(device)


def _losses_and_gradients(base: Any, tokens: int = 512) -> tuple[list[float], Tensor]:
    """Of three steps of SGD-like size; gradients of the first step, all in one vector on the CPU."""
    torch.manual_seed(0)
    with_fused_head(base)
    model = add_lora(base, rank=8, alpha=16, targets=["attention", "experts"]).train()
    random = torch.Generator().manual_seed(0)
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    for _, parameter in named:  # lora_B begins at zero, and with it the gradient of lora_A
        parameter.data = (torch.randn(parameter.shape, generator=random) * 0.02).to(parameter.device)
    stepper = Stepper(model, tokens, tokens // 4, "adamw")
    stepper.loss().backward()
    gradients = torch.cat([p.grad.float().flatten().cpu() for _, p in named if p.grad is not None])
    model.zero_grad()
    return [stepper() for _ in range(3)], gradients


CHECKS: tuple[Check, ...] = (
    kernels, expert_layer, streamed_experts, attention, training,
)  # fmt: skip


def check(device: torch.device) -> dict[str, Any]:
    """Every check's figures; one that breaks does not keep the others from running."""
    report: dict[str, Any] = {}
    for each in CHECKS:
        began = time.perf_counter()
        try:
            errors = each(device)
            wrong = [name for name, (found, allowed) in errors.items() if not found <= allowed]
            report[each.__name__] = {"right": not wrong, "wrong": wrong, "errors": errors}
        except Exception:  # whatever goes wrong on a device that nobody has tried yet is worth a line
            report[each.__name__] = {"right": False, "wrong": [traceback.format_exc()[-1500:]], "errors": {}}
        report[each.__name__]["seconds"] = round(time.perf_counter() - began, 1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cpu":
        take_the_gpu_path()
    print(json.dumps(check(device)))


if __name__ == "__main__":
    main()
