"""The table of tests/gpu, predicted: nothing here ran on a GPU.

    python -m tests.measure.gpu_predictions [--record]

Peak memory and speed of each row by `finetune.predict`, which knows what is allocated and what an H200's data
sheet promises; and the sums behind the choices that docs/gpu.md explains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.bench.random_weights import release_config
from finetune.predict import Machine, Shape, Workload, gpu, predict_memory, predict_speed
from tests.gpu.models import SIZES
from tests.gpu.table import GB, ROWS, K, Row
from tests.measure.conditions import print_or_record

# GB/s and TFLOP/s seen on an H200: streaming copies, grouped products (pytorch issue 163425).
BANDWIDTH, PRODUCTS = 4.3e12, 600e12


# What experts on the host are held against: 64k tokens a step, for which an 80 GB card takes two passes.
RESIDENT = replace(ROWS["120b, 24 GB card, experts on host"], tokens=64 * K, limit=80, experts_on_host=False)


def predict_row(row: Row, machine: Machine, passes: int = 1) -> dict[str, float]:
    """Peak memory in GB of 10**9, tokens a second, and what a step waits for."""
    shape = Shape.of(release_config(**SIZES[row.size]))
    work = Workload(
        tokens=row.tokens // passes, passes=passes, rank=row.rank, targets=["attention", "experts"],
        dense="bf16", checkpointing=row.checkpointing, optimizer=row.optimizer, document=row.document,
        nf4=row.nf4, from_host=row.experts_on_host, offloaded=row.offload, keep_attention=row.keep_attention,
    )  # fmt: skip
    limited = replace(machine, memory=min(machine.memory, row.limit * GB))
    memory, speed = predict_memory(shape, work, limited), predict_speed(shape, work, limited)
    seconds = {part.name: part.seconds for part in speed.parts}
    step = speed.step_seconds
    return {
        "predicted_tokens_per_second": round(row.tokens / step, -2),
        "predicted_peak_gb": round(memory.total / GB, 1),
        **{f"predicted_share_{name}": round(each / step, 3) for name, each in seconds.items()},
    }


def decoding_against_fusing() -> dict[str, dict[str, float]]:
    """Decoding's share of the expert products, and the rate from which a fused kernel would win.

    A pass over a layer's experts takes tokens * 4 experts * 24.88 M weights * 2 FLOPs; decoding moves
    17/32 + 2 bytes for each of the layer's weights. A fused kernel wins if it is slower by less than that.
    """
    expert = 3 * 2880 * 2880
    found = {}
    for size in ("20b", "120b"):
        decode = SIZES[size]["experts"] * expert * (17 / 32 + 2) / BANDWIDTH
        for tokens in (4096, 8192, 16384, 32768, 65536):
            products = 2 * tokens * 4 * expert / PRODUCTS
            found[f"{size}, {tokens} tokens"] = {
                "decoding_over_products": round(decode / products, 3),
                "fused_wins_above_share_of_product_rate": round(products / (products + decode), 2),
            }
    return found


def recomputing() -> dict[str, dict[str, float]]:
    """What a layer keeps for backward a token, and what is computed again, by policy."""
    hidden, query, key_value, expert = 2880, 4096, 512, 3 * 2880 * 2880
    attention = hidden * (2 * query + 2 * key_value)
    forward = attention + 4 * expert
    # Weights met by a token again in backward, over those met in forward; bytes in bfloat16.
    return {
        "whole layer (transformers)": {"kept_bytes": 2 * hidden, "again": 1.0},
        "ours": {"kept_bytes": 4 * hidden, "again": round((attention + 4 * expert * 2 / 3) / forward, 3)},
        "ours, attention's output kept": {
            "kept_bytes": 4 * hidden + 2 * (query + key_value * 2) + 2 * query + 4 * 64,
            "again": round(4 * expert * 2 / 3 / forward, 3),
        },
    }


def host_against_resident(machine: Machine) -> dict[str, Any]:
    """120b at rank 8: 32k tokens a step with experts on the host, 64k with resident ones."""
    host = predict_row(ROWS["120b, 24 GB card, experts on host"], machine)
    resident = {f"{passes} passes": predict_row(RESIDENT, machine, passes) for passes in (1, 2)}
    speeds = [each["predicted_tokens_per_second"] for each in (host, resident["2 passes"])]
    share = round(speeds[0] / speeds[1], 2)
    return {"host, 32k": host, "resident, 64k": resident, "share_of_resident": share}


def measure() -> dict[str, Any]:
    machine = gpu("h200")
    return {
        "label": "predicted, not measured",
        "machine": machine.name,
        "rows": {name: predict_row(row, machine) for name, row in ROWS.items() if not row.stock},
        "experts_on_host_against_resident": host_against_resident(machine),
        "decoding_against_fusing": decoding_against_fusing(),
        "recomputing": recomputing(),
    }


if __name__ == "__main__":
    print_or_record("gpu_predicted", "python -m tests.measure.gpu_predictions", measure)
