"""Time of a training step, part by part: products by their FLOPs, the rest by the bytes that move.

A product of m rows with a matrix of w weights costs 2 m w FLOPs. A frozen matrix is used forward, again where
it is recomputed, and for the gradient of its input, never for one of its own: attention and router 3 times
with recomputation (2 without), the head 3 times (its tiles are recomputed), the experts 8/3 times, for the
down projection is not recomputed (finetune/model/expert_layer.py). Scores of queries and keys take 2 products
forward and 5 backward (Dao et al. 2022), so 2 + 2 + 5 with recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.predict.machines import Machine
from finetune.predict.memory import (
    ATTENTION_QUERIES,
    HEAD_TOKENS,
    HEAD_WORDS,
    MOMENTS,
    group_experts,
    packed_bytes,
)
from finetune.predict.shape import Shape
from finetune.predict.workload import Workload

# Experts that the budget of a GPU's scratch decodes at once: 2 GiB with their rows.
CUDA_GROUP = 16

Limit = Literal["compute", "memory traffic", "host"]


@dataclass(frozen=True)
class Part:
    """Seconds of a step that one kind of work takes, and what it waits for."""

    name: str
    seconds: float
    limit: Limit


@dataclass(frozen=True)
class Speed:
    """A step of `tokens` tokens on one process. `useful` FLOPs leave recomputation out."""

    tokens: int
    parts: list[Part]
    useful: float

    @property
    def step_seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def limit(self) -> Limit:
        """What most of a step waits for."""
        waits: dict[Limit, float] = {}
        for part in self.parts:
            waits[part.limit] = waits.get(part.limit, 0.0) + part.seconds
        return max(waits, key=lambda kind: waits[kind])


def predict_speed(shape: Shape, work: Workload, machine: Machine) -> Speed:
    """A step of `work.passes` passes and one update."""
    matrix, tokens = machine.matrix[work.dense], work.tokens
    products = tokens * _product_flops(shape, work)
    score_products = 9 if work.checkpointing else 7
    scores = tokens * score_products * _score_flops(shape, work, on_cpu=machine.kind == "cpu")
    decoded = 2 * shape.expert_weights if shape.packed else 0
    parts = [
        Part("products", work.passes * products / matrix, "compute"),
        Part("attention scores", work.passes * scores / machine.attention[work.dense], "compute"),
        Part("decoding experts", work.passes * decoded / machine.decode[work.dense], "memory traffic"),
        Part(
            "between products",
            work.passes * _elementwise_bytes(shape, work) / machine.bandwidth,
            "memory traffic",
        ),
        Part("update", _update_bytes(shape, work) / machine.bandwidth, "memory traffic"),
    ]
    if work.from_host and machine.link:
        # Every expert comes once forward and once backward, beside what is computed meanwhile.
        transfer = work.passes * 2 * packed_bytes(shape) / machine.link
        parts.append(Part("waiting for experts", max(0.0, transfer - sum(p.seconds for p in parts)), "host"))
    host = work.passes * _calls(shape, work, machine) * machine.call[work.dense]
    if machine.kind == "cuda":
        # Launches run ahead of the device: they count only where it waits for them.
        host = max(0.0, host - sum(part.seconds for part in parts))
    parts.append(Part("host", host, "host"))
    return Speed(tokens * work.passes, parts, work.passes * tokens * useful_flops(shape, work))


def useful_flops(shape: Shape, work: Workload) -> float:
    """FLOPs a token without recomputation: forward, and the gradients of inputs and of the adapter (4 a
    weight, where a model that is trained whole has 6), the scores' 2 + 5 products."""
    weights = shape.layers * (
        shape.attention_matrix + shape.experts * shape.hidden + shape.top_k * shape.expert_matrix
    )
    head = work.learned * shape.vocab * shape.hidden
    scores = _score_flops(shape, work, on_cpu=False) * 7
    return 4.0 * (weights + head) + 6.0 * _active_lora(shape, work) + scores


def _product_flops(shape: Shape, work: Workload) -> float:
    """FLOPs a token in products with weights, recomputation included."""
    times = 3 if work.checkpointing else 2
    attention = times * (shape.attention_matrix + shape.experts * shape.hidden)
    experts = 8 / 3 * shape.top_k * shape.expert_matrix
    head = 3 * work.learned * shape.vocab * shape.hidden
    # Forward, recomputed, for the input's gradient and for their own.
    lora = (times + 1) * _active_lora(shape, work)
    return 2 * (shape.layers * (attention + experts) + head + lora)


def _active_lora(shape: Shape, work: Workload) -> float:
    """Weights of the adapter that one token meets."""
    dense = sum(shape.lora_weights(work.rank, work.targets, part=p) for p in ("attention", "router"))
    experts = shape.lora_weights(work.rank, work.targets, part="experts")
    return dense + experts * shape.top_k / shape.experts


def _score_flops(shape: Shape, work: Workload, *, on_cpu: bool) -> float:
    """FLOPs a token of one product of queries with keys, over all layers.

    In a document of D tokens a query meets D / 2 keys on average; blocks of queries meet half a block more
    on a CPU, where windows come in blocks too. A kernel for GPUs works on tiles of the same size.
    """
    block = ATTENTION_QUERIES
    full = work.document / 2 + block / 2
    windowed = min(full, shape.window + (block if on_cpu else block / 2))
    keys = shape.full_layers * full + (shape.layers - shape.full_layers) * windowed
    return 2 * shape.query * keys


def _elementwise_bytes(shape: Shape, work: Workload) -> float:
    """Bytes read and written between products in a pass: some 32 values of H and I for each of a token's k
    rows, 40 of H for a token itself (norms, residuals, rotary positions), forward and backward, which is the
    1 MB a token and layer of gpt-oss in bf16; and the tiles of logits, some 4 times in float32."""
    row = 32 * (shape.hidden + shape.intermediate) / 2 * work.bytes
    layer = work.tokens * (shape.top_k * row + 40 * shape.hidden * work.bytes)
    return shape.layers * layer + 4 * 4 * work.tokens * work.learned * shape.vocab


def _update_bytes(shape: Shape, work: Workload) -> float:
    """AdamW reads gradient, weight and moments and writes the last two; clipping, the gradients."""
    trained = shape.lora_weights(work.rank, work.targets)
    return trained * (4 + 2 * 4 + 2 * MOMENTS[work.optimizer] + 3 * 4)


def _calls(shape: Shape, work: Workload, machine: Machine) -> float:
    """Operations of a pass: of a layer, of each of its groups of experts, and of the head's tiles."""
    groups = shape.experts / (group_experts(shape) if machine.kind == "cpu" else CUDA_GROUP)
    tiles = max(1, work.tokens * work.learned / HEAD_TOKENS) * max(1, shape.vocab / HEAD_WORDS)
    return shape.layers * (250 + 90 * groups) + 40 * tiles
