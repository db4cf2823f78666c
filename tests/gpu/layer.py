"""One layer's experts of full size on random weights, and the same by the definition in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.model.expert_layer import Factors, run_experts
from tests.gpu.models import SIZES, random_experts
from tests.model_kit import decode_by_definition

NAMES = ("output", "x", "scores", "up A", "up B", "down A", "down B")
SCALE = 2.0  # of LoRA


class Case(NamedTuple):
    """`x` and `d_out [T, H]`, `indices` and `scores [T, k]`, A and B of both projections, float32."""

    experts: Any
    x: Tensor
    scores: Tensor
    indices: Tensor
    d_out: Tensor
    factors: list[Tensor]


def make_case(size: str, tokens: int, device: torch.device, rank: int = 16) -> Case:
    """In bfloat16, the router's choices as spread as random ones are."""
    experts, random = random_experts(size, device), torch.Generator(device).manual_seed(1)

    def values(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random, device=device) * std

    count, hidden = experts.num_experts, experts.hidden_size
    top, indices = values(tokens, count).topk(SIZES[size]["top_k"], dim=-1)
    (up_in, up_out), (down_in, down_out) = experts.features("gate_up_proj"), experts.features("down_proj")
    shapes = (count, rank, up_in), (count, up_out, rank), (count, rank, down_in), (count, down_out, rank)
    return Case(
        experts,
        values(tokens, hidden).bfloat16().requires_grad_(),
        top.softmax(-1).bfloat16().requires_grad_(),
        indices,
        values(tokens, hidden).bfloat16(),
        [values(*shape, std=0.02).requires_grad_() for shape in shapes],
    )


def run(case: Case) -> list[Tensor]:
    """The output, then the gradients of x, the scores and the factors."""
    up_a, up_b, down_a, down_b = case.factors
    up, down = Factors(up_a, up_b, SCALE), Factors(down_a, down_b, SCALE)
    out = run_experts(case.x, case.indices, case.scores, case.experts, up, down)
    return [out.detach(), *torch.autograd.grad(out, [case.x, case.scores, *case.factors], case.d_out)]


def by_definition(case: Case) -> list[Tensor]:
    """The same in float64 by autograd, expert by expert: the weights of one alone are there at a time."""
    wide = [t.detach().double().requires_grad_() for t in (case.x, case.scores, *case.factors)]
    grads = [torch.zeros_like(t) for t in wide]
    out = torch.zeros_like(wide[0])
    for expert in range(case.experts.num_experts):
        token, place = torch.where(case.indices == expert)
        if not token.numel():
            continue
        part = wide[1][token, place].unsqueeze(1) * _one_expert(
            case.experts, expert, wide[0][token], wide[2:]
        )
        found = torch.autograd.grad(part, wide, case.d_out[token].double())
        for total, grad in zip(grads, found, strict=True):
            total += grad
        out.index_add_(0, token, part.detach())
    return [out, *grads]


def _one_expert(experts: Any, expert: int, rows: Tensor, factors: list[Tensor]) -> Tensor:
    up_a, up_b, down_a, down_b = (factor[expert] for factor in factors)
    y = rows @ _weight(experts, "gate_up_proj", expert).t() + experts.gate_up_proj_bias[expert].double()
    y = y + SCALE * rows @ up_a.t() @ up_b.t()
    gate, up = y[:, 0::2].clamp(max=experts.limit), y[:, 1::2].clamp(-experts.limit, experts.limit)
    hidden = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    down = hidden @ _weight(experts, "down_proj", expert).t() + experts.down_proj_bias[expert].double()
    out: Tensor = down + SCALE * hidden @ down_a.t() @ down_b.t()
    return out


def _weight(experts: Any, name: str, expert: int) -> Tensor:
    blocks, scales = experts.get_parameter(name)[expert], experts.get_parameter(f"{name}_scales")[expert]
    return decode_by_definition(blocks.cpu(), scales.cpu()).to(blocks.device)
