"""GGUF, as llama.cpp, Ollama and LM Studio load it: MXFP4 experts re-laid out without loss, the rest bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.dialect import released_config
from finetune.export.gguf_layout import EXPERTS, LAYER, TOP, is_large, pack_rows
from finetune.export.gguf_words import add_sizes, add_tokenizer, check_fits
from finetune.export.subject import Subject
from finetune.export.tensors import Background, Checkpoint, as_bytes, spans
from finetune.model.mxfp4 import dequantise_mxfp4

Kind = gguf.GGMLQuantizationType
Dense = Literal["bf16", "q8_0"]
DENSE_KINDS: dict[Dense, gguf.GGMLQuantizationType] = {"bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE = "model.gguf"
# The gguf package decodes some 20 million values a second: enough for rows from all over an expert.
ROWS_OF_AN_EXPERT = 48
USE = f"""```
llama-server -m {FILE} --jinja
```

llama.cpp rounds YaRN's correction range to whole dimensions (it has no `truncate: false`), so its logits
differ a little from those of transformers and vLLM whatever the file.
"""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file; `shape` in numpy's order, `pieces` give its bytes, rows first."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(per_block) * int(bytes_per_block)


def write_gguf(subject: Subject, folder: Path, *, dense: Dense = "bf16") -> dict[str, Any]:
    """Write `folder`/model.gguf; returns the figures of the proof.

    `dense` is the number format of attention and embeddings: q8_0 has half the bytes, with 8 bits a value and
    a scale for 32 of them.

    Raises:
        FinetuneError: no tokenizer, a configuration that llama.cpp cannot run, or a wrong read-back.
    """
    checkpoint = Checkpoint(subject.base.path)
    config = released_config(checkpoint.config, packed=checkpoint.info.kind == "mxfp4")
    check_fits(config, subject.base.name)
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS])
    title = Path(subject.base.name).resolve().name
    add_sizes(writer, config, title, packed=checkpoint.info.kind == "mxfp4")
    pattern = add_tokenizer(writer, subject.base.path, config["vocab_size"])
    entries = list(plan(checkpoint, DENSE_KINDS[dense]))
    written = write_file(writer, folder / FILE, entries)
    return {
        "tensors": len(entries),
        "dense": dense,
        "tokenizer_pattern": pattern,
        "values_read_back": _prove(checkpoint, folder / FILE, entries, written.starts),
        "sha256": {FILE: written.sha256},
    }


@dataclass(frozen=True)
class Written:
    """The sum of a file's bytes, and where the bytes of each tensor begin."""

    sha256: str
    starts: list[int]


def write_file(writer: gguf.GGUFWriter, file: Path, entries: list[Entry]) -> Written:
    """The writer's metadata, then the tensors, none of which is ever whole in memory."""
    for entry in entries:
        # The type that matters is the third; numpy has none for bf16 and MXFP4.
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    alignment = writer.data_alignment
    writer.close()
    head = file.read_bytes()
    with file.open("wb") as stream, Background(stream) as background:
        place, starts = background.write(head), []
        for entry in entries:
            place += background.write(bytes(-place % alignment))
            starts.append(place)
            for piece in entry.pieces():
                place += background.write(as_bytes(piece.contiguous()))
            if place - starts[-1] != entry.bytes:
                raise FinetuneError(f"{entry.name} came out with the wrong size", at=str(file))
        background.write(bytes(-place % alignment))
        return Written(background.sha256(), starts)


def plan(checkpoint: Checkpoint, dense: gguf.GGMLQuantizationType = Kind.BF16) -> Iterator[Entry]:
    """Every tensor of the file; `dense` is the number format of attention and embeddings."""
    for name, released in TOP.items():
        yield _dense(checkpoint, name, released, dense)
    for layer in range(checkpoint.info.layers):
        block, here = f"blk.{layer}.", f"model.layers.{layer}."
        for name, released in LAYER.items():
            yield _dense(checkpoint, block + name, here + released, dense)
        for name, (parameter, rows) in EXPERTS.items():
            yield _experts(checkpoint, f"{block}{name}.weight", here + parameter, rows)
            yield _bias(checkpoint, f"{block}{name}.bias", f"{here}{parameter}_bias", rows)


