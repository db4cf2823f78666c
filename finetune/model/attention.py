"""Attention with sinks over packed documents, in blocks of queries; no token sees another document.

Each head has a learned sink s: an extra logit in the softmax that attends to nothing. For a query i
of document d,

    p_ij = exp(q_i . k_j * scale - lse_i),   lse_i = log(exp(s) + sum_j exp(q_i . k_j * scale))

over the keys j of d with i - window < j <= i (Xiao et al. 2023, "Efficient Streaming Language Models with
Attention Sinks"; openai/gpt-oss `torch/model.py`). Forward keeps the output and lse in float32, backward
recomputes p block by block (Dao et al. 2022, "FlashAttention", algorithm 4). A block of queries meets only
the keys from the start of its first document, or of its window, so no L x L matrix is made, a windowed layer
costs O(L * window) and many short documents cost their own squares.

Letters in shapes: B batch, L length, Hq query heads, Hk key heads, h some of them, G = Hq / Hk, D head size,
q queries of a block, k its keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    GptOssModel,
)
from transformers.masking_utils import eager_mask

NAME = "packed_sinks"
# Queries of one block: small enough that a window of 128 is not drowned in masked keys, and large enough for
# fast products.
BLOCK_QUERIES = 128
# Keys come in a multiple of this, before those that are seen hidden ones where need be: oneDNN compiles a
# program for each number that it meets, which for packed documents took a tenth of a small model's step and
# half a gigabyte.
BLOCK_KEYS = 32
# Scores that are worked on at once, of as many key heads: 8 MB in float32, which stay in a processor's cache.
SCORES_AT_ONCE = 1 << 21
LOG2_E = math.log2(math.e)


class Block(NamedTuple):
    """Queries `[first, last)` and the first key that any of them meets."""

    first: int
    last: int
    first_key: int
    first_key_in_window: int


class Packing:
    """Where documents begin in a packed batch; stands in for the attention mask of every layer."""

    def __init__(self, position_ids: Tensor, window: int) -> None:
        """`position_ids [B, L]`: a document ends where they do not count up by one; `window` in tokens."""
        length = position_ids.shape[1]
        begins = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
        place = torch.arange(length, device=position_ids.device)
        self.starts = (begins * place).cummax(dim=1).values  # [B, L]
        self.length, self.window = length, window
        self.flex_masks: dict[int | None, Any] = {}  # FlexAttention's, by window
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    @cached_property
    def blocks(self) -> list[Block]:
        """Blocks that cover the queries."""
        earliest, blocks = self.starts.amin(0)[::BLOCK_QUERIES].tolist(), []
        for first, start in zip(range(0, self.length, BLOCK_QUERIES), earliest, strict=True):
            last = min(first + BLOCK_QUERIES, self.length)
            firsts = (_first_of_blocks(key, last) for key in (start, max(start, first - self.window + 1)))
            blocks.append(Block(first, last, *firsts))
        return blocks

    def mask(self, block: Block, first_key: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[B, 1, 1, q, k]`: -inf where a query of `block` must not see a key (from `first_key` on)."""
        device = self.starts.device
        query = torch.arange(block.first, block.last, device=device).unsqueeze(1)
        key = torch.arange(first_key, block.last, device=device)
        hidden = (key > query) | (key < self.starts[:, block.first : block.last].unsqueeze(-1))
        if window is not None:
            hidden |= query - key >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[
            :, None, None
        ]

    def take(self, purpose: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory that every block of every layer uses again: fresh pages cost more than the arithmetic."""
        size = math.prod(shape)
        buffer = self._buffers.get((purpose, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[purpose, dtype] = like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)


def _first_of_blocks(key: int, last: int) -> int:
    """The first of whole blocks of keys that end at `last` and hold `key`, as far as there are keys."""
    return max(0, last - BLOCK_KEYS * math.ceil((last - key) / BLOCK_KEYS))


def _heads_as_rows(x: Tensor, key_heads: int) -> Tensor:
    """`[B, Hq, q, D] -> [B, Hk, G * q, D]`: a key head's query heads become more queries of one product."""
    split: Tensor = x.unflatten(1, (key_heads, -1))
    return split.flatten(2, 3)


class _Part(NamedTuple):
    key_heads: slice
    queries: slice
    keys: slice
    mask: Tensor  # [B, 1, 1, q, k]

    def of_queries(self, x: Tensor) -> Tensor:
        """`[B, Hk, G, L, ...] -> [B, h, G * q, ...]`: a key head's query heads become more queries."""
        return x[:, self.key_heads, :, self.queries].flatten(2, 3)

    def of_keys(self, x: Tensor) -> Tensor:
        """`[B, Hk, L, D] -> [B, h, k, D]`."""
        return x[:, self.key_heads, self.keys]


def _parts(packing: Packing, window: int | None, query: Tensor, key_heads: int) -> Iterator[_Part]:
    """What is worked on at once: a block's queries of some key heads."""
    batch, heads = query.shape[:2]
    for block in packing.blocks:
        first_key = block.first_key if window is None else block.first_key_in_window
        mask = packing.mask(block, first_key, window, wide_of(query.dtype))
        per_head = batch * heads // key_heads * mask[0].numel()
        at_once = max(1, SCORES_AT_ONCE // per_head)
        for head in range(0, key_heads, at_once):
            yield _Part(
                slice(head, head + at_once),
                slice(block.first, block.last),
                slice(first_key, block.last),
                mask,
            )


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What scores are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _product(purpose: str, rows: Tensor, keys: Tensor, packing: Packing) -> Tensor:
    """`rows [B, h, n, D]`, `keys [B, h, k, D]` -> `[B, h, n, k]` in at least float32."""
    shape = (*rows.shape[:-1], keys.shape[-2])
    out = packing.take(purpose, shape, rows, rows.dtype)
    torch.matmul(rows, keys.transpose(-1, -2), out=out)
    wide = wide_of(rows.dtype)
    return out if out.dtype == wide else packing.take(purpose, shape, rows, wide).copy_(out)


def _narrow(purpose: str, x: Tensor, dtype: torch.dtype, packing: Packing) -> Tensor:
    return x if x.dtype == dtype else packing.take(purpose, x.shape, x, dtype).copy_(x)


def _masked_scores(part: _Part, query: Tensor, key: Tensor, packing: Packing) -> Tensor:
    """`query [B, h, G * q, D]`, `key [B, h, k, D]` -> `[B, h, G * q, k]`, not scaled."""
    scores = _product("scores", query, key, packing)
    scores.unflatten(2, (-1, part.mask.shape[-2])).add_(part.mask)
    return scores


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor,
        packing: Packing, window: int | None, scale: float,
    ) -> Tensor:  # fmt: skip
        """`query [B, Hq, L, D]`, `key` and `value [B, Hk, L, D]`, `sinks [Hq]` -> `[B, Hq, L, D]`."""
        key_heads, wide = key.shape[1], wide_of(query.dtype)
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=wide)
        by_head, out_by_head, lse_by_head = (x.unflatten(1, (key_heads, -1)) for x in (query, out, lse))
        sink_of = sinks.to(wide).view(1, key_heads, -1, 1).expand_as(lse_by_head)
        for part in _parts(packing, window, query, key_heads):
            scores = _masked_scores(part, part.of_queries(by_head), part.of_keys(key), packing)
            sink = part.of_queries(sink_of)  # [B, h, G * q]
            top = torch.maximum(scores.amax(-1) * scale, sink)
            p = torch.add((-LOG2_E * top).unsqueeze(-1), scores, alpha=scale * LOG2_E, out=scores).exp2_()
            total = p.sum(-1) + torch.exp(sink - top)
            p = _narrow("p", p.div_(total.unsqueeze(-1)), value.dtype, packing)
            place = part.key_heads, slice(None), part.queries
            shape = out_by_head[:, *place].shape
            out_by_head[:, *place] = (p @ part.of_keys(value)).view(shape)
            lse_by_head[:, *place] = (top + total.log()).view(shape[:-1])
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.packing, ctx.window, ctx.scale = packing, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        packing: Packing = ctx.packing
        d_out, scale = grad_outputs[0], ctx.scale
        key_heads, wide = key.shape[1], lse.dtype
        # The softmax gradient's row term, p . dp, equals out . d_out (FlashAttention, equation 4).
        row_term = (out.to(wide) * d_out.to(wide)).sum(-1)  # [B, Hq, L]
        p_sink = torch.exp(sinks.to(wide).view(1, -1, 1) - lse)
        d_sinks = -(p_sink * row_term).sum((0, 2)).to(sinks.dtype)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        # As `scale * scores - lse` begins, in powers of two; and scale * (dp - row_term), likewise.
        offset, d_offset = -LOG2_E * lse, -scale * row_term
        queries, d_outs, d_queries, offsets, d_offsets = (
            x.unflatten(1, (key_heads, -1)) for x in (query, d_out, d_query, offset, d_offset)
        )
        for part in _parts(packing, ctx.window, query, key_heads):
            q_rows, d_rows = part.of_queries(queries), part.of_queries(d_outs)
            p = _masked_scores(part, q_rows, part.of_keys(key), packing)  # [B, h, G * q, k]
            torch.add(part.of_queries(offsets).unsqueeze(-1), p, alpha=scale * LOG2_E, out=p).exp2_()
            narrow = _narrow("p", p, value.dtype, packing)
            part.of_keys(d_value).add_(narrow.transpose(-1, -2) @ d_rows)
            d_p = _product("d_p", d_rows, part.of_keys(value), packing)
            torch.add(part.of_queries(d_offsets).unsqueeze(-1), d_p, alpha=scale, out=d_p)
            d_scores = _narrow("p", d_p.mul_(p), query.dtype, packing)
            place = part.key_heads, slice(None), part.queries
            d_queries[:, *place] = (d_scores @ part.of_keys(key)).view(d_queries[:, *place].shape)
            part.of_keys(d_key).add_(d_scores.transpose(-1, -2) @ q_rows)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None, None, None


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, scale: float
) -> Tensor:
    """For generation with a cache: an additive `mask [B, 1, q, k]`, few queries. -> `[B, Hq, q, D]`."""
    key_heads = key.shape[1]
    scores = _heads_as_rows(query, key_heads) @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)).mul_(scale)
    scores = scores.unflatten(2, (-1, query.shape[2]))  # [B, Hk, G, q, k]
    if mask is not None:
        scores = scores + mask.unsqueeze(2)
    sink = sinks.to(scores.dtype).view(key_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
    p = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1].to(value.dtype)
    return (p.flatten(2, 3) @ value).view_as(query)


def attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> Tensor:
    """In plain torch, for any device."""
    out: Tensor = _PackedAttention.apply(query, key, value, sinks, packing, window, scale)  # type: ignore[no-untyped-call]
    return out


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> Tensor:
    """`query [B, Hq, L, D]`, `key` and `value [B, Hk, L, D]`, `sinks [Hq]` -> `[B, Hq, L, D]`."""
    return finish(begin(query, key, value, sinks, packing, window, scale), sinks)


def begin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    packing: Packing,
    window: int | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Everything that takes long; `finish` makes attention's output of it. Worth keeping for backward."""
    if query.device.type == "cuda":
        from finetune.model.kernels.flex import attend_without_sinks, flex_is_right

        if flex_is_right(query.device, query.dtype):
            return attend_without_sinks(query, key, value, packing, window, scale)
    return (attend_by_blocks(query, key, value, sinks, packing, window, scale),)


def finish(begun: tuple[Tensor, ...], sinks: Tensor) -> Tensor:
    """`[B, Hq, L, D]` of what `begin` gave."""
    if len(begun) == 1:
        return begun[0]
    from finetune.model.kernels.flex import count_sinks

    out, lse = begun
    return count_sinks(out, lse, sinks)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Packing | Tensor | None,
    scaling: float, sliding_window: int | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function as transformers calls it: `query [B, Hq, q, D]` -> `[B, q, Hq, D]`."""
    assert s_aux is not None, "gpt-oss attention always has sinks"
    if isinstance(attention_mask, Packing):
        out = attend_packed(query, key, value, s_aux, attention_mask, sliding_window, scaling)
    else:
        out = dense_attention(query, key, value, attention_mask, s_aux, scaling)
    return out.transpose(1, 2), None


def _hides_padding(mask: Any) -> bool:
    """False for the mask of ones that tokenizers and collators add where there is no padding."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return not bool(mask.all())
    return mask is not None


