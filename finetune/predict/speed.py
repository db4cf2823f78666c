"""Time of a training step, part by part: products by their FLOPs, the rest by the bytes that move.

A product of m rows with a matrix of w weights costs 2 m w FLOPs. A frozen matrix is used forward, again where
it is recomputed, and for the gradient of its input, never for one of its own: attention and router 3 times
with recomputation (2 without), the head 3 times (its tiles are recomputed), the experts 8/3 times, for the
down projection is not recomputed (finetune/model/expert_layer.py). Scores of queries and keys take 2 products
forward and 5 backward (Dao et al. 2022), so 2 + 2 + 5 with recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.predict.machines import Machine
from finetune.predict.memory import HEAD_TOKENS, HEAD_WORDS, MOMENTS, offloaded_bytes, packed_bytes
from finetune.predict.shape import Shape
from finetune.predict.units import (
    LIMITS,
    PARTS,
    Limit,
    active_lora,
    head_units,
    layer_products,
    layers_units,
    scored_keys,
)
from finetune.predict.workload import Workload

# Experts that the budget of a GPU's scratch decodes at once: 2 GiB with their rows.
CUDA_GROUP = 16
# Forward's part of a pass: 1 of 8/3 products of the experts, 1 of 3 of the rest, 2 of 9 of the scores.
FORWARD_SHARE = 0.35


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
    parts = _cpu_pass(shape, work, machine) if machine.kind == "cpu" else _cuda_pass(shape, work, machine)
    parts = [Part(part.name, part.seconds * work.passes, part.limit) for part in parts]
    parts.append(Part("update", _update_bytes(shape, work) / machine.bandwidth, "memory traffic"))
    tokens = work.tokens * work.passes
    return Speed(tokens, parts, tokens * useful_flops(shape, work))


def _cuda_pass(shape: Shape, work: Workload, machine: Machine) -> list[Part]:
    """One pass on a GPU; launches and copies from the host run beside it and count where it waits."""
    tokens = work.tokens
    products = tokens * (shape.layers * layer_products(shape, work) + _head_flops(shape, work))
    scores = tokens * 2 * shape.query * scored_keys(shape, work, on_cpu=False)
    traffic = _elementwise_bytes(shape, work) / machine.bandwidth
    parts = [
        Part("products", products / machine.matrix[work.dense], "compute"),
        Part("attention scores", scores / machine.attention[work.dense], "compute"),
        Part("decoding experts", _decoded(shape) / machine.decode[work.dense], "memory traffic"),
        Part("between products", traffic, "memory traffic"),
    ]
    busy = sum(part.seconds for part in parts)
    if work.from_host and machine.link:
        parts.append(Part("experts", _waiting_for_experts(shape, work, machine, busy), "host"))
    tiles = max(1, tokens * work.learned / HEAD_TOKENS) * max(1, shape.vocab / HEAD_WORDS)
    calls = shape.layers * (250 + 90 * shape.experts / CUDA_GROUP) + 40 * tiles
    parts.append(Part("launches", max(0.0, calls * machine.call - busy), "host"))
    return parts


def _waiting_for_experts(shape: Shape, work: Workload, machine: Machine, busy: float) -> float:
    """Seconds of a pass that is `busy` otherwise. Forward and backward each bring every expert once, which
    hides behind that part of the work alone; with it, backward brings activations that were offloaded."""
    experts = packed_bytes(shape) / machine.link
    activations = offloaded_bytes(shape, work) / machine.link
    forward = FORWARD_SHARE * busy
    return max(0.0, experts - forward) + max(0.0, experts + activations - (busy - forward))


def _cpu_pass(shape: Shape, work: Workload, machine: Machine) -> list[Part]:
    """One pass on a processor, where everything waits for everything else: units by their measured prices."""
    prices = machine.prices[work.dense]
    head = head_units(work.tokens * work.learned, shape.hidden, shape.vocab)
    seconds: dict[str, float] = {}
    for unit, count in (layers_units(shape, work) | head).items():
        seconds[PARTS[unit]] = seconds.get(PARTS[unit], 0.0) + count * prices[unit]
    return [Part(name, each, LIMITS[name]) for name, each in seconds.items()]


def useful_flops(shape: Shape, work: Workload) -> float:
    """FLOPs a token without recomputation: forward, and the gradients of inputs and of the adapter (4 a
    weight, where a model that is trained whole has 6), the scores' 2 + 5 products."""
    weights = shape.layers * (
        shape.attention_matrix + shape.experts * shape.hidden + shape.top_k * shape.expert_matrix
    )
    head = work.learned * shape.vocab * shape.hidden
    scores = 2 * shape.query * scored_keys(shape, replace(work, checkpointing=False), on_cpu=False)
    return 4.0 * (weights + head) + 6.0 * active_lora(shape, work) + scores


def _head_flops(shape: Shape, work: Workload) -> float:
    """FLOPs a token in the output head, whose tiles are recomputed."""
    return 2.0 * 3 * work.learned * shape.vocab * shape.hidden


def _decoded(shape: Shape) -> int:
    """Weights decoded in a pass, forward and backward."""
    return 2 * shape.expert_weights if shape.packed else 0


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
