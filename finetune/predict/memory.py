"""Peak memory of training, part by part, from what the code allocates.

Letters: T tokens of a pass, N = T * k rows of the expert layer, n rows of a group of g experts, H hidden, I
intermediate, Q and K widths of all query and key heads, R rank, P trained weights, b bytes of a value (2 or
4). What stays is counted for the whole run; what comes and goes is counted at three moments, and the largest
counts: the output head, the backward of the last layer (everything is still kept for backward), and of the
first one (every gradient is there).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from finetune.predict.machines import Machine
from finetune.predict.shape import PACKED_BYTES, Shape
from finetune.predict.workload import Workload

# finetune/model/experts.py: weights that a group of experts decodes at once on a CPU.
CPU_GROUP_WEIGHTS = 1 << 22
# On a GPU: scratch of 0.8 GB for gpt-oss, large enough that a launch does not count.
CUDA_GROUP_EXPERTS = 16
# The fullest group of experts has about this many times its share of the rows, with a trained router.
ROUTING_SKEW = 1.3
# TRL's fused head: tokens and words of one tile of logits (trl/kernels/chunked_logprob.py).
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
# float32 tiles alive at once in its backward without Triton: y, z, log p, p, the gradient, and two of an
# expression; with Triton they stay in registers.
HEAD_TILES = 7.25
# Queries of one block of attention on a CPU (finetune/model/attention.py), and the float32 blocks alive there
# at once: scores, probabilities and their gradients.
ATTENTION_QUERIES, ATTENTION_BLOCKS = 128, 4
# Bytes a trained weight: float32 itself and its gradient; two moments, in float32 or in bytes with a float32
# of scale for 256 of them (bitsandbytes).
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by part; `when` names the moment. `activations` are kept for backward or come and
    go; `scratch` holds decoded experts; `allocator` what is freed but not given back."""

    experts: float
    dense: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    scratch: float
    logits: float
    libraries: float
    allocator: float
    when: str

    @property
    def total(self) -> float:
        return sum(value for value in asdict(self).values() if isinstance(value, float))

    def to_dict(self) -> dict[str, float | str]:
        return {key: round(v) if isinstance(v, float) else v for key, v in asdict(self).items()} | {
            "total": round(self.total)
        }


def predict_memory(shape: Shape, work: Workload, machine: Machine) -> Memory:
    """The peak of one process; nothing is shared between processes."""
    trained = shape.lora_weights(work.rank, work.targets)
    on_cpu = machine.kind == "cpu"
    kept = shape.layers * _kept_of_a_layer(shape, work)
    layer, scratch, logits = _layer_working(shape, work, on_cpu), _scratch(shape, work, on_cpu), 0.0
    gradients_before = 4.0 * trained if work.passes > 1 else 0.0
    # Moment -> (kept and working activations, gradients, logits).
    moments = {
        "output head": (kept + _head_rows(shape, work), gradients_before, _head_tiles(shape, work, on_cpu)),
        "backward of the last layer": (
            kept + layer,
            max(gradients_before, 4.0 * trained / shape.layers),
            0.0,
        ),
        "backward of the first layer": (kept / shape.layers + layer, 4.0 * trained, 0.0),
    }
    when = max(moments, key=lambda name: sum(moments[name]))
    activations, gradients, logits = moments[when]
    return Memory(
        experts=_experts(shape, work),
        dense=_dense(shape, work, on_cpu),
        adapter=4.0 * trained,
        gradients=gradients,
        optimizer=MOMENTS[work.optimizer] * trained,
        activations=activations,
        scratch=scratch,
        logits=logits,
        libraries=machine.libraries,
        allocator=machine.slack * (activations + logits),
        when=when,
    )


def _experts(shape: Shape, work: Workload) -> float:
    stored = PACKED_BYTES if shape.packed else 2.0
    return stored * shape.expert_weights + float(work.bytes * shape.expert_biases)