def _hand_over_packing(model: GptOssModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of `GptOssModel`, which would build its masks without looking at `position_ids`."""
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if cache is not None:
        masks = _masks_of_generation(model.config, cache, mask, inputs.shape[1], inputs.device)
        return masks and (args, {**kwargs, "attention_mask": masks})
    if _hides_padding(mask):
        return None
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
    if inputs.device.type == "cuda":
        from finetune.model.kernels.flex import flex_is_right

        flex_is_right(inputs.device, model.norm.weight.dtype)  # asked before any layer is checkpointed
    packing = Packing(positions, model.config.sliding_window)
    masks = {"full_attention": packing, "sliding_attention": packing}
    return args, {**kwargs, "position_ids": positions, "attention_mask": masks}


def _masks_of_generation(
    config: GptOssConfig, cache: Any, mask: Any, new: int, device: torch.device
) -> dict[str, Packing | Tensor | None] | None:
    """Of whole prompts, padded on the left if at all, and of one token after what is in the cache.

    `mask [B, past + new]` is 1 where there is no padding. None for everything else: transformers builds dense
    masks for it. So it does for prompts, where a windowed layer would then cost O(L * L).
    """
    padded, window = _hides_padding(mask), config.sliding_window
    if not _keeps_windows(cache, config) or (padded and (not isinstance(mask, Tensor) or mask.dim() != 2)):
        return None
    if cache.get_seq_length() == 0:
        if padded and bool((mask.diff(dim=1) < 0).any()):
            return None
        places = mask.cumsum(1) - 1 if padded else torch.arange(new, device=device).unsqueeze(0)
        # Each token of padding becomes a document of its own.
        packing = Packing(places.masked_fill(mask == 0, 1) if padded else places, window)
        return {"full_attention": packing, "sliding_attention": packing}
    if new > 1:
        return None
    if not padded:
        return {"full_attention": None, "sliding_attention": None}
    hidden = torch.zeros(mask.shape, device=device).masked_fill_(mask == 0, -torch.inf)[:, None, None]
    return {"full_attention": hidden, "sliding_attention": hidden[..., -window:]}


def _keeps_windows(cache: Any, config: GptOssConfig) -> bool:
    """Whether a cache gives windowed layers the keys of their window, and the others all that there are."""
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    return isinstance(cache, DynamicCache) and [layer.is_sliding for layer in cache.layers] == windowed


def use_packed_attention(model: GptOssForCausalLM) -> None:
    """Give a `GptOssForCausalLM`, whose configuration names this attention, masks that respect documents."""
    model.model.register_forward_pre_hook(_hand_over_packing, with_kwargs=True)


AttentionInterface.register(NAME, attend)
# Where padding, or several tokens after a cache, are at play transformers builds dense additive masks for us.
AttentionMaskInterface.register(NAME, eager_mask)
