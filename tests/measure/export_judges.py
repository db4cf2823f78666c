"""Every format's judge about a tuned nano and random models of odd shapes: what `finetune verify` finds.

    python -m tests.measure.export_judges RUN [--record]

RUN is a finished run on nano, such as `make demo` leaves; its formats are judged on its held-out rows. A
difference is the largest one of a logit from the tuned model's; `reading` that from this program's own
reading of the same files, where something was rounded. Shares of gain and change are of the held-out rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from finetune.export import export
from finetune.export.verify import verify
from finetune.rundir import RunDir
from tests.export_kit import SHAPES, write_adapter, write_base, write_talk
from tests.measure.conditions import record

OF_ADAPTERS = ("adapter", "gguf-lora", "sglang-lora")
OF_BASES = ("bf16", "gguf", "gguf q8_0", "openai")
MERGED = ("bf16", "mxfp4", "gguf", "gguf q8_0", "openai")
NEVER_TOO_LITTLE = float("-inf")


@dataclass(frozen=True)
class Model:
    """`where` is exported; without a run, what merging is fitted to and judged on is `talk`."""

    name: str
    where: Path
    formats: tuple[str, ...]
    talk: Path | None = None


def models(run: RunDir, folder: Path) -> Iterator[Model]:
    """The run, and random models with and without a random adapter."""
    yield Model("nano, tuned", run.path, (*OF_ADAPTERS, *MERGED))
    talk = write_talk(folder / "talk.jsonl")
    for name, shape in SHAPES.items():
        base = write_base(folder / name, **shape)
        yield Model(f"{name}, base", base, OF_BASES)
        adapter = write_adapter(folder / f"{name}-adapter", base)
        yield Model(f"{name}, tuned", adapter, (*OF_ADAPTERS, *MERGED), talk)


def judged(model: Model, words: str, out: Path) -> dict[str, Any]:
    """Export and verify; `words` are a format, and perhaps that of its dense tensors."""
    to, _, dense = words.partition(" ")
    merges = to in ("mxfp4", "gguf", "openai") and "tuned" in model.name
    facts = export(
        model.where,
        to,
        out,
        calibrate=model.talk if merges else None,
        kept_at_least=NEVER_TOO_LITTLE,
        dense="q8_0" if dense == "q8_0" else "bf16",
    )
    verdict = verify(out, against=str(model.where), data=model.talk if merges else None).to_dict()
    return {"model": model.name, "export": words, "bytes": _size(out, facts), **verdict}


def _size(out: Path, facts: dict[str, Any]) -> int:
    return sum((out / name).stat().st_size for name in facts["files"])


def shown(row: dict[str, Any]) -> list[str]:
    kept = row["kept"]
    shares = [f"{kept[name]:.2%}" if kept and kept[name] is not None else "" for name in ("gain", "change")]
    reading = "" if row["reading"] is None else f"{row['reading']:.1e}"
    greedy = f"{row['greedy_equal']}/{row['greedy']}"
    difference = f"{row['max_difference']:.1e}"
    passed = "yes" if row["passed"] else "NO"
    return [row["model"], row["export"], row["judge"], difference, reading, greedy, *shares, passed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=RunDir.open)
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    table = Table(
        "model", "export", "judge", "difference", "reading", "greedy equal", "gain", "change", "passed"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models(options.run, Path(folder)):
            for words in model.formats:
                row = judged(model, words, Path(folder) / "out" / f"{model.name} {words}")
                rows.append(row)
                table.add_row(*shown(row))
                print(json.dumps(row), file=sys.stderr, flush=True)
    Console(width=140).print(table)
    print(f"{len(rows)} exports, {sum(not row['passed'] for row in rows)} of them not passed")
    if options.record:
        print(record("export_judges", "python -m tests.measure.export_judges RUN --record", {"table": rows}))


if __name__ == "__main__":
    main()
