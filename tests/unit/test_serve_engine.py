"""The engine's parts: pages, plans, draws, and attention from the cache."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssConfig

from finetune.errors import FinetuneError
from finetune.model import load_base
from finetune.serve import attention
from finetune.serve import runner as runner_module
from finetune.serve.adapters import Adapters
from finetune.serve.attention import Span, lay_out
from finetune.serve.cache import PAGE_TOKENS, CacheSize, KeyValueCache, plan_cache
from finetune.serve.runner import Runner, Work
from finetune.serve.sampling import Draws, Sampling, choose, score
from finetune.serve.scheduler import PREFILL_TOKENS, Scheduler, Sequence
from finetune.serve.sizes import padded
from tests.checkpoints import write_random_checkpoint

WINDOW, HEADS, QUERY_HEADS, SIZE = 8, 2, 4, 16


def config() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    return GptOssConfig(
        num_hidden_layers=2, layer_types=kinds, sliding_window=WINDOW, num_key_value_heads=HEADS,
        num_attention_heads=QUERY_HEADS, head_dim=SIZE, hidden_size=64,
    )  # fmt: skip


def by_definition(data: torch.Tensor, sinks: torch.Tensor, window: float) -> torch.Tensor:
    """Causal attention of a sequence, its three kinds of heads in `data [., L, D]`; the last token's row."""
    query, key, value = data.split([QUERY_HEADS, HEADS, HEADS])
    last = key.shape[1] - 1
    out = []
    for head in range(QUERY_HEADS):
        shared = head // (QUERY_HEADS // HEADS)
        first = max(0, last - int(min(window, last + 1)) + 1)
        scores = key[shared, first:] @ query[head, last] / math.sqrt(SIZE)
        p = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]
        out.append(p @ value[shared, first:])
    return torch.stack(out)


BFLOAT16 = torch.empty(0, dtype=torch.bfloat16)


def exactly(count: int, like: torch.Tensor, unit: int = 1) -> int:
    return count


@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=4),
    st.randoms(),
    st.sampled_from([exactly, lambda count, like, unit=1: padded(count, BFLOAT16, unit)]),
)
def test_attention_in_pieces_from_pages_is_attention_over_the_whole(
    pieces: list[list[int]], shuffle: random.Random, size_of: Callable[[int, torch.Tensor], int]
) -> None:
    """Sequences whose tokens come in pieces of any sizes, together in steps, with pages in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "padded", size_of)
        attend_in_pieces(pieces, shuffle, size_of)


def attend_in_pieces(
    pieces: list[list[int]], shuffle: random.Random, size_of: Callable[[int, torch.Tensor], int]
) -> None:
    torch.manual_seed(0)
    size = CacheSize(pages=4 * len(pieces), sequences=len(pieces), bytes=0)
    cache = KeyValueCache(config(), size, torch.float64, torch.device("cpu"))
    free = list(range(size.pages))
    shuffle.shuffle(free)
    pages = [free[4 * i : 4 * i + 4] for i in range(len(pieces))]
    data = [torch.randn(QUERY_HEADS + 2 * HEADS, sum(some), SIZE, dtype=torch.float64) for some in pieces]
    sinks = torch.randn(QUERY_HEADS, dtype=torch.float64)
    for step in range(max(map(len, pieces))):
        members = [i for i, some in enumerate(pieces) if step < len(some)]
        members.sort(key=lambda i: pieces[i][step] > 1)
        spans = [Span(sum(pieces[i][:step]), pieces[i][step], pages[i], i) for i in members]
        flat = torch.cat(
            [data[i][:, s.start : s.start + s.length] for i, s in zip(members, spans, strict=True)], 1
        )
        count = flat.shape[1]
        flat = torch.nn.functional.pad(flat, (0, 0, 0, size_of(count, flat) - count), value=math.nan)
        query, key, value = flat.split([QUERY_HEADS, HEADS, HEADS])
        steps = lay_out(cache, spans, query_heads=QUERY_HEADS)
        for layer, window in ((0, WINDOW), (1, math.inf)):
            out = steps[config().layer_types[layer]].attend(layer, query, key, value, sinks, SIZE**-0.5)
            end = 0
            for i, span in zip(members, spans, strict=True):
                end += span.length
                seen = data[i][:, : span.start + span.length]
                expected = by_definition(seen, sinks, window)
                torch.testing.assert_close(out[end - 1], expected, rtol=1e-10, atol=1e-10)
            assert out[count:].equal(out[count - 1 : count].expand_as(out[count:]))


def test_in_bfloat16_products_have_few_sizes_and_padding_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN keeps a program for every size, so memory would grow with each new length of a prompt."""
    model = load_base(write_random_checkpoint(tmp_path / "base", layers=2), dtype=torch.bfloat16)
    size = CacheSize(pages=64, sequences=8, bytes=0)
    rows = set()
    for module in (*(layer.self_attn.q_proj for layer in model.model.layers), model.lm_head):
        module.register_forward_hook(lambda _, args, out: rows.add(args[0].numel() // args[0].shape[-1]))

    def answers() -> list[torch.Tensor]:
        cache = KeyValueCache(model.config, size, torch.bfloat16, torch.device("cpu"))
        runner = Runner(model, Adapters(model, {}, base=tmp_path / "base"), cache)
        logits = []
        for length in range(1, 40):
            singles = [Work([3], Span(length - 1, 1, [2 * i, 2 * i + 1], i)) for i in range(length % 5)]
            chunk = Work([5 + i % 50 for i in range(length)], Span(0, length, [20, 21], 7))
            logits.append(runner.step(None, [*singles, chunk] if length > 1 else [chunk]))
        return logits

    found = answers()
    assert rows == {padded(count, BFLOAT16) for count in range(1, 44)} and len(rows) < 13
    monkeypatch.setattr(attention, "padded", exactly)
    monkeypatch.setattr(runner_module, "padded", exactly)
    for padded_logits, exact in zip(found, answers(), strict=True):
        torch.testing.assert_close(padded_logits, exact, rtol=0.05, atol=0.05)


def sequence(tokens: int, written: int = 100) -> Sequence:
    return Sequence(list(range(tokens)), None, Sampling(written), lambda event: None)


def run(scheduler: Scheduler, steps: int = 10_000) -> dict[int, int]:
    """Steps until nothing is left, each token chosen at once; how many tokens each sequence got."""
    got: dict[int, int] = {}
    for _ in range(steps):
        plan = scheduler.plan()
        if not plan:
            break
        held = [page for item in scheduler.running for page in item.pages]
        assert len(held) == len(set(held)) == scheduler.pages.used
        lengths = [item.span.length for item in plan]
        assert sum(n for n in lengths if n > 1) <= PREFILL_TOKENS
        assert lengths == sorted(lengths, key=lambda n: n > 1)
        for item in plan:
            item.sequence.computed += item.span.length
            assert len(item.sequence.pages) * PAGE_TOKENS >= item.sequence.computed
            if item.complete:
                item.sequence.ids.append(0)
                got[id(item.sequence)] = item.sequence.written
                if item.sequence.written == item.sequence.sampling.max_tokens:
                    scheduler.finish(item.sequence)
    return got


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=1, max_size=12),
    st.integers(19, 60),
)
def test_every_sequence_is_finished_however_short_the_pages(
    wanted: list[tuple[int, int]], pages: int
) -> None:
    scheduler = Scheduler(CacheSize(pages=pages, sequences=4, bytes=0))
    sequences = [sequence(tokens, written) for tokens, written in wanted]
    for one in sequences:
        scheduler.add(one)
    got = run(scheduler)
    assert [got[id(one)] for one in sequences] == [written for _, written in wanted]
    assert scheduler.pages.used == 0 and not scheduler.running and not scheduler.waiting


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    scheduler = Scheduler(CacheSize(pages=200, sequences=4, bytes=0))
    short, long = sequence(5), sequence(5 * PREFILL_TOKENS)
    scheduler.add(short)
    for item in scheduler.plan():
        item.sequence.computed += item.span.length
    short.ids.append(0)
    scheduler.add(long)
    for _ in range(5):
        first, second = scheduler.plan()
        assert (first.sequence, first.span.length) == (short, 1)
        assert (second.sequence, second.span.length) == (long, PREFILL_TOKENS)
        short.computed += 1
        short.ids.append(0)
        long.computed += PREFILL_TOKENS


