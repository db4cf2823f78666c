"""Peak memory of training, part by part, from what the code allocates.

Letters: T tokens of a pass, N = T * k rows of the expert layer, n rows of a group of g experts, H hidden, I
intermediate, Q and K widths of all query and key heads, R rank, P trained weights, b bytes of a value (2 or
4). What stays is counted for the whole run; what comes and goes is counted at three moments, and the largest
counts: the output head, the backward of the last layer (everything is still kept for backward), and of the
first one (every gradient is there).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from finetune.model.cpu_settings import HEAD_TOKENS as CPU_HEAD_TOKENS
from finetune.model.cpu_settings import HEAD_VOCABULARY as CPU_HEAD_WORDS
from finetune.model.cpu_settings import MAPPED
from finetune.predict.machines import Machine
from finetune.predict.shape import PACKED_BYTES, Shape
from finetune.predict.workload import Workload

# finetune/model/experts.py: weights that a group of experts decodes at once on a CPU; where weights are
# multiplied as they are, values of the rows that a group has (finetune/model/cpu_native.py).
CPU_GROUP_WEIGHTS, CPU_GROUP_VALUES = 1 << 22, 1 << 22
# finetune/model/kernels/budget.py: what a GPU decodes and works on at once takes so many bytes, or this part
# of what is free; at least one expert, and so many of its rows.
CUDA_WORK, CUDA_SHARE, CUDA_ROWS = 2 << 30, 4, 1024
# The fullest group of experts has about this many times its share of the rows.
ROUTING_SKEW = 1.4
# With experts in host memory: two buffers of so many packed experts (finetune/model/kernels/stream.py).
STREAM_BUFFERS, STREAM_EXPERTS = 2, 8
# NF4, its scales quantised again (bitsandbytes): 4 bits a weight, a byte for 64, a float32 for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Layers whose activations are on the GPU while those of the others are on the host (torchtune's and TRL's
# activation offloading).
OFFLOAD_KEEPS = 5
# TRL's fused head: tokens and words of one tile of logits (trl/kernels/chunked_logprob.py).
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
# float32 tiles alive at once in its backward without Triton: y, z, log p, p, the gradient, and two of an
# expression; with Triton they stay in registers.
HEAD_TILES = 7.25
# oneDNN keeps a program of 0.6 MiB for each product and size it meets. Of an expert's rows there are ever new
# numbers: bytes for a row of a pass, until there are hardly any (both fitted to tests/measure/prediction.py).
# Of keys there are as many as a document has blocks, in six products (finetune/model/attention.py).
ONEDNN_ROW, ONEDNN_ALL = 33e3, 0.28e9
ONEDNN_PROGRAM, ONEDNN_PROGRAMS, ATTENTION_PRODUCTS = 0.6 * 2**20, 1024, 6
# Where experts need none, of all that are kept so many are large: fitted to nano's demo
# (runs/reference/demo.json).
VARIED_SHARE = 0.25
# Queries of one block of attention on a CPU, and bytes of a buffer for its scores in float32, unless one key
# head's block is larger (finetune/model/attention.py).
ATTENTION_QUERIES, ATTENTION_BUFFER = 128, 8 << 20
# Bytes a trained weight: float32 itself and its gradient; two moments, in float32 or in bytes with a float32
# of scale for 256 of them (bitsandbytes).
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw_8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by part; `when` names the moment. `activations` are kept for backward or come and
    go; `scratch` holds what a group of experts decodes and works on; `allocator` what is freed but not given
    back."""

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
        return float(sum(value for value in asdict(self).values() if not isinstance(value, str)))

    def to_dict(self) -> dict[str, float | str]:
        return {key: round(v) if isinstance(v, float) else v for key, v in asdict(self).items()} | {
            "total": round(self.total)
        }


