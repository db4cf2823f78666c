"""Names and shapes of a gpt-oss checkpoint, as OpenAI released it and as merged to bf16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# MXFP4: 32 values of 4 bits share one scale.
BLOCK = 32
BYTES_PER_BLOCK = BLOCK // 2


def expected_tensors(config: dict[str, Any], *, packed: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Released name and shape of every tensor of a gpt-oss with this configuration."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    head, heads, key_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    experts = config["num_local_experts"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "lm_head.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "self_attn.sinks", (heads,)
        for name, outputs, inputs in (
            ("q_proj", heads * head, hidden), ("k_proj", key_heads * head, hidden),
            ("v_proj", key_heads * head, hidden), ("o_proj", hidden, heads * head),
        ):  # fmt: skip
            yield f"{layer}self_attn.{name}.weight", (outputs, inputs)
            yield f"{layer}self_attn.{name}.bias", (outputs,)
        yield layer + "mlp.router.weight", (experts, hidden)
        yield layer + "mlp.router.bias", (experts,)
        yield from _expected_experts(layer + "mlp.experts.", config, packed)


def _expected_experts(
    prefix: str, config: dict[str, Any], packed: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    experts = config["num_local_experts"]
    sizes = ("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)
    for name, outputs, inputs in sizes:
        if packed:
            yield f"{prefix}{name}_blocks", (experts, outputs, inputs // BLOCK, BYTES_PER_BLOCK)
            yield f"{prefix}{name}_scales", (experts, outputs, inputs // BLOCK)
        else:
            yield f"{prefix}{name}", (experts, inputs, outputs)
        yield f"{prefix}{name}_bias", (experts, outputs)
