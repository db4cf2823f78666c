"""Small models of several sizes, timed forward and backward: what each unit of a training step costs here.

A probe is a decoder layer or some of this code, with an adapter, recomputation and random weights. Its units
(finetune/predict/units.py) are counted and its seconds measured; prices that explain all probes are fitted
(finetune/bench/pricing.py). The output head is done likewise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig

from finetune.bench.pricing import fit_prices
from finetune.bench.random_weights import random_tensors, release_config
from finetune.model.cpu_settings import HEAD_TOKENS, HEAD_VOCABULARY, keep_freed_memory, multiply_float32_fast
from finetune.model.loading import adapt_config, assemble
from finetune.model.lora import add_lora
from finetune.predict.shape import Shape
from finetune.predict.units import head_units, layers_units
from finetune.predict.workload import Workload

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
# Rounds at most, and seconds after which none is begun: one takes some four here. With one that counted the
# speed of 5 of 16 models was over a tenth off, with two that of 2 (tests/measure/prediction.py).
ROUNDS, PATIENCE = 3, 10.0
# Layers and how many of them are full, hidden (and intermediate) size, experts, experts a token, query heads,
# tokens, tokens of a document, rank: corners of what models and recipes ask for, in hundredths of a second;
# with many tokens, as what is at work then leaves the caches.
LAYERS = (
    (2, 1, 1024, 32, 4, 16, 256, 256, 8),
    (1, 0, 1024, 8, 4, 16, 512, 256, 8),
    (1, 1, 1024, 4, 2, 16, 256, 256, 8),
    (1, 0, 1024, 2, 2, 16, 384, 128, 64),
    (1, 0, 512, 8, 4, 8, 512, 512, 16),
    (1, 1, 256, 32, 4, 8, 512, 512, 8),
    (1, 0, 256, 32, 4, 8, 128, 128, 32),
    (3, 0, 128, 8, 2, 4, 512, 256, 16),
    (1, 1, 128, 8, 2, 16, 768, 768, 16),
    (1, 0, 64, 64, 4, 2, 256, 256, 8),
    (3, 0, 64, 8, 2, 2, 128, 128, 8),
    (1, 1, 256, 4, 1, 16, 1024, 1024, 8),
    (1, 1, 128, 2, 1, 16, 2048, 2048, 8),
    (1, 1, 128, 2, 1, 4, 4096, 4096, 8),
    (1, 0, 512, 32, 4, 8, 128, 128, 64),
    (1, 0, 2880, 1, 1, 64, 64, 64, 8),
    (1, 0, 2880, 2, 2, 64, 256, 256, 8),
    (1, 0, 1024, 4, 2, 16, 2048, 512, 8),
    (1, 1, 512, 8, 2, 8, 2048, 1024, 8),
)
# Hidden size, vocabulary, tokens.
HEADS = (
    (64, 8192, 256), (256, 4096, 512), (1024, 4096, 256), (2048, 4096, 128), (1024, 8192, 64),
    (512, 65536, 512), (2880, 16384, 128),
)  # fmt: skip

# What TRL's SFT asks of its head: the loss, and what it logs.
OUTPUTS = ("log_probs", "entropy", "is_top1")


def prices(dense: str) -> dict[str, float]:
    """Seconds of one of each unit, computed in `dense`."""
    torch.manual_seed(0)
    multiply_float32_fast()  # as training has it, and so the next
    keep_freed_memory()
    layers, heads = [_layer(probe, dense) for probe in LAYERS], [_head(probe, dense) for probe in HEADS]
    seconds = _seconds([work for _, work in layers + heads])
    units = [each for each, _ in layers + heads]
    of_layers = fit_prices(units[: len(layers)], seconds[: len(layers)], dense)
    return of_layers | fit_prices(units[len(layers) :], seconds[len(layers) :], dense)


def _seconds(works: Sequence[Callable[[], None]]) -> list[float]:
    """Of each the median of some rounds, in which the others push it out of the caches, as the other layers
    of a model do. The first round warms up; on a busy machine there are fewer."""
    rounds: list[list[float]] = []
    began = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) <= ROUNDS and time.perf_counter() - began < PATIENCE):
        rounds.append([])
        for work in works:
            before = time.perf_counter()
            work()
            rounds[-1].append(time.perf_counter() - before)
    return [statistics.median(tries) for tries in zip(*rounds[1:], strict=True)]


def sizes_and_work(probe: tuple[int, ...], dense: str) -> tuple[dict[str, Any], Workload]:
    """The config.json and the pass of one of LAYERS."""
    layers, full, hidden, experts, top_k, heads, tokens, document, rank = probe
    sizes = release_config(
        hidden=hidden, intermediate=hidden, layers=layers, experts=experts, top_k=top_k, heads=heads,
        kv_heads=max(1, heads // 4), head_dim=64, vocab=8, sliding_window=128,
    )  # fmt: skip
    sizes["layer_types"] = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    return sizes, Workload(tokens, 1, rank, ["attention", "experts"], dense, True, "adamw", document)


def _layer(probe: tuple[int, ...], dense: str) -> tuple[dict[str, float], Callable[[], None]]:
    """A layer's units, and the layer forward and backward."""
    sizes, work = sizes_and_work(probe, dense)
    model = _random_model(sizes, DTYPES[dense], work)
    x = torch.randn(1, work.tokens, sizes["hidden_size"], dtype=DTYPES[dense], requires_grad=True)
    positions = (torch.arange(work.tokens) % work.document).unsqueeze(0)

    def forward_and_backward() -> None:
        out = model(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))
        model.zero_grad()

    return layers_units(Shape.of(sizes), work), forward_and_backward


def _random_model(sizes: dict[str, Any], dtype: torch.dtype, work: Workload) -> Any:
    """A model without its head, as training has it."""
    tensors = random_tensors(sizes, torch.Generator().manual_seed(0), packed=True)
    named = {name.removesuffix("_blocks"): _placed(tensor, dtype) for name, tensor in tensors}
    model = assemble(adapt_config(GptOssConfig(**sizes), dtype), named, packed=True)
    adapted = add_lora(model, rank=work.rank, alpha=work.rank, targets=work.targets)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    return model.model


def _placed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.uint8 else tensor.to(dtype)


def _head(probe: tuple[int, ...], dense: str) -> tuple[dict[str, float], Callable[[], None]]:
    """The head's units, and TRL's function that training has for it, forward and backward."""
    from trl.kernels import chunked_logprob

    hidden, words, tokens = probe
    chunked_logprob.TOKEN_CHUNK_SIZE = HEAD_TOKENS
    rows = torch.randn(tokens, hidden, dtype=DTYPES[dense], requires_grad=True)
    # Logits as a model has them; of larger ones the exponentials are denormal, which are many times slower.
    weight = (torch.randn(words, hidden) * hidden**-0.5).to(DTYPES[dense])
    targets = torch.randint(0, words, (tokens,))

    def forward_and_backward() -> None:
        scores = chunked_logprob.ChunkedLogProbFunction.apply(
            rows, weight, None, targets, 1.0, HEAD_VOCABULARY, None, 1.0, OUTPUTS
        )
        scores[0].sum().backward()

    return head_units(tokens, hidden, words), forward_and_backward
