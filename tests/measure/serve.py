"""`finetune serve` against `transformers serve` on the same merged nano, and memory over 10,000 requests.

    python -m tests.measure.serve [--requests 10000] [--record]

Both serve nano merged to bf16 (`finetune export nano --to bf16`), in bfloat16 on the CPU, one after the other
in one run, with continuous batching; a client asks both the same greedy completions as streams. transformers
gets 8,192 tokens of cache (its default would be 60% of the memory). The first token is the first whose text
holds `analysis`, as transformers leaves out special tokens. Needs `pip install 'transformers[serving]'`.

`parted` are the answers that differ: at the first token that does, the logits of ours and theirs in float32,
beside the distance of two neighbouring bfloat16 numbers of that size. Memory grows while sizes of products
are met for the first time: oneDNN keeps 0.6 MiB for each (`finetune/serve/sizes.py`), and there are few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.measure.conditions import record

CLIENTS = (1, 8, 32)
REQUESTS_A_CLIENT = {1: 16, 8: 6, 32: 4}
NEW_TOKENS = 64
# Requests between two looks at the memory.
LOOK_EVERY = 500


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    pid: int
    # What makes it tell the number of tokens at the end of a stream.
    extra: dict[str, Any]

    def resident_mib(self) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@contextmanager
def serving(words: list[str], model: str, port: int, **extra: Any) -> Iterator[Server]:
    """A server in a process of its own, from when it answers on /health."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(url + "/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                assert process.poll() is None, f"{words[0]} has ended"
            time.sleep(0.2)
        yield Server(url, model, process.pid, extra)
    finally:
        process.terminate()
        process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ours(merged: Path, port: int) -> list[str]:
    program = "from finetune.cli import main; main()"
    return [sys.executable, "-c", program, "serve", str(merged), "--port", str(port)]


def theirs(merged: Path, port: int) -> list[str]:
    words = ["serve", str(merged), "--continuous-batching", "--cb-num-blocks", "256", "--cb-block-size", "32"]
    words += ["--attn-implementation", "eager", "--dtype", "bfloat16", "--device", "cpu"]
    # transformers listens where `localhost` leads, which may be IPv6.
    words += ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *words]


@dataclass(frozen=True)
class Timed:
    first: float
    tokens: int
    text: str


def prompt_of(number: int) -> str:
    return f"<|start|>user<|message|>What is {100 + number % 800} plus 86?<|end|><|start|>assistant"


async def complete(client: httpx.AsyncClient, server: Server, number: int) -> Timed:
    body = {
        "model": server.model,
        "prompt": prompt_of(number),
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "stream": True,
    }
    body |= server.extra
    began, first, tokens, text = time.perf_counter(), 0.0, 0, ""
    async with client.stream("POST", server.url + "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            text += "".join(choice["text"] for choice in chunk["choices"])
            if not first and "analysis" in text:
                first = time.perf_counter() - began
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return Timed(first, tokens, text)


async def load(server: Server, clients: int, answers: dict[int, str]) -> dict[str, float]:
    """Requests of `clients` that each ask again as soon as they are answered."""
    total = clients * REQUESTS_A_CLIENT[clients]
    numbers = iter(range(total))
    found: list[Timed] = []

    async def one_client() -> None:
        for number in numbers:
            timed = await complete(client, server, number)
            answers[number] = timed.text
            found.append(timed)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await complete(client, server, 0)
        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    return {
        "requests": total,
        "requests_per_second": round(total / seconds, 2),
        "tokens_per_second": round(sum(timed.tokens for timed in found) / seconds, 1),
        "first_token_seconds_median": round(statistics.median(timed.first for timed in found), 4),
        "first_token_seconds_worst": round(max(timed.first for timed in found), 4),
    }


async def many(server: Server, requests: int) -> list[dict[str, float]]:
    """The server's resident memory while it answers so many requests of 32 clients, of many lengths."""
    curve = [{"requests": 0.0, "resident_mib": round(server.resident_mib(), 1)}]
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=32)) as client:
        for done in range(0, requests, LOOK_EVERY):
            numbers = iter(range(done, min(done + LOOK_EVERY, requests)))

            async def one_client(numbers: Iterator[int] = numbers) -> None:
                for number in numbers:
                    prompt = "What is 3 + 4? " * (1 + number % 23)
                    body = {"model": server.model, "prompt": prompt, "max_tokens": 1 + number % 7}
                    (await client.post(server.url + "/v1/completions", json=body)).raise_for_status()

            await asyncio.gather(*(one_client() for _ in range(32)))
            asked = float(min(done + LOOK_EVERY, requests))
            curve.append({"requests": asked, "resident_mib": round(server.resident_mib(), 1)})
    return curve


def parted(merged: Path, answers: dict[str, dict[int, str]]) -> list[dict[str, Any]]:
    """Where the two servers' answers to a prompt are not the same text, apart from special tokens."""
    import torch

    from finetune import load_model

    model: Any
    model, tokenizer = load_model(str(merged), dtype=torch.float32, device="cpu")

    def shown(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    found = []
    for number, theirs in sorted(answers["transformers"].items()):
        prompt, ours = tokenizer.encode(prompt_of(number)), tokenizer.encode(answers["finetune"][number])
        if shown(ours) == theirs:
            continue
        at = next(i for i in range(len(ours)) if not theirs.startswith(shown(ours[: i + 1])))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ours[:at]])).logits[0, -1]
        likeliest = logits.topk(20).indices.tolist()
        other = next(t for t in likeliest if t != ours[at] and theirs.startswith(shown([*ours[:at], t])))
        chosen = [float(logits[token]) for token in (ours[at], other)]
        step = 2.0 ** (math.frexp(max(chosen))[1] - 8)
        found.append({"number": number, "token": at, "logits": chosen, "bfloat16_step": step})
    return found


def measure(requests: int) -> dict[str, Any]:
    from finetune.export import export

    figures: dict[str, Any] = {"new_tokens_at_most": NEW_TOKENS}
    answers: dict[str, dict[int, str]] = {"finetune": {}, "transformers": {}}
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        export("nano", "bf16", merged)
        usage = {"stream_options": {"include_usage": True}}
        sides: list[tuple[str, Any, str, dict[str, Any]]] = [
            ("transformers", theirs, str(merged), {}),
            ("finetune", ours, "merged", usage),
        ]
        for name, command, model, extra in sides:
            port = free_port()
            with serving(command(merged, port), model, port, **extra) as server:
                rows = {str(n): asyncio.run(load(server, n, answers[name])) for n in CLIENTS}
                figures[name] = {"by_clients": rows, "resident_mib": round(server.resident_mib(), 1)}
                print(name, json.dumps(figures[name], indent=2), file=sys.stderr, flush=True)
                if name == "finetune":
                    figures["memory"] = asyncio.run(many(server, requests))
        figures["parted"] = parted(merged, answers)
    asked = len(answers["finetune"])
    figures["same_answers"] = {"of": asked, "same": asked - len(figures["parted"])}
    sizes = [look["resident_mib"] for look in figures["memory"]]
    figures["growth_in_second_half_mib"] = round(sizes[-1] - sizes[len(sizes) // 2], 1)
    figures["requests_per_second_ratio"] = {
        n: round(
            row["requests_per_second"] / figures["transformers"]["by_clients"][n]["requests_per_second"], 2
        )
        for n, row in figures["finetune"]["by_clients"].items()
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000, help="for the curve of the memory")
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    figures = measure(options.requests)
    print(json.dumps(figures, indent=2))
    if options.record:
        record("serve", f"python -m tests.measure.serve --requests {options.requests} --record", figures)


if __name__ == "__main__":
    main()
