"""The loss that is trained on and the one that is measured."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.model import add_lora, load_model
from finetune.recipe import Recipe, load_recipe
from finetune.rundir import RunDir
from finetune.train.settings import StepPlan, training_arguments
from finetune.train.trainer import PackTrainer
from tests.train_helpers import write_project

# Few learned tokens in one pack, many in the other: a mean of means would differ from the mean.
PACKS = (((20, 18), (30, 29)), ((40, 3), (9, 2)), ((25, 20),))


class Packs:
    """Packs of random tokens; a document has a length, and tokens at its start that are not learned."""

    def __init__(self, packs: tuple[tuple[tuple[int, int], ...], ...]) -> None:
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(index)
        positions = [torch.arange(length) for length, _ in self.packs[index]]
        ids = [torch.randint(0, 256, (length,), generator=random) for length, _ in self.packs[index]]
        labels = [row.clone() for row in ids]
        for row, (_, ignored) in zip(labels, self.packs[index], strict=True):
            row[:ignored] = -100
        rows = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Recipe, RunDir]]:
    folder = tmp_path_factory.mktemp("project")
    recipe = load_recipe(write_project(folder), ["train.epochs=1", "train.max_steps=null"])
    yield recipe, RunDir.create(recipe, folder / "runs")


def trainer(project: tuple[Recipe, RunDir], passes: int, **settings: Any) -> PackTrainer:
    recipe, run = project
    model, tokenizer = load_model(recipe.model.base, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    adapted = add_lora(model, rank=4, alpha=8, targets=["attention", "experts"])
    arguments = training_arguments(
        recipe, run.path, StepPlan(512, passes, 1, 512), held_out=True, going_on=True
    )
    for name, value in settings.items():
        setattr(arguments, name, value)
    packs = Packs(PACKS)
    return PackTrainer(
        recipe=recipe,
        model=adapted,
        arguments=arguments,
        tokenizer=tokenizer,
        packs=packs,
        held_out=packs,
        run=run,
        save_adapter=lambda folder: None,
    )


def expected_loss(model: nn.Module) -> Tensor:
    """Plain cross entropy over all learned tokens of all packs."""
    total, count = torch.zeros(()), 0
    for index in range(len(PACKS)):
        batch = {name: value[None] for name, value in Packs(PACKS)[index].items()}
        targets = batch.pop("labels")[0, 1:]
        logits = model(**batch, use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    return total / count


def test_a_steps_gradient_is_that_of_the_mean_over_all_learned_tokens_of_its_passes(
    project: tuple[Recipe, RunDir],
) -> None:
    ours = trainer(project, passes=3)
    ours.optimizer = torch.optim.SGD([p for p in ours.model.parameters() if p.requires_grad], lr=0.0)
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any, **__: Any) -> None:
        for name, parameter in ours.model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                gradients[name] = parameter.grad.clone()

    ours.args.max_grad_norm = 0.0
    ours.optimizer.register_step_pre_hook(keep)
    ours.train()
    logged = [row["loss"] for row in ours.state.log_history if "loss" in row]
    ours.model.zero_grad()
    loss = expected_loss(ours.model)
    loss.backward()
    assert logged == [pytest.approx(loss.item(), rel=1e-6)]
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-5 * parameter.grad.norm(), name


def test_tokens_are_counted_without_padding(project: tuple[Recipe, RunDir]) -> None:
    ours = trainer(project, passes=3)
    lengths: list[int] = []
    ours.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ours.train()
    assert ours.state.num_input_tokens_seen == sum(length for pack in PACKS for length, _ in pack) == 124
    assert set(lengths) == {32, 64}


def test_held_out_loss_is_the_mean_over_all_learned_tokens(project: tuple[Recipe, RunDir]) -> None:
    ours = trainer(project, passes=1)
    measured = ours.evaluate()["eval_loss"]
    ours.model.eval()
    with torch.no_grad():
        assert measured == pytest.approx(expected_loss(ours.model).item(), rel=1e-6)


def test_the_output_head_sees_learned_positions_only(
    project: tuple[Recipe, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(project, passes=1)
    rows: list[int] = []
    function = trl.trainer.utils._ChunkedLogProbFunction

    def apply(hidden: Tensor, *rest: Any) -> Any:
        rows.append(len(hidden))
        return function.apply(hidden, *rest)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=apply))
    ours.evaluate()
    assert sorted(rows) == sorted(sum(length - ignored for length, ignored in pack) for pack in PACKS)


def test_the_adapter_is_float32_over_a_bf16_base(project: tuple[Recipe, RunDir]) -> None:
    model, _ = load_model(project[0].model.base, dtype=torch.bfloat16, device="cpu")
    adapted = add_lora(model, rank=4, alpha=8, targets=["attention", "experts"])
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    frozen = {p.dtype for p in adapted.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16, torch.uint8}