def predict_memory(shape: Shape, work: Workload, machine: Machine) -> Memory:
    """The peak of one process; nothing is shared between processes."""
    on_cpu = machine.kind == "cpu"
    trained = shape.lora_weights(work.rank, work.targets)
    layers = min(shape.layers, OFFLOAD_KEEPS) if work.offloaded and not on_cpu else shape.layers
    kept = layers * _kept_of_a_layer(shape, work)
    if on_cpu or not work.offloaded:
        kept += _kept_attention(shape, work)
    layer = max(_experts_working(shape, work, on_cpu), _attention_working(shape, work, on_cpu))
    before = 4.0 * trained if work.passes > 1 else 0.0
    # Moment -> (kept and working activations, gradients, logits).
    moments = {
        "output head": (kept + _head_rows(shape, work), before, _head_tiles(shape, work, on_cpu)),
        "backward of the last layer": (kept + layer, max(before, 4.0 * trained / shape.layers), 0.0),
        "backward of the first layer": (kept / layers + layer, 4.0 * trained, 0.0),
    }
    when = max(moments, key=lambda name: sum(moments[name]))
    activations, gradients, logits = moments[when]
    fixed = {
        "experts": _experts(shape, work, on_cpu),
        "dense": _dense(shape, work, on_cpu),
        "adapter": 4.0 * trained,
        "optimizer": MOMENTS[work.optimizer] * trained,
        "libraries": machine.libraries + (_onednn(shape, work, machine) if on_cpu else 0.0),
    }
    allocator = machine.slack * (activations + logits)
    if on_cpu:
        small = [sum(_small(shape, work, moment)) for moment in moments.values()]
        allocator += max(small) - sum(_small(shape, work, moments[when]))
    others = sum(fixed.values()) + activations + gradients + logits + allocator
    left = machine.memory - others
    scratch = _cpu_scratch(shape, work, machine) if on_cpu else _cuda_scratch(shape, work, left)
    return Memory(
        **fixed, gradients=gradients, activations=activations, scratch=scratch, logits=logits,
        allocator=allocator, when=when,
    )  # fmt: skip


def _small(shape: Shape, work: Workload, moment: tuple[float, float, float]) -> Iterator[float]:
    """What a moment holds in tensors that malloc keeps on its heap: glibc maps blocks of 32 MiB and more by
    themselves and gives them back at once, and keeps the rest for what is to come (mallopt(3))."""
    activations, gradients, logits = moment
    if work.tokens * shape.hidden * work.bytes < MAPPED:
        yield activations
    if 4 * work.rank * shape.experts * max(shape.hidden, 2 * shape.intermediate) < MAPPED:
        yield gradients
    if 4 * math.prod(_head_tile(shape, work, True)) < MAPPED:
        yield logits


def host_bytes(shape: Shape, work: Workload) -> float:
    """Host memory that a GPU's run takes: experts, embedding and activations that are kept there."""
    experts = packed_bytes(shape) if work.from_host else 0.0
    embedding = work.bytes * shape.vocab * shape.hidden if work.nf4 else 0
    return experts + embedding + offloaded_bytes(shape, work)


def offloaded_bytes(shape: Shape, work: Workload) -> float:
    """Of what is kept for backward, on the host."""
    if not work.offloaded:
        return 0.0
    return shape.layers * _kept_of_a_layer(shape, work) + _kept_attention(shape, work)


def packed_bytes(shape: Shape) -> float:
    """Of the experts' matrices as they are stored."""
    return (PACKED_BYTES if shape.packed else 2.0) * shape.expert_weights


def _experts(shape: Shape, work: Workload, on_cpu: bool) -> float:
    stored = packed_bytes(shape)
    if work.from_host and not on_cpu:
        experts = shape.layers * shape.experts
        stored *= min(experts, STREAM_BUFFERS * STREAM_EXPERTS) / experts
    return stored + float(work.bytes * shape.expert_biases)


