from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.chat import HarmonyEncoder
from finetune.data import PackedDataset, prepare_data
from finetune.evaluate.generation import generate, generate_streaming
from finetune.evaluate.loss import held_out_loss
from finetune.model import add_lora, load_base
from finetune.model.attention import dense_attention
from finetune.recipe import Recipe
from tests.checkpoints import write_random_checkpoint

PROMPTS = [list(range(40, 40 + length)) for length in (3, 17, 9, 30, 1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base"), tokenizer="bytes", experts=5, layers=3)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load_base(base, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def encoder(base: Path) -> HarmonyEncoder:
    return HarmonyEncoder.from_dir(base)


def test_a_batch_is_answered_as_each_prompt_alone_and_in_order(model: Any, encoder: HarmonyEncoder) -> None:
    together = generate(model, encoder, PROMPTS, max_new_tokens=12, batch_size=3)
    alone = [generate(model, encoder, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone


def test_greedy_answers_equal_the_argmax_without_a_cache(model: Any, encoder: HarmonyEncoder) -> None:
    ids = list(PROMPTS[1])
    answer = generate(model, encoder, [ids], max_new_tokens=20)[0]
    for token in answer:
        with torch.no_grad():
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)


def test_a_cache_that_grows_in_steps_holds_what_was_there(
    model: Any, encoder: HarmonyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, encoder, PROMPTS, max_new_tokens=12)
    for room in (0, 1, 5):
        monkeypatch.setattr("finetune.model.cache.ROOM", room)
        assert generate(model, encoder, PROMPTS, max_new_tokens=12) == expected


def test_prompts_are_read_by_blocks_and_never_by_dense_masks(
    model: Any, encoder: HarmonyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, encoder, PROMPTS, max_new_tokens=4)
    queries: set[int] = set()

    def dense(query: Tensor, *rest: Any) -> Tensor:
        queries.add(query.shape[2])
        return dense_attention(query, *rest)

    monkeypatch.setattr("finetune.model.attention.dense_attention", dense)
    assert generate(model, encoder, PROMPTS, max_new_tokens=4) == expected
    assert queries == {1}


def test_an_answer_ends_with_its_stop_token(
    model: Any, encoder: HarmonyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = generate(model, encoder, PROMPTS, max_new_tokens=12)
    fourth = free[1][3]
    monkeypatch.setattr(encoder, "stop_ids", (*encoder.stop_ids, fourth))
    stopped = generate(model, encoder, PROMPTS, max_new_tokens=12)
    expected = [answer[: answer.index(fourth) + 1] if fourth in answer else answer for answer in free]
    assert stopped == expected
    assert len(stopped[1]) <= 4


def test_a_seed_gives_the_same_sample_and_another_seed_another(model: Any, encoder: HarmonyEncoder) -> None:
    def sample(seed: int) -> list[list[int]]:
        return generate(model, encoder, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)

    state = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.random.get_rng_state(), state), (
        "the program's own random numbers go on undisturbed"
    )


def test_a_tiny_top_p_is_greedy(model: Any, encoder: HarmonyEncoder) -> None:
    sampled = generate(model, encoder, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-6)
    assert sampled == generate(model, encoder, PROMPTS, max_new_tokens=8)


def test_streaming_gives_the_same_tokens_one_by_one(model: Any, encoder: HarmonyEncoder) -> None:
    seen: list[int] = []
    answer = generate_streaming(model, encoder, PROMPTS[1], on_token=seen.append, max_new_tokens=12)
    assert seen == answer == generate(model, encoder, [PROMPTS[1]], max_new_tokens=12)[0]


def test_the_training_mode_is_put_back(model: Any, encoder: HarmonyEncoder) -> None:
    model.train()
    generate(model, encoder, PROMPTS[:1], max_new_tokens=2)
    assert model.training
    model.eval()


def test_the_held_out_loss_is_the_mean_over_learned_tokens(
    base: Path, encoder: HarmonyEncoder, tmp_path: Path
) -> None:
    rows = "".join(f'{{"question": "{i}+1?", "answer": "{i + 1}"}}\n' for i in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    source = {"path": str(tmp_path / "rows.jsonl")}
    data = {"train": [source], "held_out": [source], "max_tokens": 400}
    recipe = Recipe.model_validate({"name": "t", "model": {"base": str(base)}, "data": data})
    examples = prepare_data(recipe, encoder, cache_dir=tmp_path / "cache").held_out
    adapted = add_lora(
        load_base(base, dtype=torch.float32, device="cpu"), rank=4, alpha=8, targets=["attention", "experts"]
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)

    def expected(model: Any) -> float:
        losses = []
        for example in examples:
            ids = torch.tensor(example.ids).long()
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1]
            learned = torch.tensor(example.learn)[1:].bool()
            losses.append(F.cross_entropy(logits[learned], ids[1:][learned], reduction="none"))
        return torch.cat(losses).mean().item()

    packs = PackedDataset(examples, 1000, seed=0)
    assert 1 < len(packs) < len(examples), "several packs, of several examples"
    done: list[int] = []
    assert held_out_loss(adapted, packs, done.append) == pytest.approx(expected(adapted), abs=2e-6)
    assert sum(done) == len(packs)
    with adapted.disable_adapter():
        base_loss = held_out_loss(adapted, packs)
        assert base_loss == pytest.approx(expected(adapted), abs=2e-6)
    assert abs(base_loss - held_out_loss(adapted, packs)) > 1e-3
