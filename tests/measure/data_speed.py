"""Preparing conversations for training: rows a second and memory, beside TRL's preparation of the same rows.

    python -m tests.measure.data_speed [--rows 16000] [--rounds 2] [--tokens 10000000] [--record]

The rows are OpenAssistant's threads, GSM8K with its reasoning and Glaive's tool calls, from ../shared/data
and with the tokenizer there; where they repeat, sentences change places and digits their value. Both sides
begin at the file of messages with nothing cached, end at packs of 8,192 tokens with labels, and keep what
they made on disk; the clock starts when libraries and tokenizer are loaded. TRL
(`SFTTrainer._prepare_dataset`) has its own gpt-oss template, the one that can mask (`assistant_only_loss`),
and packs best fit (`bfd`), in one process and in one for each core. Sides take turns; of each the fastest
round counts. Memory is the largest sum over a side's processes, libraries and tokenizer included, pages that
processes share counted in parts (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from finetune.chat import HarmonyEncoder
from finetune.data import PackedDataset, prepare_data, read_rows
from finetune.data.shapes import harmony_row
from finetune.recipe import Recipe, Source
from tests.conftest import SHARED
from tests.data_kit import threads
from tests.measure.conditions import record

TOKENIZER = SHARED / "o200k"
CAPACITY = 8192
TOKENS_PER_ROW = 280  # of these rows, about
GSM8K_ROWS = 2000  # so that it is not nearly all
SECONDS_BETWEEN_SAMPLES = 0.25  # one of 1 GB takes some 8 ms of what is measured
CORES = len(os.sched_getaffinity(0))
SIDES = {"finetune": 1, "trl, 1 process": 1, f"trl, {CORES} processes": CORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="prepared by finetune alone")
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, file = options.side
        with tempfile.TemporaryDirectory() as folder:
            prepare = _ours if side == "finetune" else _trl
            print(json.dumps(prepare(Path(file), Path(folder), SIDES[side])))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        few = _write(Path(folder) / "few.jsonl", options.rows)
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(_run(side, few))
                print(side, json.dumps(found[side][-1]), flush=True)
        many = _write(Path(folder) / "many.jsonl", options.tokens // TOKENS_PER_ROW)
        alone = _run("finetune", many)
        print("alone", json.dumps(alone), flush=True)
    best = {side: max(runs, key=lambda run: run["rows_per_second"]) for side, runs in found.items()}
    best = {side: run | {"peak_gb": max(r["peak_gb"] for r in found[side])} for side, run in best.items()}
    ours = best.pop("finetune")
    ratio = ours["rows_per_second"] / max(run["rows_per_second"] for run in best.values())
    print(f"{ratio:.2f} times TRL's faster way; {alone['tokens']:,} tokens in {alone['peak_gb']:.2f} GB")
    if options.record:
        figures = {"rows": options.rows, "finetune": ours, **best, "ratio": round(ratio, 2), "rounds": found}
        command = f"python -m tests.measure.data_speed --rows {options.rows} --rounds {options.rounds}"
        record("data_speed", command, {**figures, "many_tokens": alone})


def _run(side: str, file: Path) -> dict[str, Any]:
    """One side in a process of its own, and the most memory it had."""
    words = [sys.executable, "-m", "tests.measure.data_speed", "--side", side, str(file)]
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _shared_out_bytes(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        said, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{side} failed:\n{errors}")
    figures = json.loads(said.splitlines()[-1])
    rates = {f"{what}_per_second": round(figures[what] / figures["seconds"]) for what in ("rows", "tokens")}
    return {**figures, **rates, "peak_gb": round(peak / 1e9, 3)}


def _shared_out_bytes(pid: int) -> int:
    """PSS of a process and those it started; nothing of those that have just ended."""
    total = 0
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _ours(file: Path, folder: Path, _: int) -> dict[str, Any]:
    encoder = HarmonyEncoder.from_dir(TOKENIZER)
    data = {"train": [{"path": str(file)}], "held_out": 0.02, "max_tokens": CAPACITY}
    recipe = Recipe.model_validate({"name": "speed", "model": {"base": "nano"}, "data": data})
    began = time.perf_counter()
    prepared = prepare_data(recipe, encoder, cache_dir=folder)
    packs = PackedDataset(prepared.train, CAPACITY)
    seconds = time.perf_counter() - began
    report = prepared.report
    return {"seconds": round(seconds, 3), "rows": report.rows, "tokens": report.tokens, "packs": len(packs)}


def _trl(file: Path, folder: Path, processes: int) -> dict[str, Any]:
    import datasets
    from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import gptoss_chat_template

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER / "tokenizer.json"), eos_token="<|return|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = gptoss_chat_template
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 1}
    arguments = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        assistant_only_loss=True,
        packing=True,
        max_length=CAPACITY,
        dataset_num_proc=processes if processes > 1 else None,
        report_to="none",
    )
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    trainer = SFTTrainer(
        model=GptOssForCausalLM(GptOssConfig(vocab_size=len(tokenizer), **sizes, **heads)),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"messages": hello}]),
        processing_class=tokenizer,
    )
    datasets.disable_progress_bars()
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder))
    packs = trainer._prepare_dataset(rows, tokenizer, arguments, True, None, "train")
    seconds = time.perf_counter() - began
    tokens = sum(sum(lengths) for lengths in packs["seq_lengths"])
    return {"seconds": round(seconds, 3), "rows": len(rows), "tokens": tokens, "packs": len(packs)}


def _write(file: Path, count: int) -> Path:
    """A file of so many rows, all of them different."""
    rows = list(_conversations())
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            copy, place = divmod(number, len(rows))
            out.write(json.dumps(_varied(rows[place], copy) if copy else rows[place]) + "\n")
    return file


def _conversations() -> Iterator[dict[str, Any]]:
    data = SHARED / "data"
    with (data / "oasst" / "en_100_tree.jsonl").open(encoding="utf-8") as trees:
        for tree in trees:
            yield from ({"messages": thread} for thread in threads(json.loads(tree)["prompt"]))
    for source in (
        Source(path=str(data / "gsm8k" / "train.jsonl"), limit=GSM8K_ROWS),
        Source(path=str(data / "llamafactory_demo" / "glaive_toolcall_en_demo.json")),
    ):
        for row in read_rows(source):
            found = harmony_row(row.value, source)
            tools = json.loads(found.pop("tools", None) or "[]")
            if tools:  # as the chat API has them, which TRL's template needs
                found["tools"] = [{"type": "function", "function": tool} for tool in tools]
            yield found


def _varied(row: dict[str, Any], copy: int) -> dict[str, Any]:
    """The same row in other words: a copy that nothing kept from the first helps with."""
    draw = random.Random(copy)

    def other(text: str) -> str:
        sentences = re.split(r"(?<=[.!?\n]) ", text)
        draw.shuffle(sentences)
        return re.sub(r"\d", lambda _: str(draw.randrange(10)), " ".join(sentences)) + f" ({copy})"

    texts = ("content", "thinking")
    messages = [
        {key: other(value) if key in texts and value else value for key, value in message.items()}
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


if __name__ == "__main__":
    main()
