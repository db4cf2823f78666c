"""What machines can do: memory, matrix rate, memory bandwidth. GPUs by their makers' data sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from finetune.errors import FinetuneError


@dataclass(frozen=True)
class Machine:
    """`memory` in bytes; `matrix` in FLOP/s by dtype and `bandwidth` in bytes/s, as reached in practice.

    `libraries`: bytes in use before a model is loaded; `slack`: the share of what comes and goes that an
    allocator holds on to; `sheet_matrix`: the FLOP/s in bf16 that mfu is a share of. Of a processor `prices`
    are measured, by dtype the seconds of each unit of finetune/predict/units.py; in the dtypes `native` it
    multiplies packed weights as they are. Of GPUs there are
    `attention` in FLOP/s; `decode`, weights/s from MXFP4 into each dtype; `call`, seconds that a launch
    costs; `link`, bytes/s from host memory.
    """

    name: str
    kind: str
    memory: float
    matrix: dict[str, float]
    bandwidth: float
    libraries: float
    slack: float
    sheet_matrix: float = 0.0
    prices: dict[str, dict[str, float]] = field(default_factory=dict)
    native: tuple[str, ...] = ()
    attention: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    call: float = 0.0
    link: float = 0.0
    measured: bool = False


@dataclass(frozen=True)
class _Sheet:
    """A GPU's data sheet: memory in GiB, dense bf16 and TF32 TFLOP/s without sparsity, TB/s, and the
    generation of its PCIe with 16 lanes."""

    name: str
    memory: float
    bf16: float
    tf32: float
    bandwidth: float
    pcie: int


# Data sheets of NVIDIA, of the form that is named; figures without sparsity.
_SHEETS = {
    # "NVIDIA H100 Tensor Core GPU" data sheet: SXM 989 TFLOP/s, 3.35 TB/s.
    "h100-80": _Sheet("H100 SXM 80 GB", 79.1, 989, 494, 3.35, 5),
    # The same: PCIe 756 TFLOP/s, 2.0 TB/s.
    "h100-pcie": _Sheet("H100 PCIe 80 GB", 79.1, 756, 378, 2.0, 5),
    # "NVIDIA H200 Tensor Core GPU" data sheet: the H100's rates, 141 GB at 4.8 TB/s.
    "h200": _Sheet("H200 SXM 141 GB", 139.8, 989, 494, 4.8, 5),
    # "NVIDIA B200" in the "DGX B200" data sheet: 36 PFLOP/s of dense bf16 over 16 dies, 8 TB/s.
    "b200": _Sheet("B200 180 GB", 178.0, 2250, 1100, 8.0, 5),
    # "NVIDIA A100 Tensor Core GPU" data sheet: 312 TFLOP/s; 40 GB at 1.555, 80 GB SXM at 2.039 TB/s.
    "a100-40": _Sheet("A100 40 GB", 39.4, 312, 156, 1.555, 4),
    "a100-80": _Sheet("A100 SXM 80 GB", 79.2, 312, 156, 2.039, 4),
    # "NVIDIA L40S" data sheet: 362 TFLOP/s, 48 GB, 864 GB/s.
    "l40s": _Sheet("L40S 48 GB", 44.5, 362, 183, 0.864, 4),
    # "NVIDIA L4" data sheet: 121 TFLOP/s (242 with sparsity), 24 GB, 300 GB/s.
    "l4": _Sheet("L4 24 GB", 22.5, 121, 60, 0.300, 4),
    # "Ada GPU architecture" whitepaper, table 2: RTX 4090, 165.2 TFLOP/s with fp32 sums, 1008 GB/s.
    "rtx4090": _Sheet("RTX 4090 24 GB", 23.6, 165, 82, 1.008, 4),
    # "NVIDIA Ampere GA102" whitepaper, table 9: RTX 3090, 71 TFLOP/s with fp32 sums, 936 GB/s.
    "rtx3090": _Sheet("RTX 3090 24 GB", 23.6, 71, 35.6, 0.936, 4),
    # "RTX Blackwell GPU architecture" whitepaper: RTX 5090, 209.5 TFLOP/s with fp32 sums, 32 GB, 1792 GB/s.
    "rtx5090": _Sheet("RTX 5090 32 GB", 31.4, 209.5, 104.8, 1.792, 5),
    # Ada whitepaper, table for the RTX 4080: 97.5 TFLOP/s with fp32 sums, 16 GB, 717 GB/s.
    "16gb": _Sheet("a 16 GB card (as an RTX 4080)", 15.6, 97.5, 48.7, 0.717, 4),
}

# Shares of the data sheet that are reached, from published measurements on H100 and H200:
# grouped products 569-609 of 989 TFLOP/s (pytorch#163425, H200); a dense Llama LoRA as a whole 402 (NeMo
# AutoModel), so products alone lie between the two.
GPU_MATRIX_SHARE = 600 / 989
# Attention with heads of 64: 474 TFLOP/s backward at 16k on an H100 (FlashAttention-3); FlexAttention, which
# knows sinks and documents, stays below it.
GPU_ATTENTION_SHARE = 350 / 989
# Streaming kernels: 4.3 of 4.8 TB/s on an H200.
GPU_BANDWIDTH_SHARE = 0.9
# CUDA context and the libraries' kernels, outside of what torch counts.
CUDA_CONTEXT = 0.6e9
# The caching allocator keeps blocks of 2 MiB and more; what is left between them.
CUDA_SLACK = 0.05
# A launch costs some 5 microseconds; more than that passes between two of them in eager PyTorch.
CUDA_CALL = 8e-6
# Bytes/s that copies from pinned memory reach of the 32 and 64 GB/s of PCIe 4 and 5.
PCIE = {4: 25e9, 5: 50e9}
GIB = 2**30


def gpu(name: str) -> Machine:
    """A GPU of the table.

    Raises:
        FinetuneError: there is none of that name.
    """
    sheet = _SHEETS.get(name.lower())
    if sheet is None:
        near = difflib.get_close_matches(name.lower(), _SHEETS, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        raise FinetuneError(f"there is no GPU {name} in the table; {meant}known are {', '.join(_SHEETS)}")
    return _machine(sheet.name, sheet.memory * GIB, sheet)


def _machine(name: str, memory: float, sheet: _Sheet) -> Machine:
    matrix = {"bf16": sheet.bf16 * 1e12 * GPU_MATRIX_SHARE, "float32": sheet.tf32 * 1e12 * GPU_MATRIX_SHARE}
    attention = {"bf16": sheet.bf16 * 1e12 * GPU_ATTENTION_SHARE}
    attention["float32"] = attention["bf16"] / 2
    bandwidth = sheet.bandwidth * 1e12 * GPU_BANDWIDTH_SHARE
    # A decoded weight is read as 17/32 of a byte and written in its dtype.
    decode = {"bf16": bandwidth / (17 / 32 + 2), "float32": bandwidth / (17 / 32 + 4)}
    return Machine(
        name=name, kind="cuda", memory=memory, matrix=matrix, attention=attention, bandwidth=bandwidth,
        decode=decode, link=PCIE[sheet.pcie], call=CUDA_CALL,
        libraries=CUDA_CONTEXT, slack=CUDA_SLACK, sheet_matrix=sheet.bf16 * 1e12,
    )  # fmt: skip


def found_gpu(name: str, memory: float) -> Machine | None:
    """The table's entry for a GPU that is here, by the name its driver gives; None if it is unknown."""
    words = name.lower().replace("nvidia", "").replace("geforce", "").replace(" ", "")
    for key in sorted(_SHEETS, key=len, reverse=True):
        if key != "16gb" and words.startswith(key.split("-")[0]):
            sizes = [k for k in _SHEETS if k.split("-")[0] == key.split("-")[0] and k != "h100-pcie"]
            nearest = min(sizes, key=lambda k: abs(_SHEETS[k].memory * GIB - memory))
            if "pcie" in words and "h100" in words:
                nearest = "h100-pcie"
            return _machine(name, memory, _SHEETS[nearest])
    return None
