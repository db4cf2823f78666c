"""An expert's products with its packed weights and its LoRA, and its activation, by the native libraries."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from finetune.model.layout import BLOCK
from finetune.model.mxfp4 import values_of_scales
from finetune.model.native import load_library, multiplies
from finetune.model.native.decoder import KINDS


def _fields(pointers: str, numbers: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in pointers.split()] + [
        (name, ctypes.c_int64) for name in numbers.split()
    ]


class _Product(ctypes.Structure):
    """`product_t` of products.c."""

    _fields_ = _fields(
        "numbers starts counts blocks scales values rows low factor bias16 bias32 out",
        "experts outs ins rank transposed next",
    )


class _Factor(ctypes.Structure):
    """`factor_t` of factors.c."""

    _fields_ = _fields("numbers starts counts rows low factor", "experts width rank next")


class _Activation(ctypes.Structure):
    """`activation_t` of activation.c."""

    _fields_ = [
        *_fields("y d_hidden score hidden d_y d_score", "rows inner"),
        ("alpha", ctypes.c_float), ("limit", ctypes.c_float), ("next", ctypes.c_int64),
    ]  # fmt: skip


def _places(**tensors: Tensor) -> dict[str, int]:
    """Where they are in memory, in which the libraries look blindly."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has to be contiguous")
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


class Parts:
    """Experts of a group, by number, and of each its first row and its rows."""

    def __init__(self, numbers: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.count = len(numbers)
        self.table = torch.tensor([*numbers, *starts, *counts]).view(3, -1)

    def fields(self) -> dict[str, int]:
        names = "numbers", "starts", "counts"
        places = dict(zip(names, (row.data_ptr() for row in self.table), strict=True))
        return places | {"experts": self.count}


class NativeProducts:
    """Functions for one dtype. All tensors are contiguous; rows `[n, ...]` are in it, sums in float32."""

    def __init__(self, dtype: torch.dtype, libraries: dict[str, ctypes.CDLL], parallel: Any) -> None:
        self._parallel, self._values = parallel, values_of_scales(dtype)
        self._functions = {
            name: libraries[library][f"{name}_{KINDS[dtype]}"]
            for name, library in {
                "multiply": "products", "lower": "factors", "sum_up": "factors",
                "activate": "activation", "activate_back": "activation",
            }.items()
        }  # fmt: skip

    def _run(self, name: str, work: ctypes.Structure) -> None:
        with record_function(f"native::{name}"):
            self._functions[name](ctypes.byref(work), self._parallel, torch.get_num_threads())

    def multiply(
        self, parts: Parts, blocks: Tensor, scales: Tensor, rows: Tensor, out: Tensor, *,
        low: Tensor | None, factor: Tensor | None, bias: Tensor | None = None, transposed: bool = False,
    ) -> Tensor:  # fmt: skip
        """Of each part `rows @ W.T + low @ factor.T + bias` or, transposed, `rows @ W + low @ factor`.

        `blocks [E, out, in/32, 16]`, `scales [E, out, in/32]`, `low [n, R]`, `factor [E, out, R]`, transposed
        `[E, R, in]`, `bias [E, out]`. It is written to `out`.
        """
        given = {"blocks": blocks, "scales": scales, "values": self._values, "rows": rows, "out": out}
        if low is not None and factor is not None:
            given |= {"low": low, "factor": factor}
        if bias is not None:
            given["bias32" if bias.dtype == torch.float32 else "bias16"] = bias
        _, outs, across = scales.shape
        self._run("multiply", _Product(
            **_places(**given), **parts.fields(), outs=outs, ins=BLOCK * across,
            rank=0 if low is None else low.shape[1], transposed=transposed,
        ))  # fmt: skip
        return out

    def lower(self, parts: Parts, rows: Tensor, factor: Tensor, low: Tensor) -> Tensor:
        """Of each part `rows @ factor.T`, to `low`; `rows [n, M]`, `factor [E, R, M]`, `low [n, R]`."""
        self._factor("lower", parts, rows, factor, low)
        return low

    def sum_up(self, parts: Parts, low: Tensor, rows: Tensor, out: Tensor) -> None:
        """Of each part `low.T @ rows`, written to its place in `out [E, R, M]`, which is in float32."""
        self._factor("sum_up", parts, rows, out, low)

    def _factor(self, name: str, parts: Parts, rows: Tensor, factor: Tensor, low: Tensor) -> None:
        self._run(name, _Factor(
            **_places(rows=rows, low=low, factor=factor), **parts.fields(), width=rows.shape[1],
            rank=low.shape[1],
        ))  # fmt: skip

    def activate(self, y: Tensor, hidden: Tensor, alpha: float, limit: float) -> Tensor:
        """`y [n, 2I]` -> `hidden [n, I]`."""
        rows, inner = hidden.shape
        self._run("activate", _Activation(
            **_places(y=y, hidden=hidden), rows=rows, inner=inner, alpha=alpha, limit=limit,
        ))  # fmt: skip
        return hidden

    def activate_back(
        self, y: Tensor, d_hidden: Tensor, score: Tensor, d_y: Tensor, alpha: float, limit: float
    ) -> Tensor:
        """`d_hidden [n, I]` of the unweighted output and `score [n, 1]` -> `d_y [n, 2I]` of the weighted one,
        and what is returned, the sums of `d_hidden` times the activation, `[n, 1]`."""
        rows, inner = d_hidden.shape
        d_score = torch.empty_like(score)
        self._run("activate_back", _Activation(
            **_places(y=y, d_hidden=d_hidden, score=score, d_y=d_y, d_score=d_score),
            rows=rows, inner=inner, alpha=alpha, limit=limit,
        ))  # fmt: skip
        return d_score


@cache
def native_products(dtype: torch.dtype) -> NativeProducts | None:
    """For rows in `dtype`, where this processor's vectors multiply it faster than torch's libraries do."""
    # The threads are those of torch, whose OpenMP this is: a second one's would wait beside them for work.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if dtype not in KINDS or parallel is None or not multiplies(KINDS[dtype]):
        return None
    libraries = {name: load_library(name) for name in ("products", "factors", "activation")}
    found = {name: library for name, library in libraries.items() if library is not None}
    return NativeProducts(dtype, found, parallel) if len(found) == len(libraries) else None
