"""The metadata of a GGUF: sizes, rotary embedding, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from finetune.errors import FinetuneError
from finetune.export.dialect import special_ids

# What llama.cpp's graph of gpt-oss has built in.
SWIGLU_LIMIT = 7.0
# How llama.cpp calls the ways to cut text into words before the merges. Only these two are gpt-oss's or near.
O200K, GPT2 = "gpt-4o", "gpt-2"
# o200k tells upper and lower case apart by these classes; no other pattern in use with gpt-oss does.
O200K_SIGN = r"\p{Lu}\p{Lt}"


def check_fits(config: dict[str, Any], at: str) -> None:
    """llama.cpp can run a model with this configuration as it is.

    Raises:
        FinetuneError: what llama.cpp has built in is otherwise here.
    """
    kinds = ["sliding_attention", "full_attention"]
    layers = config.get("layer_types") or [kinds[n % 2] for n in range(config["num_hidden_layers"])]
    if any(kind != kinds[number % 2] for number, kind in enumerate(layers)):
        raise FinetuneError("llama.cpp slides attention in every other layer, and this model does not", at=at)
    if config.get("swiglu_limit", SWIGLU_LIMIT) != SWIGLU_LIMIT:
        limit = config["swiglu_limit"]
        raise FinetuneError(
            f"llama.cpp limits swiglu at {SWIGLU_LIMIT}, and this model has swiglu_limit {limit}", at=at
        )


def add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, *, packed: bool) -> None:
    """Everything that config.json (in the released words) says."""
    scaling = config["rope_scaling"]
    kind = gguf.LlamaFileType.MOSTLY_MXFP4_MOE if packed else gguf.LlamaFileType.MOSTLY_BF16
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["experts_per_token"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> str:
    """The tokens, merges, special ids and chat template; returns llama.cpp's name of the word pattern.

    Raises:
        FinetuneError: there is no tokenizer.json, or not one that llama.cpp can read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FinetuneError("a GGUF holds its tokenizer, and there is no tokenizer.json", at=str(folder))
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise FinetuneError(f"the tokenizer is {model.get('type')}, not a byte-level BPE", at=str(file))
    if not model["merges"]:
        raise FinetuneError("llama.cpp cannot read a tokenizer without merges", at=str(file))
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    plain = {number: text for text, number in model["vocab"].items()}
    tokens, kinds = [], []
    for number in range(vocabulary):
        if number in added:
            tokens.append(added[number]["content"])
            # What is not special is part of the text, and llama.cpp shows it.
            special = added[number]["special"]
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        elif number in plain:
            tokens.append(plain[number])
            kinds.append(gguf.TokenType.NORMAL)
        else:
            # Rows of the embedding beyond the tokenizer's last token.
            tokens.append(f"[PAD{number}]")
            kinds.append(gguf.TokenType.UNUSED)
    pattern = O200K if O200K_SIGN in json.dumps(tokenizer["pre_tokenizer"]).replace(r"\\", "\\") else GPT2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    ids = special_ids(folder)
    writer.add_bos_token_id(ids["<|startoftext|>"])
    writer.add_eos_token_id(ids["<|return|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    if template := _chat_template(folder):
        writer.add_chat_template(template)
    return pattern


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    template = config.get("chat_template")
    return template if isinstance(template, str) else None