def _dense(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """On a CPU, a float32 copy of bf16 leaves the pages it was read from in memory too."""
    mapped = 2.0 if on_cpu and work.dense == "float32" else 0.0
    return (work.bytes + mapped) * shape.dense_weights


def _scratch(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """Both matrices of a group of experts, and their factors where products are widened by them."""
    if not shape.packed:
        return 0.0
    experts = group_experts(shape, on_cpu)
    rank = 0 if on_cpu else _padded(work)
    wide = 2 * shape.intermediate * (shape.hidden + rank) + shape.hidden * (shape.intermediate + rank)
    return float(experts * wide * work.bytes)


def group_experts(shape: Shape, on_cpu: bool) -> int:
    """Experts that are decoded and multiplied at once."""
    if not on_cpu:
        return min(shape.experts, CUDA_GROUP_EXPERTS)
    per_expert = 2 * shape.intermediate * shape.hidden
    return min(shape.experts, max(1, CPU_GROUP_WEIGHTS // per_expert))


def _padded(work: Workload) -> int:
    """Products take ranks in steps of 8 (finetune/model/lora.py)."""
    return math.ceil(work.rank / 8) * 8 if "experts" in work.targets else 0


def _kept_of_a_layer(shape: Shape, work: Workload) -> float:
    """What one layer keeps until its backward: selective recomputation, or everything.

    With recomputation: the layer's input, the stream between its halves and the experts' input, and the order
    of the rows (four int64 of N). Without: also what the norms and LoRA's float32 inputs hold on to, queries,
    keys, values and the attention's output.
    """
    t, b, rows = work.tokens, work.bytes, work.tokens * shape.top_k
    routing = rows * (4 * 8 + b)
    if work.checkpointing:
        return float(3 * t * shape.hidden * b + routing)
    return float(3 * t * shape.hidden * b + routing) + _attention_kept(shape, work)


def _attention_kept(shape: Shape, work: Workload) -> float:
    """What the attention half of a layer holds on to between its forward and its backward."""
    t, b = work.tokens, work.bytes
    heads = t * (2 * shape.query + 2 * shape.key_value) * b + 4 * t * shape.heads
    if work.dense == "float32":
        return float(heads + 4 * t * (shape.hidden + shape.query))
    # bf16: both norms and each of the adapters of q, k, v and o take a float32 copy of their input.
    copies = 3 * shape.hidden + shape.query if "attention" in work.targets else 0
    return float(heads + 4 * t * (2 * shape.hidden + copies))


def _layer_working(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """What comes and goes in the backward of one layer, at its larger half."""
    return max(_experts_working(shape, work, on_cpu), _attention_working(shape, work, on_cpu))


def _experts_working(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """All rows' gradients of x, one group's rows, and the gradients of the layer's factors."""
    h, i, b = shape.hidden, shape.intermediate, work.bytes
    rows = work.tokens * shape.top_k
    share = group_experts(shape, on_cpu) / shape.experts
    group = min(rows, rows * share * (ROUTING_SKEW if share < 1 else 1.0))
    # In b: x, d_out, weighted d_out, d_x [H]; y, d_y, d_hidden, hidden. In float32: y, the activation's four
    # tensors and three of its gradient.
    wide = 0 if work.dense == "float32" else 2 * i
    of_group = group * (b * (4 * h + 7 * i) + 4 * (wide + 7 * i))
    factors = b * shape.lora_weights(work.rank, work.targets, part="experts") / shape.layers
    in_groups = rows * h * b + of_group + factors
    # Forward's end: all rows, the same in the order of tokens, and weighted by their scores.
    combining = 3 * rows * h * b
    return float(max(in_groups, combining) + 2 * work.tokens * h * b)


def _attention_working(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """The recomputed half, gradients of queries, keys and values, and the blocks of scores of a CPU."""
    t, b = work.tokens, work.bytes
    again = _attention_kept(shape, work) if work.checkpointing else 0.0
    gradients = t * (2 * shape.query + 2 * shape.key_value) * b + 2 * 4 * t * shape.key_value
    queries = min(t, ATTENTION_QUERIES)
    keys = min(t, work.document) if shape.full_layers else min(t, shape.window + queries)
    blocks = ATTENTION_BLOCKS * 4 * shape.heads * queries * keys if on_cpu else 0.0
    return again + gradients + blocks + 2 * t * shape.hidden * b


def _head_rows(shape: Shape, work: Workload) -> float:
    """The final norm in float32, the learned rows, and their gradient in float32."""
    learned = work.tokens * work.learned
    return work.tokens * shape.hidden * (4 + work.bytes) + learned * shape.hidden * (work.bytes + 4.0)


def _head_tiles(shape: Shape, work: Workload, on_cpu: bool) -> float:
    rows = min(work.tokens * work.learned, HEAD_TOKENS)
    words = min(shape.vocab, HEAD_WORDS)
    tiles = HEAD_TILES * 4 if on_cpu else 0.0
    return rows * words * (work.bytes + tiles)
