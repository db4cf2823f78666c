"""Generation against stock transformers: tokens/s of reading a prompt and of writing, and memory.

    python -m tests.measure.generate_speed [--dtypes bfloat16 float32] [--tries 2] [--record]

Random weights (hidden 1024, 32 experts, 4 layers), the same prompts, greedy, on this machine's CPU. Each side
lives in a process of its own, and they take turns at every prompt; a side's figure is its best try, as what
else runs on the machine can only slow one down. The sides: what `finetune generate` runs, and `generate` of
transformers on the weights that it dequantises as it loads, with its default attention and experts.

Reading ends with the first token. Memory is what a process peaks at over what it holds after its imports,
mapped files included. `same_tokens` counts up to the first difference from stock: of equally likely tokens,
which random weights often have in bfloat16, rounding picks one. --record adds the dtypes that were measured
to runs/reference/generate_speed.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GptOssForCausalLM

from finetune.bench.conditions import forget_peak
from finetune.bench.random_weights import write_random_base
from finetune.evaluate.generation import generate
from finetune.model import keep_decoded, load_base
from tests.measure.conditions import REFERENCE, record, resident_gib
from tests.measure.random_size import config_of

SIDES = ("finetune", "transformers")
# Prompts at once, and their tokens. Eight of 4096 are left out: stock's scores alone would take 9 GB.
CASES = ((1, 128), (1, 1024), (1, 4096), (8, 128), (8, 1024))
NEW_TOKENS = 32
GIB = 2**30


class Answered(NamedTuple):
    ids: list[list[int]]
    read_seconds: float
    write_seconds: float


class Side:
    """A model and its way to answer."""

    def __init__(self, name: str, base: Path, dtype: torch.dtype) -> None:
        self.stock = name == "transformers"
        load = GptOssForCausalLM.from_pretrained if self.stock else load_base
        self.model: Any = load(base, dtype=dtype)
        self.stop = self.model.config.vocab_size - 1  # hardly ever written
        self.encoder: Any = SimpleNamespace(stop_ids=(self.stop,), pad_id=0)
        self.passes: list[float] = []
        self.model.register_forward_hook(lambda *_: self.passes.append(time.perf_counter()))

    def answer(self, prompts: Sequence[Sequence[int]]) -> Answered:
        self.passes.clear()
        began = time.perf_counter()
        if self.stock:
            ids = torch.tensor(prompts)
            config = GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=self.stop
            )
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            answers = out[:, ids.shape[1] :].tolist()
        else:
            answers = generate(self.model, self.encoder, prompts, max_new_tokens=NEW_TOKENS)
        return Answered(answers, self.passes[0] - began, self.passes[-1] - self.passes[0])


def live(name: str, base: Path, dtype: torch.dtype) -> None:
    """Answer the prompts that come as lines, and tell the memory at the end."""
    imports = resident_gib("VmRSS")
    side = Side(name, base, dtype)
    loading = resident_gib()
    forget_peak()
    # `generate` by itself forgets at its end what it kept: an evaluation, too, keeps it between batches.
    room = nullcontext() if side.stock else keep_decoded(side.model)
    with room:
        for line in sys.stdin:
            print(json.dumps(side.answer(json.loads(line))), flush=True)
    gb = {"peak_gb": resident_gib(), "loading_peak_gb": loading}
    print(json.dumps({key: round((value - imports) * GIB / 1e9, 3) for key, value in gb.items()}))


@contextmanager
def process(name: str, base: Path, dtype: str) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "tests.measure.generate_speed", "--live", name, str(base), dtype]
    started = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def ask(side: subprocess.Popen[str], prompts: list[list[int]]) -> Answered:
    assert side.stdin and side.stdout
    side.stdin.write(json.dumps(prompts) + "\n")
    side.stdin.flush()
    return Answered(*json.loads(side.stdout.readline()))


def until_first_difference(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of tokens that are equal, of each answer up to where they part."""
    same = 0
    for ours, theirs in zip(a, b, strict=True):
        same += len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))))
    return same / sum(map(len, b))


def compare(base: Path, dtype: str, tries: int) -> dict[str, Any]:
    """Tokens/s of each side by case, and memory."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = config_of()["vocab_size"]
    found: dict[str, Any] = {}
    with ExitStack() as alive:
        sides = {name: alive.enter_context(process(name, base, dtype)) for name in SIDES}
        for side in sides.values():
            ask(side, [[1 + place % (vocabulary - 2) for place in range(128)]] * 8)  # warms up
        for count, length in CASES:
            prompts = torch.randint(1, vocabulary - 1, (count, length), generator=generator).tolist()
            best: dict[str, Answered] = {}
            for _ in range(tries):
                for name, side in sides.items():
                    new = ask(side, prompts)
                    old = best.get(name, new)
                    seconds = (min(x, y) for x, y in zip(old[1:], new[1:], strict=True))
                    best[name] = Answered(new.ids, *seconds)
            case = {
                name: {
                    "read_tokens_per_second": round(count * length / best[name].read_seconds, 1),
                    "write_tokens_per_second": round(count * (NEW_TOKENS - 1) / best[name].write_seconds, 1),
                    "same_tokens": round(until_first_difference(best[name].ids, best["transformers"].ids), 3),
                }
                for name in SIDES
            }
            found[f"{count} x {length}"] = case
            print(dtype, f"{count} x {length}", json.dumps(case), flush=True)
        for name, side in sides.items():
            out, _ = side.communicate()
            found.setdefault("memory_over_imports", {})[name] = json.loads(out.splitlines()[-1])
    print(dtype, json.dumps(found["memory_over_imports"]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tries", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    parser.add_argument("--live", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live:
        name, base, dtype = options.live
        return live(name, Path(base), getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        base = write_random_base(Path(folder) / "base", config_of())
        figures = {dtype: compare(base, dtype, options.tries) for dtype in options.dtypes}
    if options.record:
        file = REFERENCE / "generate_speed.json"
        known = json.loads(file.read_text())["figures"] if file.is_file() else {}
        record("generate_speed", "python -m tests.measure.generate_speed --record", known | figures)
    return None


if __name__ == "__main__":
    main()