def _dense(checkpoint: Checkpoint, name: str, released: str, kind: gguf.GGMLQuantizationType) -> Entry:
    shape = checkpoint.shape(released)
    kind = kind if is_large(name) else Kind.F32

    def pieces() -> Iterator[Tensor]:
        for first, last in spans(shape, 4):
            rows = checkpoint.read(released, first, last)
            if kind == Kind.Q8_0:
                yield torch.from_numpy(gguf.quants.quantize(rows.float().numpy(), kind))
            else:
                yield rows.to(torch.bfloat16 if kind == Kind.BF16 else torch.float32)

    return Entry(name, kind, shape, pieces)


def _bias(checkpoint: Checkpoint, name: str, released: str, rows: slice) -> Entry:
    experts, width = checkpoint.shape(released)

    def pieces() -> Iterator[Tensor]:
        yield checkpoint.read(released)[:, rows].float()

    return Entry(name, Kind.F32, (experts, len(range(width)[rows])), pieces)


def _experts(checkpoint: Checkpoint, name: str, released: str, rows: slice) -> Entry:
    packed = checkpoint.info.kind == "mxfp4"
    if packed:
        experts, outputs, blocks = checkpoint.shape(f"{released}_scales")
        inputs = blocks * gguf.GGML_QUANT_SIZES[Kind.MXFP4][0]
    else:
        experts, inputs, outputs = checkpoint.shape(released)

    def pieces() -> Iterator[Tensor]:
        for number in range(experts):
            span = number, number + 1
            if packed:
                blocks, scales = checkpoint.read_packed(released, *span)
                yield pack_rows(blocks[0, rows], scales[0, rows])
            else:
                yield checkpoint.read(released, *span)[0].mT[rows].to(torch.bfloat16)

    shape = experts, len(range(outputs)[rows]), inputs
    return Entry(name, Kind.MXFP4 if packed else Kind.BF16, shape, pieces)


def _prove(checkpoint: Checkpoint, file: Path, entries: list[Entry], starts: list[int]) -> int:
    """First and last row or expert of every tensor, as the gguf package decodes it; how many values.

    Its reader is not asked where they are: it takes as long for the words of o200k as this does for all else.
    """
    content, compared = np.memmap(file, mode="r"), 0
    for entry, start in zip(entries, starts, strict=True):
        per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[entry.kind]
        shape = *entry.shape[:-1], entry.shape[-1] // per_block * bytes_per_block
        tensor = content[start : start + entry.bytes].reshape(shape)
        for index in {0, entry.shape[0] - 1}:
            data, some = tensor[index : index + 1], slice(None)
            if len(entry.shape) == 1:
                data = tensor[bytes_per_block * index :][:bytes_per_block]
            elif len(entry.shape) == 3:
                # The package decodes slowly: of an expert, rows from all over it have to do.
                some = slice(None, None, 1 + entry.shape[1] // ROWS_OF_AN_EXPERT)
                data = data[:, some]
            found = gguf.quants.dequantize(np.ascontiguousarray(data), entry.kind)
            expected = _expected(checkpoint, entry.name, index, some).numpy()
            same = _within_q8_0 if entry.kind == Kind.Q8_0 else np.array_equal
            if not same(found, expected):
                raise FinetuneError(f"{entry.name} read back is not what was exported", at=str(file))
            compared += found.size
    return compared


def _within_q8_0(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """No further apart than Q8_0 allows: half a step, which is 1/127 of the largest of 32 values."""
    blocks = expected.reshape(-1, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    # Half precision moves the scale by up to 2^-11 of it, and below its normal numbers by 2^-25.
    allowed = (0.5 + 127 * 2**-11) * step + 127 * 2.0**-25
    return bool((np.abs(found.reshape(-1, 32) - blocks) <= allowed).all())


def _expected(checkpoint: Checkpoint, name: str, index: int, some: slice) -> Tensor:
    """One row, or `some` rows of one expert, of GGUF's tensor `name`, float32 with a leading 1."""
    span = index, index + 1
    if name in TOP:
        return checkpoint.read(TOP[name], *span).float()
    _, layer, rest = name.split(".", 2)
    here = f"model.layers.{layer}."
    if rest in LAYER:
        return checkpoint.read(here + LAYER[rest], *span).float()
    stem, part = rest.split(".")
    parameter, rows = EXPERTS[stem]
    if part == "bias":
        return checkpoint.read(f"{here}{parameter}_bias", *span).float()[:, rows]
    if checkpoint.info.kind == "mxfp4":
        blocks, scales = checkpoint.read_packed(here + parameter, *span)
        return dequantise_mxfp4(blocks[:, rows][:, some], scales[:, rows][:, some], torch.float32)
    return checkpoint.read(here + parameter, *span).mT[:, rows][:, some].float()