def test_a_cache_takes_what_is_free_and_says_when_that_is_too_little() -> None:
    roomy = plan_cache(config(), context=320, sequences=4, free=1e9, itemsize=4)
    assert (roomy.pages, roomy.tokens) == (4 * 320 // PAGE_TOKENS, 4 * 320)
    tight = plan_cache(config(), context=320, sequences=4, free=roomy.bytes / 2, itemsize=4)
    assert 4 <= tight.pages < roomy.pages and tight.bytes <= roomy.bytes / 2
    held = KeyValueCache(config(), tight, torch.float32, torch.device("cpu"))
    assert sum(part.nbytes for part in (*held.keys, *held.values)) == tight.bytes
    with pytest.raises(FinetuneError, match="smaller --batch or a larger --cache-gb"):
        plan_cache(config(), context=320, sequences=4, free=1000, itemsize=4)


def test_draws_follow_the_distribution_and_top_p_cuts_its_tail() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = Draws(Sampling(1, temperature=1.0, seed=0))
    tokens = [choose(p.log().unsqueeze(0), [draws], [None])[0] for _ in range(4000)]
    found = torch.tensor([tokens.count(i) / 4000 for i in range(4)])
    torch.testing.assert_close(found, p, rtol=0, atol=0.03)
    cut = Draws(Sampling(1, temperature=1.0, top_p=0.79, seed=0))
    assert {choose(p.log().unsqueeze(0), [cut], [None])[0] for _ in range(500)} == {0, 1}
    sharp = Draws(Sampling(1, temperature=1.0, top_p=1e-9, seed=0))
    assert {choose(p.log().unsqueeze(0), [sharp], [None])[0] for _ in range(20)} == {0}


def test_penalties_take_from_what_was_written_and_a_bias_adds() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    draws = Draws(Sampling(temperature=0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={2: 0.5}))
    written = []
    for _ in range(5):
        (token,) = choose(logits, [draws], [None])
        draws.wrote(token)
        written.append(token)
    # 2 falls to 1.25 and 0.75, 1 to 0.25, and 0.5 (the bias) to -0.25.
    assert written == [0, 0, 1, 0, 2] and logits.tolist() == [[2.0, 1.0, 0.0]]


def test_a_mask_leaves_only_what_it_allows_and_scores_as_if_there_were_none() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    mask = torch.tensor([False, False, True])
    greedy = Draws(Sampling(1, temperature=0))
    assert choose(logits, [greedy, greedy], [mask, None]) == [2, 0]
    scored = score(logits[0], 2, Sampling(1, top_logprobs=2))
    assert scored is not None and [token for token, _ in scored.top] == [0, 1]
    assert scored.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