def _dense(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """In NF4 only attention is packed, and the embedding stays on the host."""
    weights = work.bytes * shape.dense_weights
    if not work.nf4 or on_cpu:
        return float(weights)
    attention = shape.layers * shape.attention_matrix
    embedding = shape.vocab * shape.hidden
    return weights - attention * (work.bytes - NF4_BYTES) - work.bytes * embedding


def _multiplies_packed(shape: Shape, work: Workload, machine: Machine) -> bool:
    return shape.packed and work.dense in machine.native


def _cpu_scratch(shape: Shape, work: Workload, machine: Machine) -> float:
    """What is decoded at once, and all that has as many rows as the fullest group (finetune/model/cpu.py,
    `_Backward`): in b x and d_out [H], in float32 d_rows [H]. Where weights are multiplied as they are,
    beside these y [2I] and d_hidden [I] in float32, d_y [2I] and hidden [I] in b (cpu_native.py); else y
    [2I] and hidden [I] in b and seven of I in float32 (cpu_torch.py)."""
    h, i, b = shape.hidden, shape.intermediate, work.bytes
    row = (2 * b + 4) * h + 4 * _padded(work) * b
    if _multiplies_packed(shape, work, machine):
        fullest = work.tokens * shape.top_k / shape.experts * ROUTING_SKEW
        rows = min(work.tokens * shape.top_k, max(fullest, CPU_GROUP_VALUES / (2 * h + 4 * i)))
        return rows * (row + (3 * b + 12) * i)
    experts = group_experts(shape)
    sizes = (h, 2 * i), (i, h)
    decoded = sum(i * min(o, max(1, CPU_GROUP_WEIGHTS // 2 // i)) for i, o in sizes) if shape.packed else 0
    return experts * decoded * b + _rows_of_a_group(shape, work, experts) * (row + (3 * b + 28) * i)


def _onednn(shape: Shape, work: Workload, machine: Machine) -> float:
    everything = ONEDNN_PROGRAM * ONEDNN_PROGRAMS
    packed = _multiplies_packed(shape, work, machine)
    if work.varied:  # every pack brings new numbers of learned tokens, and of an expert's rows
        return VARIED_SHARE * everything if packed else everything
    of_rows = 0.0 if packed else min(ONEDNN_ALL, ONEDNN_ROW * work.tokens * shape.top_k)
    blocks = math.ceil(min(work.tokens, work.document) / ATTENTION_QUERIES) if shape.full_layers else 1
    return min(of_rows + ONEDNN_PROGRAM * ATTENTION_PRODUCTS * blocks, everything)


def _rows_of_a_group(shape: Shape, work: Workload, experts: int) -> float:
    rows = work.tokens * shape.top_k
    return min(rows, rows * experts / shape.experts * (ROUTING_SKEW if experts < shape.experts else 1.0))


def _cuda_scratch(shape: Shape, work: Workload, free: float) -> float:
    """Experts widened by their factors, and their rows (finetune/model/kernels/wide.py, `_Sizes`)."""
    h, i, extra = shape.hidden, shape.intermediate, _padded(work) + 8
    expert = (2 * i * (h + extra) + h * (i + extra)) * work.bytes
    row = (2 * (h + extra) + 2 * i + 2 * (i + extra) + i + 2 * h) * work.bytes
    rows = work.tokens * shape.top_k
    least, most = expert + min(rows, CUDA_ROWS) * row, shape.experts * expert + rows * row
    return float(min(most, max(least, min(CUDA_WORK, free / CUDA_SHARE))))


def group_experts(shape: Shape) -> int:
    """Experts that a CPU decodes at once."""
    per_expert = 2 * shape.intermediate * shape.hidden
    return min(shape.experts, max(1, CPU_GROUP_WEIGHTS // per_expert))


def _padded(work: Workload) -> int:
    """Products take ranks in steps of 8 (finetune/model/lora.py)."""
    return math.ceil(work.rank / 8) * 8 if "experts" in work.targets else 0


def _kept_of_a_layer(shape: Shape, work: Workload) -> float:
    """What one layer keeps until its backward: selective recomputation, or everything.

    With recomputation: the layer's input and the stream between its halves (and, where they go to the host,
    the experts' input), and the order of the rows (four int64 of N). Without: the experts' input,
    what the norms and LoRA's float32 inputs hold on to, queries, keys, values and the attention's output.
    """
    t, b, rows = work.tokens, work.bytes, work.tokens * shape.top_k
    routing = rows * (4 * 8 + b)
    if work.checkpointing:
        return float((3 if work.offloaded else 2) * t * shape.hidden * b + routing)
    return float(3 * t * shape.hidden * b + routing) + _attention_kept(shape, work)


def layers_with_attention(shape: Shape, work: Workload) -> int:
    """Those that keep attention's result, where others make it again (finetune/model/recompute.py)."""
    return min(work.keep_attention, shape.full_layers) if work.checkpointing else 0


def _kept_attention(shape: Shape, work: Workload) -> float:
    """Attention's output and logsumexp in the layers that keep them."""
    return float(
        layers_with_attention(shape, work) * work.tokens * (shape.query * work.bytes + 4 * shape.heads)
    )


def _attention_kept(shape: Shape, work: Workload) -> float:
    """What the attention half of a layer holds on to between its forward and its backward."""
    t, b = work.tokens, work.bytes
    heads = t * (2 * shape.query + 2 * shape.key_value) * b + 4 * t * shape.heads
    if work.dense == "float32":
        return float(heads + 4 * t * (shape.hidden + shape.query))
    # bf16: both norms and each of the adapters of q, k, v and o take a float32 copy of their input.
    copies = 3 * shape.hidden + shape.query if "attention" in work.targets else 0
    return float(heads + 4 * t * (2 * shape.hidden + copies))


def _experts_working(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """Gradients of the layer's output and input, and of its factors, before they are summed up.

    A CPU sums tokens up in float32 and has factors in b, those of the outputs in two layouts, and their
    gradients in float32, of which the scaled ones are new; a GPU keeps the gradients of all N rows and of the
    factors in float32.
    """
    t, h, b = work.tokens, shape.hidden, work.bytes
    rows = t * shape.top_k
    factors = shape.lora_weights(work.rank, work.targets, part="experts") / shape.layers
    if on_cpu:
        outputs = (2 * shape.intermediate + h) / (3 * shape.intermediate + 2 * h)
        return float(2 * t * h * b + 4 * t * h + rows * 40 + factors * (b + 4) * (1 + outputs))
    return float((rows + 2 * t) * h * b + rows * 40 + 4 * factors)


def _attention_working(shape: Shape, work: Workload, on_cpu: bool) -> float:
    """The recomputed half, gradients of queries, keys and values, and the blocks of scores of a CPU."""
    t, b = work.tokens, work.bytes
    again = _attention_kept(shape, work) if work.checkpointing else 0.0
    gradients = t * (2 * shape.query + 2 * shape.key_value) * b + 2 * 4 * t * shape.key_value
    queries = min(t, ATTENTION_QUERIES)
    keys = min(t, work.document) if shape.full_layers else min(t, shape.window + queries)
    block = 4 * shape.heads // shape.kv_heads * queries * keys
    # Two buffers in float32, and three more where what is multiplied is narrower.
    buffers = 2 + (3 * b / 4 if b < 4 else 0)
    blocks = buffers * max(ATTENTION_BUFFER, block) if on_cpu else 0.0
    return again + gradients + blocks + 2 * t * shape.hidden * b


def _head_rows(shape: Shape, work: Workload) -> float:
    """The final norm in float32, the learned rows, and their gradient in float32."""
    learned = work.tokens * work.learned
    return work.tokens * shape.hidden * (4 + work.bytes) + learned * shape.hidden * (work.bytes + 4.0)


def _head_tiles(shape: Shape, work: Workload, on_cpu: bool) -> float:
    rows, words = _head_tile(shape, work, on_cpu)
    tiles = HEAD_TILES * 4 if on_cpu else 0.0
    return rows * words * (work.bytes + tiles)


def _head_tile(shape: Shape, work: Workload, on_cpu: bool) -> tuple[float, int]:
    """Tokens and words of the vocabulary that the head scores at once."""
    tokens, words = (CPU_HEAD_TOKENS, CPU_HEAD_WORDS) if on_cpu else (HEAD_TOKENS, HEAD_WORDS)
    return min(work.tokens * work.learned, tokens), min(shape.vocab, words)
