"""The network that nano is trained as: the stock one, faster, and rounded the way its files are."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from finetune.model.mxfp4 import dequantise_mxfp4, quantise_mxfp4
from finetune.nano.network import as_mxfp4, build, round_experts
from finetune.nano.spec import NetworkSpec
from finetune.nano.write import network_config, released_tensors

SIZES = NetworkSpec(
    hidden_size=64,
    layers=2,
    experts=4,
    experts_per_token=2,
    intermediate_size=32,
    head_dim=16,
    heads=4,
    key_value_heads=2,
    sliding_window=8,
    rope_theta=10000,
    rope_original_positions=64,
    rope_factor=2.0,
    initial_std=0.2,
)


@pytest.fixture
def network() -> GptOssForCausalLM:
    return build(GptOssConfig.from_dict(network_config(SIZES)), seed=0, init=SIZES.initial_std)


def test_the_sorted_experts_compute_what_the_stock_experts_do(network: GptOssForCausalLM) -> None:
    stock = copy.deepcopy(network)
    for layer in stock.model.layers:
        layer.mlp.experts.__class__ = GptOssExperts
    ids = torch.randint(0, 1000, (3, 20))
    losses = [model(input_ids=ids, labels=ids).loss for model in (network, stock)]
    for computed in losses:
        computed.backward()
    torch.testing.assert_close(losses[0], losses[1])
    for ours, theirs in zip(network.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_rounded_experts_are_what_the_files_will_hold(network: GptOssForCausalLM) -> None:
    round_experts(network, True)
    experts = network.model.layers[0].mlp.experts
    stored = released_tensors(network.state_dict())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    held = dequantise_mxfp4(stored[f"{name}_blocks"], stored[f"{name}_scales"], torch.float32)
    torch.testing.assert_close(experts.weights()[0], held.transpose(1, 2), rtol=0, atol=0)


def test_gradients_pass_the_rounding_unchanged() -> None:
    weights = torch.randn(2, 32, 8, requires_grad=True)
    sent = torch.randn(2, 32, 8)
    as_mxfp4(weights).backward(sent)
    torch.testing.assert_close(weights.grad, sent, rtol=0, atol=0)
    blocks, scales = quantise_mxfp4(weights.detach().transpose(1, 2).contiguous())
    assert blocks.shape == (2, 8, 1, 16) and scales.shape == (2, 8, 1)
