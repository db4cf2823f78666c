"""Time of a training step, part by part: products by their FLOPs, the rest by the bytes that move.

A product of m rows with a matrix of w weights costs 2 m w FLOPs. A frozen matrix is used forward, again where
it is recomputed, and for the gradient of its input, never for one of its own: attention and router 3 times
with recomputation (2 without), the head 3 times (its tiles are recomputed), the experts 8/3 times, for the
down projection is not recomputed (finetune/model/expert_layer.py). Scores of queries and keys take 2 products
forward and 5 backward (Dao et al. 2022), so 2 + 2 + 5 with recomputation.
"""

from __future__ import annotations

import math
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

# On processors, parts of the rates that are measured alone (finetune/bench/rates.py) which training reaches,
# with cold caches and rows in pieces; fitted to tests/measure/prediction.py on two cores of a Zen 5.
CPU_SHARES = {
    "products": 0.70, "scores": 0.78, "decode": 0.34, "bandwidth": 0.62, "logits": 0.74, "calls": 0.35,
}  # fmt: skip
# Bytes a row of an expert, a multiple of I and one of H, and values of H a token, that are read and written
# between products, forward and backward (finetune/model/cpu.py); passes over the logits in float32.
CPU_ROW, CPU_TOKEN, CPU_HEAD_PASSES = (280, 60), 60, 14
# Products of an expert's rows, LoRA's included; other operations of a layer, of a group of experts and of a
# block of queries, and the seconds that one takes with memory of its own.
CPU_EXPERT_CALLS, CPU_LAYER_CALLS, CPU_GROUP_CALLS, CPU_BLOCK_CALLS = 16, 400, 70, 12
CPU_CALL = 53e-6

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
    parts = _cpu_pass(shape, work, machine) if machine.kind == "cpu" else _cuda_pass(shape, work, machine)
    parts = [Part(part.name, part.seconds * work.passes, part.limit) for part in parts]
    parts.append(Part("update", _update_bytes(shape, work) / machine.bandwidth, "memory traffic"))
    tokens = work.tokens * work.passes
    return Speed(tokens, parts, tokens * useful_flops(shape, work))


def _cuda_pass(shape: Shape, work: Workload, machine: Machine) -> list[Part]:
    """One pass on a GPU; launches and copies from the host run beside it and count where it waits."""
    tokens = work.tokens
    products = tokens * (_product_flops(shape, work) + _head_flops(shape, work))
    scores = tokens * _score_products(work) * _score_flops(shape, work, on_cpu=False)
    traffic = _elementwise_bytes(shape, work) / machine.bandwidth
    parts = [
        Part("products", products / machine.matrix[work.dense], "compute"),
        Part("attention scores", scores / machine.attention[work.dense], "compute"),
        Part("decoding experts", _decoded(shape) / machine.decode[work.dense], "memory traffic"),
        Part("between products", traffic, "memory traffic"),
    ]
    busy = sum(part.seconds for part in parts)
    if work.from_host and machine.link:
        # Every expert comes once forward and once backward.
        parts.append(Part("experts", max(0.0, 2 * packed_bytes(shape) / machine.link - busy), "host"))
    tiles = max(1, tokens * work.learned / HEAD_TOKENS) * max(1, shape.vocab / HEAD_WORDS)
    calls = shape.layers * (250 + 90 * shape.experts / CUDA_GROUP) + 40 * tiles
    parts.append(Part("launches", max(0.0, calls * machine.call[work.dense] - busy), "host"))
    return parts


def _cpu_pass(shape: Shape, work: Workload, machine: Machine) -> list[Part]:
    """One pass on a processor, where everything waits for everything else."""
    tokens, dense = work.tokens, work.dense
    matrix, wide = machine.matrix[dense], machine.matrix["float32"]
    products = tokens * _product_flops(shape, work) / matrix
    # The last of the head's three products is made in float32 (trl/kernels/chunked_logprob.py).
    head = tokens * _head_flops(shape, work) * (2 / 3 / matrix + 1 / 3 / wide)
    scores = tokens * _score_products(work) * _score_flops(shape, work, on_cpu=True)
    rows = tokens * shape.top_k * (CPU_ROW[0] * shape.intermediate + CPU_ROW[1] * shape.hidden)
    streams = tokens * CPU_TOKEN * shape.hidden * work.bytes
    tiles = tokens * work.learned * shape.vocab * 4 * CPU_HEAD_PASSES
    experts = shape.layers * shape.experts
    blocks = shape.layers * math.ceil(tokens / ATTENTION_QUERIES) * (3 if work.checkpointing else 2)
    groups = experts / group_experts(shape)
    small = CPU_LAYER_CALLS * shape.layers + CPU_GROUP_CALLS * groups + CPU_BLOCK_CALLS * blocks
    share = CPU_SHARES
    return [
        Part("products", (products + head) / share["products"], "compute"),
        Part("attention scores", scores / machine.attention[dense] / share["scores"], "compute"),
        Part("decoding experts", _decoded(shape) / machine.decode[dense] / share["decode"], "memory traffic"),
        Part("logits", tiles / machine.fresh / share["logits"], "memory traffic"),
        Part(
            "between products",
            (shape.layers * (rows + streams)) / machine.bandwidth / share["bandwidth"],
            "memory traffic",
        ),
        Part("products' calls", experts * CPU_EXPERT_CALLS * machine.call[dense] / share["calls"], "host"),
        Part("other calls", small * CPU_CALL, "host"),
    ]


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
    """FLOPs a token in products with the layers' weights, recomputation included."""
    times = 3 if work.checkpointing else 2
    attention = times * (shape.attention_matrix + shape.experts * shape.hidden)
    experts = 8 / 3 * shape.top_k * shape.expert_matrix
    # Forward, recomputed, for the input's gradient and for their own.
    lora = (times + 1) * _active_lora(shape, work)
    return 2 * (shape.layers * (attention + experts) + lora)


def _head_flops(shape: Shape, work: Workload) -> float:
    """FLOPs a token in the output head, whose tiles are recomputed."""
    return 2.0 * 3 * work.learned * shape.vocab * shape.hidden


def _score_products(work: Workload) -> int:
    return 9 if work.checkpointing else 7


def _decoded(shape: Shape) -> int:
    """Weights decoded in a pass, forward and backward."""
    return 2 * shape.expert_weights if shape.packed else 0


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
