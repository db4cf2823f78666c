"""The network while it is pretrained: transformers' gpt-oss, its experts trained through MXFP4 rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from finetune.model.mxfp4 import dequantise_mxfp4, quantise_mxfp4


class Swiglu(torch.autograd.Function):
    """gpt-oss's gate on interleaved rows `[tokens, 2 * intermediate]`, with half of autograd's saved tensors.

    out = (up + 1) * gate * sigmoid(alpha * gate), gate and up clamped to `limit` (the gate from above only).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, alpha: float, limit: float) -> Tensor:
        gate = rows[:, ::2].clamp(max=limit)
        sigmoid = torch.sigmoid(gate * alpha)
        ctx.save_for_backward(rows, sigmoid)
        ctx.alpha, ctx.limit = alpha, limit
        return rows[:, 1::2].clamp(-limit, limit).add_(1).mul_(gate).mul_(sigmoid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, sigmoid = ctx.saved_tensors
        gate = rows[:, ::2].clamp(max=ctx.limit)
        up = rows[:, 1::2].clamp(-ctx.limit, ctx.limit).add_(1)
        passed = grads[0] * sigmoid
        out = torch.empty_like(rows)
        out[:, 1::2] = (passed * gate).mul_(rows[:, 1::2].abs() <= ctx.limit)
        slope = (1 - sigmoid).mul_(gate).mul_(ctx.alpha).add_(1)
        out[:, ::2] = slope.mul_(up).mul_(passed).mul_(rows[:, ::2] <= ctx.limit)
        return out, None, None


class Experts(GptOssExperts):  # type: ignore[misc]  # transformers is untyped here
    """The stock experts (same parameters), sorted by expert so that each does one product over its tokens.

    Where `rounded` is true the weights are used as MXFP4 holds them; gradients pass the rounding unchanged.
    """

    rounded = False

    def weights(self) -> tuple[Tensor, Tensor]:
        """gate_up `[experts, hidden, 2 * intermediate]` and down `[experts, intermediate, hidden]`."""
        if not self.rounded:
            return self.gate_up_proj, self.down_proj
        return as_mxfp4(self.gate_up_proj), as_mxfp4(self.down_proj)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """`hidden_states [tokens, hidden]`, expert indices and weights `[tokens, k]`."""
        chosen = router_indices.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        gate_up, down = self.weights()
        rows = hidden_states[order // router_indices.shape[1]]
        rows = by_expert(rows, counts, gate_up, self.gate_up_proj_bias)
        rows = Swiglu.apply(  # type: ignore[no-untyped-call]
            rows, self.alpha, self.limit
        )
        rows = by_expert(rows, counts, down, self.down_proj_bias)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        rows = rows[back].view(*router_indices.shape, -1)
        return (rows * routing_weights.unsqueeze(-1)).sum(1)


def by_expert(rows: Tensor, counts: list[int], weights: Tensor, biases: Tensor) -> Tensor:
    """Each expert's linear map on its stretch of `rows`, which are sorted by expert."""
    # One unbind, not an index per expert: the gradient of an index fills a tensor of all experts with zeros.
    parts = zip(rows.split(counts), weights.unbind(0), biases.unbind(0), strict=True)
    return torch.cat([torch.addmm(bias, part, weight) for part, weight, bias in parts])


def as_mxfp4(weights: Tensor) -> Tensor:
    """`[experts, in, out]` as MXFP4 holds it, blocks along in; the gradient is that of the identity."""
    blocks, scales = quantise_mxfp4(weights.detach().transpose(1, 2).contiguous())
    rounded = dequantise_mxfp4(blocks, scales, torch.float32).transpose(1, 2)
    return weights + (rounded - weights.detach())


def build(config: GptOssConfig, seed: int, init: float) -> GptOssForCausalLM:
    """A fresh float32 network; weights normal with standard deviation `init`."""
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Experts
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "bias" not in name:
            nn.init.normal_(parameter, std=init)
    return model


def round_experts(model: GptOssForCausalLM, rounded: bool) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.rounded = rounded
