"""OpenAI's `original/`, a GGUF of gpt-oss or a checkpoint of another dialect, put into the released layout.

MXFP4 experts keep their bytes, bf16 experts stay bf16. What a GGUF holds in float32 was bf16 in the release
and becomes it again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export import openai
from finetune.export.bundle import TOKENIZER_FILES, copy_companions, new_directory, write_manifest
from finetune.export.dialect import released_sizes, special_ids, write_configs
from finetune.export.gguf_source import GgufSource
from finetune.export.tensors import DTYPES, Checkpoint, Planned, spans, write_shards
from finetune.model import fingerprint, inspect_checkpoint
from finetune.model.headers import TensorPlace, read_safetensors_header
from finetune.model.layout import expected_tensors


@dataclass(frozen=True)
class Imported:
    """What a source holds: its configuration in the released words, and its tensors by released names."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Planned]
    packed: bool
    folder: Path  # where a tokenizer may lie


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: Path | None = None,
    exact: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write the model in `source` to the new directory `out`; returns what its finetune_export.json says.

    The tokenizer is copied from `tokenizer`, or from beside the source. With `exact` the values of a GGUF
    that bf16 cannot hold (those of Q8_0) stay as they are, in float32.

    Raises:
        FinetuneError: the source is none of the three kinds, or not a gpt-oss; or there is no tokenizer.
    """
    found = _look(Path(source), exact=exact)
    words = tokenizer or found.folder
    if not (words / "tokenizer.json").is_file():
        raise FinetuneError("no tokenizer.json here; name its folder with --tokenizer", at=str(words))
    expected = dict(expected_tensors(found.config, packed=found.packed))
    with new_directory(Path(out), force=force) as folder:
        write_shards(folder, [_checked(found, name, shape, source) for name, shape in expected.items()])
        copy_companions(found.folder, folder)
        for name in TOKENIZER_FILES:
            if (words / name).is_file():
                shutil.copyfile(words / name, folder / name)
        config = {**found.config, **_ending(folder)}
        write_configs(folder, config, folder, packed=found.packed)
        info = inspect_checkpoint(folder)
        facts = {
            "format": "import",
            "kind": info.kind,
            "base": {"name": Path(source).name, "fingerprint": fingerprint(folder)},
            "source": None,
            "proof": {"tensors": len(info.tensors), "imported_from": found.kind},
        }
        return write_manifest(folder, facts)


def _ending(folder: Path) -> dict[str, int]:
    """The ids of config.json that neither `original/` nor a GGUF of another tokenizer would say."""
    ids = special_ids(folder)
    names = {"eos_token_id": "<|return|>", "pad_token_id": "<|endoftext|>"}
    return {key: ids[name] for key, name in names.items() if name in ids}


def _checked(found: Imported, name: str, shape: tuple[int, ...], source: str | Path) -> Planned:
    planned = found.tensors.get(name)
    if planned is None:
        raise FinetuneError(f"'{name}' has no counterpart in this {found.kind}", at=str(source))
    if planned.shape != shape:
        sizes = f"{list(planned.shape)} where {list(shape)} is meant"
        raise FinetuneError(f"the counterpart of '{name}' has the shape {sizes}", at=str(source))
    return planned


def _look(source: Path, *, exact: bool) -> Imported:
    """Find out what a source is."""
    if source.is_file() or source.suffix == ".gguf":
        return _from_gguf(source, exact=exact)
    ggufs = sorted(source.glob("*.gguf"))
    if len(ggufs) == 1:
        return _from_gguf(ggufs[0], exact=exact)
    for folder in (source / openai.FOLDER, source):
        if (folder / "config.json").is_file() and "num_experts" in _read_json(folder / "config.json"):
            return _from_original(folder)
    if (source / "config.json").is_file():
        return _from_checkpoint(source)
    raise FinetuneError(
        "nothing to import here: neither a .gguf, nor OpenAI's original/, nor a checkpoint", at=str(source)
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FinetuneError(f"not readable as JSON ({error})", at=str(file)) from error
    return value if isinstance(value, dict) else {}


def _from_checkpoint(folder: Path) -> Imported:
    checkpoint = Checkpoint(folder)
    packed = checkpoint.info.kind == "mxfp4"
    names = checkpoint.info.tensors
    tensors = {name: _as_released(checkpoint.copied(name)) for name in names}
    kind = f"{checkpoint.info.kind} checkpoint"
    return Imported(kind, checkpoint.config, tensors, packed, folder)


def _as_released(planned: Planned) -> Planned:
    """Float16 and float32 as bf16, which is what the release is in."""
    if planned.dtype in ("U8", "BF16"):
        return planned

    def pieces() -> Iterator[Tensor]:
        for piece in planned.pieces():
            yield piece.to(torch.bfloat16)

    return Planned(planned.name, "BF16", planned.shape, pieces)


def _from_original(folder: Path) -> Imported:
    config = released_from_original(_read_json(folder / "config.json"), folder)
    places: dict[str, TensorPlace] = {}
    for file in sorted(folder.glob("*.safetensors")):
        places.update(read_safetensors_header(file))
    tensors: dict[str, Planned] = {}
    heads = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    for theirs, ours in openai.names(config["num_hidden_layers"]):
        place = places.get(theirs)
        if place is None:
            raise FinetuneError(f"tensor '{theirs}' is missing", at=str(folder))
        bounds = [0, place.shape[0]] if len(ours) == 1 else [0, heads, heads + keys, heads + 2 * keys]
        for name, first, last in zip(ours, bounds, bounds[1:], strict=False):
            tensors[name] = _as_released(_part(place, name, first, last))
    around = folder.parent if folder.name == openai.FOLDER else folder
    return Imported("original/ of OpenAI's code", config, tensors, True, around)


def _part(place: TensorPlace, name: str, first: int, last: int) -> Planned:
    """Rows of a tensor of a safetensors file, under a name."""
    shape = (last - first, *place.shape[1:])
    row = (place.end - place.start) // place.shape[0]

    def pieces() -> Iterator[Tensor]:
        for start, end in spans(shape, DTYPES[place.dtype].itemsize):
            with place.file.open("rb") as file:
                file.seek(place.start + (first + start) * row)
                content = bytearray(file.read((end - start) * row))
            yield torch.frombuffer(content, dtype=DTYPES[place.dtype]).view(end - start, *shape[1:])

    return Planned(name, place.dtype, shape, pieces)


def released_from_original(config: dict[str, Any], at: Path) -> dict[str, Any]:
    """The released config.json from that of `original/`."""
    try:
        return released_sizes(
            layers=config["num_hidden_layers"],
            experts=config["num_experts"],
            used=config["experts_per_token"],
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            head=config["head_dim"],
            heads=config["num_attention_heads"],
            key_heads=config["num_key_value_heads"],
            window=config["sliding_window"],
            theta=config["rope_theta"],
            original_context=config["initial_context_length"],
            factor=config["rope_scaling_factor"],
            betas=(config["rope_ntk_beta"], config["rope_ntk_alpha"]),
            limit=config["swiglu_limit"],
        )
    except KeyError as error:
        raise FinetuneError(f"its config.json lacks {error}", at=str(at)) from None


def _from_gguf(file: Path, *, exact: bool) -> Imported:
    source = GgufSource(file, exact=exact)
    config = released_sizes(**source.sizes())
    return Imported("GGUF", config, source.tensors(), source.packed, file.parent)
