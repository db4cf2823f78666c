"""A GGUF of gpt-oss as a source: its sizes, and its tensors under the released names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.gguf import Kind
from finetune.export.gguf_layout import EXPERTS, LAYER, TOP, unpack_rows
from finetune.export.gguf_words import SWIGLU_LIMIT
from finetune.export.tensors import DTYPES, Planned, spans

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS]
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
# Which released part an expert tensor's rows make up; gate and up take turns.
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


class GgufSource:
    """A file whose tensors are mapped, not loaded; what it holds becomes bf16, with `exact` where that can.

    Raises:
        FinetuneError: it is no GGUF, of another architecture, an adapter, or quantised otherwise.
    """

    def __init__(self, file: Path, *, exact: bool = False) -> None:
        self.file, self._exact = file, exact
        try:
            self._reader = gguf.GGUFReader(file)
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = "it is not there" if not file.is_file() else "it is no GGUF, or cut off"
            raise FinetuneError(f"this cannot be read as a GGUF: {reason}", at=str(file)) from error
        found = self._word(gguf.Keys.General.ARCHITECTURE)
        if found != ARCHITECTURE:
            raise FinetuneError(
                f"this GGUF holds a model of the architecture '{found}', not {ARCHITECTURE}", at=str(file)
            )
        if self._word(gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER:
            raise FinetuneError("this GGUF holds an adapter, not a model", at=str(file))
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        kinds = {self._tensor(f"blk.0.{name}.weight").tensor_type for name in EXPERTS}
        self.packed = kinds == {Kind.MXFP4}
        if not self.packed and not kinds <= set(FLOATS):
            names = ", ".join(sorted(Kind(kind).name for kind in kinds))
            raise FinetuneError(
                f"its experts are in {names}; only MXFP4, BF16, F16 and F32 are read",
                at=str(file),
            )

    def _word(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return field.contents() if field else None

    def _number(self, key: str) -> Any:
        value = self._word(f"{ARCHITECTURE}.{key}")
        if value is None:
            raise FinetuneError(f"its metadata lacks {ARCHITECTURE}.{key}", at=str(self.file))
        return value

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise FinetuneError(f"tensor '{name}' is missing", at=str(self.file))
        return self._tensors[name]

    def sizes(self) -> dict[str, Any]:
        """What `released_sizes` takes. A GGUF does not say swiglu's limit, nor YaRN's truncate."""
        vocabulary, hidden = self._tensor("token_embd.weight").data.shape[0], "embedding_length"
        return {
            "layers": self._number("block_count"),
            "experts": self._number("expert_count"),
            "used": self._number("expert_used_count"),
            "vocabulary": int(vocabulary),
            "hidden": self._number(hidden),
            "inner": self._number("expert_feed_forward_length"),
            "head": self._number("attention.key_length"),
            "heads": self._number("attention.head_count"),
            "key_heads": self._number("attention.head_count_kv"),
            "window": self._number("attention.sliding_window"),
            "theta": self._number("rope.freq_base"),
            "original_context": self._number("rope.scaling.original_context_length"),
            "factor": self._number("rope.scaling.factor"),
            # Early GGUFs of gpt-oss leave these at llama.cpp's defaults, which are the release's.
            "betas": (
                self._word(f"{ARCHITECTURE}.rope.scaling.yarn_beta_fast") or 32.0,
                self._word(f"{ARCHITECTURE}.rope.scaling.yarn_beta_slow") or 1.0,
            ),
            "limit": SWIGLU_LIMIT,
            "context": self._number("context_length"),
        }

    def tensors(self) -> dict[str, Planned]:
        """Every tensor by its released name."""
        plans = [self._dense(TOP[name], name) for name in TOP]
        for layer in range(self._number("block_count")):
            block, here = f"blk.{layer}.", f"model.layers.{layer}."
            plans += [self._dense(here + released, block + name) for name, released in LAYER.items()]
            for parameter in (GATE_UP, DOWN):
                names = [block + name for name, (which, _) in EXPERTS.items() if which == parameter]
                plans += self._experts(here + parameter, names)
        return {planned.name: planned for planned in plans}

    def _values(self, tensor: Any, first: int, last: int) -> Tensor:
        """Rows (or experts) decoded, float32."""
        values = gguf.quants.dequantize(np.asarray(tensor.data[first:last]), tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _dense(self, name: str, theirs: str) -> Planned:
        tensor = self._tensor(theirs)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = "F32" if self._exact and tensor.tensor_type == Kind.Q8_0 else "BF16"

        def pieces() -> Iterator[Tensor]:
            for first, last in spans(shape, 4):
                yield self._values(tensor, first, last).to(DTYPES[kind])

        return Planned(name, kind, shape, pieces)

    def _experts(self, name: str, theirs: list[str]) -> list[Planned]:
        """Weights and bias of an expert parameter whose rows come from one tensor, or in turn from two."""
        weights = [self._tensor(f"{one}.weight") for one in theirs]
        biases = [self._tensor(f"{one}.bias") for one in theirs]
        inputs, rows, experts = (int(size) for size in weights[0].shape)
        outputs = rows * len(weights)

        def bias() -> Iterator[Tensor]:
            yield _in_turn([self._values(one, 0, experts) for one in biases]).to(torch.bfloat16)

        def part(which: int) -> Iterator[Tensor]:
            for number in range(experts):
                span = slice(number, number + 1)
                packed = [unpack_rows(torch.from_numpy(np.array(one.data[span])))[which] for one in weights]
                yield _in_turn(packed)

        def dense() -> Iterator[Tensor]:
            for number in range(experts):
                values = [self._values(one, number, number + 1) for one in weights]
                yield _in_turn(values).mT.to(torch.bfloat16)

        plans = [Planned(f"{name}_bias", "BF16", (experts, outputs), bias)]
        if not self.packed:
            return [*plans, Planned(name, "BF16", (experts, inputs, outputs), dense)]
        blocks = inputs // 32
        return [
            *plans,
            Planned(f"{name}_blocks", "U8", (experts, outputs, blocks, 16), lambda: part(0)),
            Planned(f"{name}_scales", "U8", (experts, outputs, blocks), lambda: part(1)),
        ]


def _in_turn(parts: list[Tensor]) -> Tensor:
    """`[experts, rows, ...]` each: first row of the first, first row of the second, and so on."""
    return torch.stack(parts, dim=2).flatten(1, 2)
