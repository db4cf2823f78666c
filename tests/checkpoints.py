"""Random gpt-oss checkpoints for tests, in the layout of the release: MXFP4 experts, the rest bf16.

Weights are scaled so that activations stay near 1: a difference between two programs is then a real one, not
an overflow, and logits are small enough that float32 differences under 1e-5 mean something.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

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
# Root mean square of the sixteen FP4 values when every code is equally likely.
FP4_RMS = math.sqrt((0 + 0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)


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
    config = _config(
        hidden, layers, experts, top_k, intermediate, heads, kv_heads, head_dim, vocab, sliding_window
    )
    if experts_as == "bf16":
        del config["quantization_config"]
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(_tensors(config, generator, packed=experts_as == "mxfp4"))
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


def _config(
    hidden: int,
    layers: int,
    experts: int,
    top_k: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    sliding_window: int,
) -> dict[str, object]:
    """The keys of the released config.json, in the dialect of transformers 4 that it is written in."""
    kinds = ["sliding_attention", "full_attention"]
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": top_k,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_types": [kinds[layer % 2] for layer in range(layers)],
        "max_position_embeddings": 131072,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "output_router_logits": False,
        "quantization_config": {"modules_to_not_convert": skipped, "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**yarn, "original_max_position_embeddings": 4096},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
    }


def _tensors(
    config: dict[str, object], generator: torch.Generator, *, packed: bool
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the whole model, layer by layer."""

    def size(key: str) -> int:
        value = config[key]
        assert isinstance(value, int)
        return value

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    hidden, inner, experts = size("hidden_size"), size("intermediate_size"), size("num_local_experts")
    query = size("num_attention_heads") * size("head_dim")
    key_value = size("num_key_value_heads") * size("head_dim")
    yield "model.embed_tokens.weight", normal(size("vocab_size"), hidden, std=1.0)
    yield "lm_head.weight", normal(size("vocab_size"), hidden, std=hidden**-0.5)
    yield "model.norm.weight", 1 + normal(hidden, std=0.1)
    for layer in range(size("num_hidden_layers")):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", 1 + normal(hidden, std=0.1)
        yield at + "post_attention_layernorm.weight", 1 + normal(hidden, std=0.1)
        yield at + "self_attn.sinks", normal(size("num_attention_heads"), std=1.0)
        projections = {
            "q": (query, hidden),
            "k": (key_value, hidden),
            "v": (key_value, hidden),
            "o": (hidden, query),
        }
        for name, (rows, columns) in projections.items():
            yield f"{at}self_attn.{name}_proj.weight", normal(rows, columns, std=columns**-0.5)
            yield f"{at}self_attn.{name}_proj.bias", normal(rows, std=0.1)
        yield at + "mlp.router.weight", normal(experts, hidden, std=hidden**-0.5)
        yield at + "mlp.router.bias", normal(experts, std=0.1)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield f"{at}mlp.experts.{name}_bias", normal(experts, rows, std=0.1)
            if packed:
                blocks, scales = _random_mxfp4(experts, rows, columns, generator)
                yield f"{at}mlp.experts.{name}_blocks", blocks
                yield f"{at}mlp.experts.{name}_scales", scales
            else:
                yield f"{at}mlp.experts.{name}", normal(experts, columns, rows, std=columns**-0.5)


def _random_mxfp4(experts: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform codes, and scales within a factor of two of what gives the weight a std of columns**-0.5."""
    shape = (experts, rows, columns // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    middle = 127 + round(math.log2(columns**-0.5 / FP4_RMS))
    scales = torch.randint(middle - 1, middle + 2, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


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
