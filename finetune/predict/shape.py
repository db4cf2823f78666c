"""The sizes of a gpt-oss, and how many weights each part of it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# MXFP4: 4 bits a weight and a byte of scale for 32 of them (OCP Microscaling Formats v1.0).
PACKED_BYTES = 17 / 32


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `full_layers` attend to all earlier tokens, the others to `window` of them.

    `packed`: the experts are stored as MXFP4, else as bf16.
    """

    hidden: int
    intermediate: int
    layers: int
    full_layers: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    packed: bool = True

    @classmethod
    def of(cls, config: dict[str, Any], *, packed: bool = True) -> Shape:
        """From a config.json that `inspect_checkpoint` has accepted."""
        layers = config["num_hidden_layers"]
        # Without a list the layers alternate, a windowed one first (transformers' GptOssConfig).
        kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * layers
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=layers,
            full_layers=kinds[:layers].count("full_attention"),
            experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab=config["vocab_size"],
            window=config.get("sliding_window", 128),
            packed=packed,
        )

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def expert_matrix(self) -> int:
        """Weights of one expert's two matrices, `[2I, H]` and `[H, I]`, without biases."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_weights(self) -> int:
        """Matrix weights of all experts of all layers."""
        return self.layers * self.experts * self.expert_matrix

    @property
    def expert_biases(self) -> int:
        return self.layers * self.experts * (2 * self.intermediate + self.hidden)

    @property
    def attention_matrix(self) -> int:
        """Weights of the four projections of one layer."""
        return self.hidden * (2 * self.query + 2 * self.key_value)

    @property
    def dense_weights(self) -> int:
        """Everything but the experts: embeddings, head, attention, router, norms."""
        biases = self.query + 2 * self.key_value + self.hidden + self.heads + self.experts
        layer = self.attention_matrix + biases + self.experts * self.hidden + 2 * self.hidden
        return 2 * self.vocab * self.hidden + self.hidden + self.layers * layer

    def lora_weights(self, rank: int, targets: list[str], *, part: str | None = None) -> int:
        """Trained weights of an adapter of this rank; of one of its targets with `part`."""
        h, i = self.hidden, self.intermediate
        each = {
            "attention": rank * 2 * (2 * h + self.query + self.key_value),
            "experts": rank * self.experts * ((h + 2 * i) + (i + h)),
            "router": rank * (h + self.experts),
        }
        return self.layers * sum(each[target] for target in targets if part in (None, target))


def _released(layers: int, experts: int) -> Shape:
    return Shape(
        hidden=2880, intermediate=2880, layers=layers, full_layers=layers // 2, experts=experts, top_k=4,
        heads=64, kv_heads=8, head_dim=64, vocab=201_088, window=128,
    )  # fmt: skip


# From the config.json of each release, for a prediction before anything is downloaded.
RELEASED = {"openai/gpt-oss-20b": _released(24, 32), "openai/gpt-oss-120b": _released(36, 128)}
