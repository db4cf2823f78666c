"""How GGUF's `gpt-oss` lays out what the release holds: names, number formats, and MXFP4's nibbles.

Names and formats are those of llama.cpp's convert_hf_to_gguf.py. An MXFP4 row there holds, for every 32
values, the scale byte and then 16 bytes of which byte j holds value j (low nibble) and value j + 16 (high);
the release puts values 2j and 2j + 1 into byte j. The values are the same, so nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
# blk.N.<ours> : model.layers.N.<released>
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
}
# Name, expert parameter, and which of its output rows: gate and up are interleaved in the release.
EVERY, GATE, UP = slice(None), slice(0, None, 2), slice(1, None, 2)
EXPERTS = {
    "ffn_gate_exps": ("mlp.experts.gate_up_proj", GATE),
    "ffn_up_exps": ("mlp.experts.gate_up_proj", UP),
    "ffn_down_exps": ("mlp.experts.down_proj", EVERY),
}
# llama.cpp keeps vectors and the router in float32.
BF16_NAMES = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output")
HALF = 8  # bytes of the release that hold values 0..15 of a block


def in_bf16(name: str) -> bool:
    """Whether GGUF's tensor `blk.3.attn_q.weight` and the like is kept in bf16."""
    return name.endswith(".weight") and name.split(".")[-2] in BF16_NAMES


def pack_rows(blocks: Tensor, scales: Tensor) -> Tensor:
    """`blocks [..., in/32, 16]` and `scales [..., in/32]` of the release as GGUF rows `[..., in/32 * 17]`."""
    low, high = blocks[..., :HALF], blocks[..., HALF:]
    even = (low & 15) | (high << 4)
    odd = (low >> 4) | (high & 0xF0)
    bytes_ = torch.stack([even, odd], dim=-1).flatten(-2)
    return torch.cat([scales.unsqueeze(-1), bytes_], dim=-1).flatten(-2)


def unpack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of `pack_rows`."""
    blocks = rows.unflatten(-1, (-1, 1 + 2 * HALF))
    even, odd = blocks[..., 1::2], blocks[..., 2::2]
    low = (even & 15) | (odd << 4)
    high = (even >> 4) | (odd & 0xF0)
    return torch.cat([low, high], dim=-1), blocks[..., 0].contiguous()
