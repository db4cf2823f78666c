"""Attention with sinks over packed documents on a GPU, through FlexAttention.

FlexAttention knows no sinks, but it gives the logarithm of each query's sum of exponentials, lse. A sink s
adds exp(s) to that sum, so

    out_with_sink = out * exp(lse) / (exp(lse) + exp(s)) = out * sigmoid(lse - s)

and autograd's way through lse gives the sink's gradient and its share of the others. lse and the factor are
float32. Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels".

Which 128 x 128 blocks of queries and keys meet is worked out from where documents begin, block by block:
`create_block_mask` would make an L x L mask first, 16 GiB at 128k tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from finetune.model.attention import Packing, attend_by_blocks

logger = logging.getLogger(__name__)

# FlexAttention's own default, and gpt-oss's window: a windowed layer meets at most two blocks of keys a block
# of queries.
BLOCK = 128
# Eight roundings to bfloat16, in sums that both ways take in their own order.
TOLERANCE = 8 * 2**-8


def block_mask(starts: Tensor, window: int | None) -> BlockMask:
    """Which keys a query sees: its document's, up to itself, within the window; `starts [B, L]` int64."""
    length, device = starts.shape[1], starts.device
    count = -(-length // BLOCK)

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (key >= starts[row, query])
        return seen if window is None else seen & (query - key < window)

    first_query = torch.arange(count, device=device) * BLOCK
    last_query = (first_query + BLOCK - 1).clamp(max=length - 1)

    # The first key that a query sees only moves on from one query to the next.
    def first_key(query: Tensor) -> Tensor:
        start = starts[:, query]
        return start if window is None else torch.maximum(start, query - window + 1)

    earliest, latest = first_key(first_query).unsqueeze(-1), first_key(last_query).unsqueeze(-1)  # [B, Q, 1]
    block = torch.arange(count, device=device)
    before = block.unsqueeze(0) < block.unsqueeze(1)  # [Q, K]: keys in an earlier block than the queries
    met = before & (block * BLOCK + BLOCK > earliest) | (block.unsqueeze(0) == block.unsqueeze(1))
    # Every key by every query; a last block of queries that is not full counts as one that is partly masked.
    full_queries = (first_query + BLOCK <= length).unsqueeze(1)
    whole = before & (block * BLOCK >= latest) & full_queries
    partial = met & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`blocks [B, Q, K]` bool -> how many `[B, 1, Q]`, and which, those first, `[B, 1, Q, K]`; int32."""
    count = blocks.sum(-1, dtype=torch.int32)
    which = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count.unsqueeze(1).contiguous(), which.unsqueeze(1).contiguous()


@cache
def _compiled() -> Callable[..., Any]:
    # Packs are of one length: no code for lengths that vary. Each length, window, and whether gradients are
    # wanted, is a compilation of its own; beyond the limit, of 8, attention would run uncompiled and make
    # L x L matrices.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> Tensor:
    """`query [B, Hq, L, D]`, `key` and `value [B, Hk, L, D]`, `sinks [Hq]` -> `[B, Hq, L, D]`."""
    out, lse = attend_without_sinks(query, key, value, packing, window, scale)
    return count_sinks(out, lse, sinks)


def attend_without_sinks(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Out `[B, Hq, L, D]` in query's dtype and lse `[B, Hq, L]` in float32, as if there were no sinks."""
    if window not in packing.flex_masks:
        packing.flex_masks[window] = block_mask(packing.starts, window)
    mask = packing.flex_masks[window]
    flex: Any = _compiled() if query.device.type == "cuda" else flex_attention
    out, aux = flex(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


def count_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What `out [B, Hq, L, D]` becomes when its softmax also runs over `sinks [Hq]`."""
    share = torch.sigmoid(lse - sinks.to(lse.dtype).view(1, -1, 1))
    return (out * share.unsqueeze(-1)).to(out.dtype)


@cache
def flex_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlexAttention compiles here, forward and backward, and agrees with attention by blocks.

    Where it does not, attention goes by blocks, in plain torch. To be asked outside of checkpointed regions,
    whose memory of what is saved the trial would confuse.
    """
    # Hooks of its own keep the trial's tensors from those that move activations to the host.
    own_hooks = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    if dtype == torch.float64:
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad(), own_hooks:
            wrong = _find_difference(device, dtype)
    except Exception as error:  # the compiler raises whatever goes wrong in its many parts
        wrong = str(error).splitlines()[0] if str(error) else type(error).__name__
    if wrong:
        logger.warning("FlexAttention is not usable on %s (%s): attention goes block by block", device, wrong)
    return not wrong


def _find_difference(device: torch.device, dtype: torch.dtype) -> str:
    """Two documents in a pack, with and without a window; the first result that is off, or nothing."""
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype).requires_grad_()

    query, key, value, sinks = (
        values(1, 16, 256, 64),
        values(1, 2, 256, 64),
        values(1, 2, 256, 64),
        values(16),
    )
    positions = torch.cat([torch.arange(170), torch.arange(86)]).unsqueeze(0).to(device)
    d_out = values(1, 16, 256, 64).detach()
    for window in (None, 128):
        results = []
        for attend in (attend_flex, attend_by_blocks):
            out = attend(query, key, value, sinks, Packing(positions, 128), window, 64**-0.5)
            results.append([out, *torch.autograd.grad(out, (query, key, value, sinks), d_out)])
        for name, found, expected in zip(("output", "dq", "dk", "dv", "dsinks"), *results, strict=True):
            difference = (found.float() - expected.float()).abs().max()
            # NaN differs from everything.
            if not bool(difference <= TOLERANCE * expected.float().abs().max()):
                return f"{name} with window {window} differs"
    return ""
