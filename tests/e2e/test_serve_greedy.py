"""What is served is what `finetune generate` says: token for token, alone and in a full batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.chat import Conversation, HarmonyEncoder, Message
from finetune.evaluate.generation import generate
from finetune.export import export
from finetune.model import load_model
from finetune.serve.limits import Limits
from finetune.serve.load import load
from finetune.serve.sampling import Sampling
from finetune.serve.scheduler import PREFILL_TOKENS, Event, Sequence
from finetune.serve.service import Service
from finetune.serve.subject import find_subject
from tests.checkpoints import NANO
from tests.export_kit import write_adapter

NEW_TOKENS = 24
QUESTIONS = [f"What is {number} plus 86?" for number in range(100, 128)] + [
    "Who are you?",
    "Write kelo in capitals.",
    # Longer than nano's window of 32, and than a step's share of a prompt.
    "What is 3 times 499? " * 4,
    "Reverse the word kelo. " * 40,
]


def answer_all(service: Service, asked: list[tuple[str | None, list[int]]]) -> list[list[int]]:
    """Greedy answers of the engine to (adapter, prompt), all submitted at once."""
    engine, left = service.engine, threading.Semaphore(0)
    answers: list[list[int]] = [[] for _ in asked]

    def hear(answer: list[int], event: Event) -> None:
        assert event.problem is None and event.token is not None
        answer.append(event.token)
        if event.ending:
            left.release()

    sampling = Sampling(NEW_TOKENS, temperature=0, stop_ids=service.encoder.stop_ids)
    for answer, (adapter, prompt) in zip(answers, asked, strict=True):
        engine.submit(Sequence(prompt, adapter, sampling, lambda event, answer=answer: hear(answer, event)))  # type: ignore[misc]
    for _ in asked:
        assert left.acquire(timeout=120)
    assert engine.running == engine.waiting == 0 and engine.cache_use == 0
    return answers


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (NANO / "config.json").is_file():
        pytest.skip("the bundled model is not there")
    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    return write_adapter(folder, NANO, targets=["attention", "experts", "router"], size=0.3)


@pytest.fixture(scope="module")
def merged(adapter: Path) -> Path:
    export(adapter, "bf16", adapter.parent / "merged")
    return adapter.parent / "merged"


@pytest.fixture(scope="module")
def packed(adapter: Path) -> Path:
    export(adapter, "mxfp4", adapter.parent / "packed")
    return adapter.parent / "packed"


@pytest.fixture(scope="module")
def encoder() -> HarmonyEncoder:
    return HarmonyEncoder.from_dir(NANO)


@pytest.fixture(scope="module")
def prompts(encoder: HarmonyEncoder) -> list[list[int]]:
    made = [encoder.prompt_ids(Conversation((Message("user", text),))) for text in QUESTIONS]
    assert max(map(len, made)) > PREFILL_TOKENS
    return made


def generated(
    where: Path, encoder: HarmonyEncoder, prompts: list[list[int]], **options: Any
) -> list[list[int]]:
    model: Any = load_model(where, dtype=torch.float32, device="cpu", **options)[0]
    # The long prompts by themselves: beside them the others would be mostly padding.
    short, long = prompts[:-2], prompts[-2:]
    return [
        answer
        for batch in (short, *([prompt] for prompt in long))
        for answer in generate(model, encoder, batch, max_new_tokens=NEW_TOKENS)
    ]


def test_base_and_adapter_in_one_batch_say_what_generate_says(
    adapter: Path, encoder: HarmonyEncoder, prompts: list[list[int]]
) -> None:
    base, tuned = generated(NANO, encoder, prompts), generated(adapter, encoder, prompts)
    assert sum(a != b for a, b in zip(base, tuned, strict=True)) > len(prompts) / 2
    service = load(find_subject(str(adapter), {}), dtype="float32", limits=Limits(batch=32, queue=1000))
    service.engine.start()
    both = [(name, prompt) for prompt in prompts for name in (None, "tuned")]
    answers = answer_all(service, both)
    assert answers[0::2] == base and answers[1::2] == tuned
    for name, expected in ((None, base), ("tuned", tuned)):
        for place in (0, -1):
            assert answer_all(service, [(name, prompts[place])]) == [expected[place]]
    service.engine.stop()


@pytest.mark.parametrize("kind", ["merged", "packed"])
def test_an_export_says_what_generate_says_alone_and_among_thirty_two(
    kind: str, request: pytest.FixtureRequest, encoder: HarmonyEncoder, prompts: list[list[int]]
) -> None:
    where: Path = request.getfixturevalue(kind)
    expected = generated(where, encoder, prompts)
    service = load(find_subject(str(where), {}), dtype="float32", limits=Limits(batch=32, queue=1000))
    service.engine.start()
    assert len(prompts) == 32 and answer_all(service, [(None, prompt) for prompt in prompts]) == expected
    for prompt, answer in zip(prompts, expected, strict=True):
        assert answer_all(service, [(None, prompt)]) == [answer]
    service.engine.stop()


def test_a_merged_model_says_what_generate_says_though_the_cache_is_short(
    merged: Path, encoder: HarmonyEncoder, prompts: list[list[int]]
) -> None:
    expected = generated(merged, encoder, prompts)
    # Room for 32 pages: sequences have to give theirs up and start over.
    service = load(find_subject(str(merged), {}), dtype="float32", limits=Limits(32, 1000, cache_gb=0.0031))
    assert service.subject.names == ["merged"]
    assert 32 <= service.engine.runner.cache.size.pages < 64
    service.engine.start()
    assert answer_all(service, [(None, prompt) for prompt in prompts]) == expected
    service.engine.stop()
