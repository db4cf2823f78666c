"""How GGUF's `gpt-oss` lays out what the release holds: names, number formats, and MXFP4's nibbles.

Names and formats are those of llama.cpp's convert_hf_to_gguf.py. An MXFP4 row there holds, for every 32
values, the scale byte and then 16 bytes of which byte j holds value j (low nibble) and value j + 16 (high);
the release puts values 2j and 2j + 1 into byte j. The values are the same, so nothing is rounded.
"""

from __future__ import annotations

import numpy as np
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
# llama.cpp keeps vectors and the router in float32, and all else that is not an expert in fewer bits.
LARGE = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output")
HALF = 8  # bytes of the release that hold values 0..15 of a block
# Eight low nibbles, as one number of 64 bits.
LOW = 0x0F0F0F0F0F0F0F0F
ROW_OF_BLOCK = np.dtype([("scale", "u1"), ("codes", "V16")])


def is_large(name: str) -> bool:
    """Whether GGUF's tensor is attention's or an embedding, as `blk.3.attn_q.weight` is."""
    return name.endswith(".weight") and name.split(".")[-2] in LARGE


def pack_rows(blocks: Tensor, scales: Tensor) -> Tensor:
    """`blocks [..., in/32, 16]` and `scales [..., in/32]` of the release as GGUF rows `[..., in/32 * 17]`."""
    # Eight bytes at a time, which is ten times as fast as byte by byte.
    words = blocks.contiguous().view(torch.int64)
    low, high = words[..., 0].contiguous(), words[..., 1].contiguous()
    even = low.bitwise_and(LOW).bitwise_or_(high.bitwise_and(LOW).bitwise_left_shift_(4))
    odd = low.bitwise_right_shift_(4).bitwise_and_(LOW).bitwise_or_(high.bitwise_and_(~LOW))
    codes = torch.stack([even.view(torch.uint8), odd.view(torch.uint8)], dim=-1)
    rows = np.empty(tuple(scales.shape), dtype=ROW_OF_BLOCK)
    rows["scale"] = scales.numpy()
    rows["codes"] = codes.flatten(-2).numpy().view("V16")
    return torch.from_numpy(rows.view(np.uint8)).view(*scales.shape[:-1], -1)


def unpack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of `pack_rows`."""
    blocks = rows.unflatten(-1, (-1, 1 + 2 * HALF))
    even, odd = blocks[..., 1::2], blocks[..., 2::2]
    low = (even & 15) | (odd << 4)
    high = (even >> 4) | (odd & 0xF0)
    return torch.cat([low, high], dim=-1), blocks[..., 0].contiguous()
