"""Attention of one step of the engine: many sequences side by side, their keys and values in the cache.

A step's tokens lie flat, `[1, T]`, without padding: first one token of each sequence that decodes, then a
chunk of each that is still reading its prompt. The linear layers and experts see T rows; only attention has
to know which row belongs to whom. A `LayerStep` says so, in the place of an attention mask, to every layer of
its kind (full or windowed).

Letters in shapes: T tokens of the step, B sequences that decode, Hq query heads, Hk key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from finetune.model.attention import dense_attention
from finetune.serve.cache import PAGE_TOKENS, KeyValueCache
from finetune.serve.sizes import padded

NAME = "served"
# Scores that a block of a chunk's queries makes at once, 64 MB in float32: a long prompt must not make more.
BLOCK_SCORES = 1 << 24
# Chunks are padded to so many queries, or to twice as many, and so on.
QUERY_UNIT = 16


class Span(NamedTuple):
    """Tokens `[start, start + length)` of a sequence, to be computed in this step; its pages and its ring."""

    start: int
    length: int
    pages: Sequence[int]
    ring: int


class Decode(NamedTuple):
    """One token of each of `sequences`; what is read and computed is padded to B of them."""

    sequences: int
    write: Tensor  # [sequences * Hk] rows
    read: Tensor  # [B * Hk * n] pages' parts
    mask: Tensor  # [B, 1, 1, n * S], 0 or -inf


class Block(NamedTuple):
    queries: slice  # of the chunk
    keys: slice  # of the old keys followed by the chunk's
    mask: Tensor  # [1, 1, q, k], 0 or -inf, with the padding of queries and keys


class Chunk(NamedTuple):
    """Several tokens of one sequence."""

    tokens: slice  # of the step
    old: Tensor  # [m * Hk] rows: what came before and can be seen
    blocks: list[Block]
    kept: slice  # of the chunk: what is written
    write: Tensor  # [kept * Hk] rows


@dataclass
class LayerStep:
    """Where a step's tokens are in the layers of one kind; takes the place of their attention mask."""

    cache: KeyValueCache
    page_tokens: int
    tokens: int  # the rest of T repeats the last of them
    decode: Decode | None
    chunks: list[Chunk]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scale: float
    ) -> Tensor:
        """`query [Hq, T, D]`, `key` and `value [Hk, T, D]`, which are also kept -> `[T, Hq, D]`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        if self.decode is not None:
            count, mask = self.decode.sequences, self.decode.mask
            _write(keys, self.decode.write, key[:, :count])
            _write(values, self.decode.write, value[:, :count])
            queries = query[:, : mask.shape[0]].transpose(0, 1).unsqueeze(2)  # [B, Hq, 1, D]
            seen_keys, seen_values = self._read(keys, self.decode), self._read(values, self.decode)
            attended = dense_attention(queries, seen_keys, seen_values, mask, sinks, scale)
            out[:count] = attended[:count].squeeze(2)
        for chunk in self.chunks:
            heads, size = key.shape[0], key.shape[2]
            new_keys, new_values = key[:, chunk.tokens], value[:, chunk.tokens]
            # Read before writing: in a ring, what is new takes the place of what the first queries still see.
            old = (part[chunk.old].view(-1, heads, size).transpose(0, 1) for part in (keys, values))
            all_keys, all_values = (
                torch.cat([before, new], dim=1).unsqueeze(0)
                for before, new in zip(old, (new_keys, new_values), strict=True)
            )
            queries = query[:, chunk.tokens].unsqueeze(0)  # [1, Hq, q, D]
            for block in chunk.blocks:
                rows, columns = block.mask.shape[2:]
                answer = dense_attention(
                    _lengthened(queries[:, :, block.queries], rows),
                    _lengthened(all_keys[:, :, block.keys], columns),
                    _lengthened(all_values[:, :, block.keys], columns),
                    block.mask, sinks, scale,
                )  # fmt: skip
                part = out[chunk.tokens][block.queries]
                part.copy_(answer[0].transpose(0, 1)[: len(part)])
            _write(keys, chunk.write, new_keys[:, chunk.kept])
            _write(values, chunk.write, new_values[:, chunk.kept])
        out[self.tokens :] = out[self.tokens - 1]
        return out

    def _read(self, part: Tensor, decode: Decode) -> Tensor:
        """The pages of the decoding sequences, `[B, Hk, n * S, D]`."""
        size = part.shape[1]
        pages = part.view(-1, self.page_tokens * size).index_select(0, decode.read)
        return pages.view(decode.mask.shape[0], self.cache.heads, -1, size)


def _write(part: Tensor, rows: Tensor, new: Tensor) -> None:
    """`new [Hk, t, D]` into `rows [t * Hk]`."""
    part.index_copy_(0, rows, new.transpose(0, 1).reshape(-1, new.shape[2]))


def _lengthened(x: Tensor, length: int) -> Tensor:
    """`x [1, H, t, D]` with zeros up to `length` tokens."""
    return x if x.shape[2] == length else F.pad(x, (0, 0, 0, length - x.shape[2]))


@dataclass(frozen=True)
class _Kind:
    """What differs between the kinds of layers: how many tokens a page has, and how far a query sees."""

    cache: KeyValueCache
    page_tokens: int
    window: int | None
    query_heads: int

    def lay_out(self, spans: Sequence[Span]) -> LayerStep:
        decoding = [span for span in spans if span.length == 1]
        chunks, at = [], len(decoding)
        for span in spans[len(decoding) :]:
            chunks.append(self._chunk(span, at))
            at += span.length
        decode = self._decode(decoding) if decoding else None
        return LayerStep(self.cache, self.page_tokens, at, decode, chunks)

    def _size(self, count: int, unit: int = 1) -> int:
        return padded(count, self.cache.keys[0], unit)

    def _pages(self, span: Span) -> Sequence[int]:
        return span.pages if self.window is None else [span.ring]

    def _rows(self, positions: Tensor, pages: Sequence[int]) -> Tensor:
        """Rows of all heads of the tokens at `positions [t]` of one sequence, `[t * Hk]`."""
        # A ring is one page that is come back to.
        page = torch.tensor(pages)[positions // self.page_tokens % len(pages)]
        first = page * self.cache.heads * self.page_tokens + positions % self.page_tokens
        rows = first.unsqueeze(1) + torch.arange(self.cache.heads) * self.page_tokens
        return self._placed(rows.flatten())

    def _decode(self, spans: Sequence[Span]) -> Decode:
        pages = [self._pages(span)[: span.start // self.page_tokens + 1] for span in spans]
        most, padding = self._size(max(map(len, pages))), self._size(len(spans)) - len(spans)
        # Any page will do for padding, of which one key is seen and nobody looks at the answer.
        table = torch.tensor(
            [*([*some, *[0] * (most - len(some))] for some in pages), *[[0] * most] * padding]
        )
        position = torch.tensor([span.start for span in spans])
        current = torch.tensor([some[-1] for some in pages])
        heads = torch.arange(self.cache.heads)
        first = current * self.cache.heads * self.page_tokens + position % self.page_tokens
        write = first.unsqueeze(1) + heads * self.page_tokens  # [B, Hk]
        read = table.unsqueeze(1) * self.cache.heads + heads.view(1, -1, 1)  # [B, Hk, n]
        # A full ring holds just the tokens that can be seen.
        seen = torch.arange(most * self.page_tokens) <= F.pad(position, (0, padding)).unsqueeze(1)
        mask = self._additive(seen).view(len(seen), 1, 1, -1)
        return Decode(len(spans), self._placed(write.flatten()), self._placed(read.flatten()), mask)

    def _chunk(self, span: Span, at: int) -> Chunk:
        start, count = span.start, span.length
        first = 0 if self.window is None else max(0, start - self.window + 1)
        kept = slice(0 if self.window is None else max(0, count - self.window), count)
        pages = self._pages(span)
        return Chunk(
            slice(at, at + count),
            self._rows(torch.arange(first, start), pages),
            list(self._blocks(start, count, first)),
            kept,
            self._rows(torch.arange(start + kept.start, start + count), pages),
        )

    def _blocks(self, start: int, count: int, first: int) -> Iterator[Block]:
        """Queries `[start, start + count)` against the keys from `first` on, few enough at a time."""
        size = max(1, BLOCK_SCORES // (self.query_heads * (start + count - first)))
        for low in range(0, count, size):
            high = min(low + size, count)
            nearest = first if self.window is None else max(first, start + low - self.window + 1)
            query = torch.arange(start + low, start + high).unsqueeze(1)
            key = torch.arange(nearest, start + high)
            seen = key <= query
            if self.window is not None:
                seen &= query - key < self.window
            # The sizes of both meet in one product, so there have to be fewer of each.
            rows, columns = self._size(high - low, QUERY_UNIT), self._size(seen.shape[1], PAGE_TOKENS)
            seen = F.pad(seen, (0, columns - seen.shape[1], 0, rows - seen.shape[0]))
            mask = self._additive(seen).view(1, 1, rows, columns)
            yield Block(slice(low, high), slice(nearest - first, start + high - first), mask)

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return self._placed(mask)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.cache.keys[0].device, non_blocking=True)


def lay_out(cache: KeyValueCache, spans: Sequence[Span], *, query_heads: int) -> dict[str, LayerStep]:
    """By kind of layer, what it has to know of a step; `spans` lie as its tokens do, single ones first."""
    return {
        "full_attention": _Kind(cache, PAGE_TOKENS, None, query_heads).lay_out(spans),
        "sliding_attention": _Kind(cache, cache.window, cache.window, query_heads).lay_out(spans),
    }


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LayerStep,
    scaling: float, s_aux: Tensor, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function as transformers calls it: `query [1, Hq, T, D]` -> `[1, T, Hq, D]`."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = attention_mask.attend(layer, query[0], key[0], value[0], s_aux, scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attend)
