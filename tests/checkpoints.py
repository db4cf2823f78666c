"""Random gpt-oss checkpoints for tests, in the layout of the release: MXFP4 experts, the rest bf16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.bench.random_weights import random_tensors, release_config

NANO = Path(__file__).resolve().parent.parent / "finetune" / "assets" / "nano"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
HARMONY_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
)


def write_random_checkpoint(
    path: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    intermediate: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 320,
    sliding_window: int = 8,
    tokenizer: Literal["nano", "bytes"] | None = None,
    experts_as: Literal["mxfp4", "bf16"] = "mxfp4",
    seed: int = 0,
    shards: int = 1,
) -> Path:
    """Write a checkpoint directory and return it.

    `hidden` and `intermediate` must be multiples of 32 (one MXFP4 scale per 32 values). `tokenizer="nano"`
    copies the bundled model's; `"bytes"` writes one token a byte plus harmony's special tokens (266 in all).
    `shards=1` writes `model.safetensors`; more write the release's numbered files and their index.
    `experts_as="bf16"` writes what a merge gives: no quantization_config, experts `[E, in, out]`.
    """
    assert hidden % 32 == 0 and intermediate % 32 == 0
    path.mkdir(parents=True, exist_ok=True)
    config = release_config(
        hidden=hidden, intermediate=intermediate, layers=layers, experts=experts, top_k=top_k, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, vocab=vocab, sliding_window=sliding_window,
    )  # fmt: skip
    if experts_as == "bf16":
        del config["quantization_config"]
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(random_tensors(config, generator, packed=experts_as == "mxfp4"))
    _save(path, tensors, shards)
    special = _write_tokenizer(path, tokenizer, vocab)
    config["eos_token_id"], config["pad_token_id"] = special["<|return|>"], special["<|endoftext|>"]
    stops = [special["<|return|>"], special["<|endoftext|>"], special["<|call|>"]]
    generation = {
        "bos_token_id": special["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": stops,
        "pad_token_id": special["<|endoftext|>"],
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return path


def _save(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        # The release counts its shards from 0 and names the last one, not how many there are.
        file = f"model-{shard:05d}-of-{shards - 1:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_tokenizer(path: Path, tokenizer: str | None, vocab: int) -> dict[str, int]:
    """Write the tokenizer's files; returns the ids of harmony's special tokens, which end the vocabulary."""
    if tokenizer is None:
        return {name: vocab - len(HARMONY_TOKENS) + i for i, name in enumerate(HARMONY_TOKENS)}
    if tokenizer == "nano":
        for name in TOKENIZER_FILES:
            if (NANO / name).exists():
                shutil.copy(NANO / name, path / name)
    else:
        _write_byte_tokenizer(path)
    added = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in added}
    assert max(ids.values()) < vocab, f"the {tokenizer} tokenizer needs vocab={max(ids.values()) + 1}"
    return ids


def _write_byte_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in HARMONY_TOKENS]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
