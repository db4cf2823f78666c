"""config.json and generation_config.json in the words of the release, which every other program reads.

transformers 5 writes `rope_parameters` instead of `rope_theta` and `rope_scaling`, and a fresh configuration
of it lacks `experts_per_token` and `initial_context_length`. Programs that read only the released words
(Ollama's converter, for one) then take a rope base of 0 or route to no expert.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# In o200k_harmony: <|return|>, <|endoftext|>, <|call|>. The first files of the release lack <|call|>, without
# which a model that calls a function talks on.
STOPS = {"<|return|>": 200002, "<|endoftext|>": 199999, "<|call|>": 200012}
PACKED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

# For the model card of a merged checkpoint.
MERGED_USE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
```

```
vllm serve .
```
"""


def released_config(config: dict[str, Any], *, packed: bool) -> dict[str, Any]:
    """The configuration in the released words; `packed` says whether the experts are MXFP4."""
    out = {
        key: value
        for key, value in config.items()
        if key not in ("rope_parameters", "quantization_config", "dtype", "torch_dtype")
    }
    rope = dict(config.get("rope_parameters") or {})
    if rope:
        out.setdefault("rope_theta", rope.pop("rope_theta", 150000))
        out.setdefault("rope_scaling", rope)
    scaling = out.get("rope_scaling") or {}
    out.setdefault("experts_per_token", config.get("num_experts_per_tok", 4))
    out.setdefault("initial_context_length", scaling.get("original_max_position_embeddings", 4096))
    if packed:
        out["quantization_config"] = config.get("quantization_config") or PACKED
    return out


def generation_config(base: Path) -> dict[str, Any]:
    """The base's, with all three tokens that end an answer."""
    file = base / "generation_config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = special_ids(base)
    stops = [ids.get(name, number) if ids else number for name, number in STOPS.items()]
    before = found.get("eos_token_id")
    if not ids and before is not None:
        # Without a tokenizer its own word is the only one there is.
        stops = before if isinstance(before, list) else [before]
    return {
        "bos_token_id": ids.get("<|startoftext|>", 199998),
        "do_sample": True,
        "pad_token_id": ids.get("<|endoftext|>", STOPS["<|endoftext|>"]),
        **found,
        "eos_token_id": stops,
    }


def special_ids(folder: Path) -> dict[str, int]:
    """The ids of the special tokens in a directory's tokenizer.json; empty where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in tokens}


def write_configs(base: Path, config: dict[str, Any], folder: Path, *, packed: bool) -> None:
    """Write both files; `config` is the base's."""
    texts = {
        "config.json": released_config(config, packed=packed),
        "generation_config.json": generation_config(base),
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def released_sizes(
    *,
    layers: int,
    experts: int,
    used: int,
    vocabulary: int,
    hidden: int,
    inner: int,
    head: int,
    heads: int,
    key_heads: int,
    window: int,
    theta: float,
    original_context: int,
    factor: float,
    betas: tuple[float, float],
    limit: float,
    context: int | None = None,
) -> dict[str, Any]:
    """The released configuration of a gpt-oss of these sizes; what they do not say is as in the release.

    `betas` are YaRN's, fast and slow; `context` is the longest text (unless given, what YaRN reaches).
    """
    kinds = "sliding_attention", "full_attention"
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": used,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": original_context,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_types": [kinds[number % 2] for number in range(layers)],
        "max_position_embeddings": context or round(original_context * factor),
        "model_type": "gpt_oss",
        "num_attention_heads": heads,
        "num_experts_per_tok": used,
        "num_hidden_layers": layers,
        "num_key_value_heads": key_heads,
        "num_local_experts": experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": _yarn(original_context, factor, betas),
        "rope_theta": theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": window,
        "swiglu_limit": limit,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocabulary,
    }


def _yarn(original_context: int, factor: float, betas: tuple[float, float]) -> dict[str, Any]:
    return {
        "beta_fast": float(betas[0]),
        "beta_slow": float(betas[1]),
        "factor": factor,
        "original_max_position_embeddings": original_context,
        "rope_type": "yarn",
        "truncate": False,
    }
