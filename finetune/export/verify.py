"""Proof that an export is the tuned model: another program loads it, and their logits are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.errors import FinetuneError, writing
from finetune.export.judges import JUDGE_OF, LLAMA, asked, stock_model, transformers_logits, why_not
from finetune.export.prompts import Prompts, find_prompts
from finetune.export.subject import Subject, find_subject
from finetune.manifest import MANIFEST, read_manifest
from finetune.model import inspect_checkpoint, load_base
from finetune.model.lora import load_adapter
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from finetune.export.judges import Logits

# Two programs that compute the same in float32 differ by less; an error of one weight shows above it.
FLOAT32_LIMIT = 1e-4
NEW_TOKENS = 16


@dataclass(frozen=True)
class Verdict:
    """How far the judge's logits are from the tuned model's, on `tokens` positions.

    What is allowed of a merge is what bf16 costs the judge on the untuned base: at the typical (median)
    position, as rounding may send a token to another expert, which moves its logits by any amount. `effect`
    is the mean distance of the tuned model from its base (None without an adapter); `greedy_equal` of
    `greedy` next tokens are the same.
    """

    format: str
    judge: str
    prompts: str
    tokens: int
    max_difference: float
    max_allowed: float | None
    typical_difference: float
    typical_allowed: float
    mean_difference: float
    effect: float | None
    greedy: int
    greedy_equal: int
    passed: bool
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(where: str | Path, *, against: str | None = None, data: Path | None = None) -> Verdict:
    """Compare the export in `where` with the model it was made from, and add the figures to its record.

    Args:
        against: the run, adapter or model it was made from; found by itself for an export inside its run, of
            a run in ./runs, and of a model without an adapter.
        data: rows to ask about; unless given, the run's held-out conversations, or random tokens.

    Raises:
        FinetuneError: no export, changed files, another source, or no judge can be asked.
    """
    folder = Path(where)
    manifest = read_manifest(folder)
    export_format = manifest["format"]
    if export_format not in JUDGE_OF:
        raise FinetuneError(f"there is no judge for the format {export_format!r}", at=str(folder))
    subject = _source(folder, manifest, against)
    judge = JUDGE_OF[export_format]
    info = inspect_checkpoint(subject.base.path)
    if reason := why_not(judge, 4 * info.weights):
        raise FinetuneError(f"{judge} is the judge of {export_format}, and cannot be asked: {reason}")
    prompts = find_prompts(subject, data)
    # llama.cpp knows YaRN only with its correction range rounded.
    ours = _reference(subject, rounded_yarn=judge == LLAMA)
    sequences = [_continue(ours, ids) for ids in prompts.ids]
    expected = [transformers_logits(ours)(ids) for ids in sequences]
    effect = _effect(ours, sequences, expected)
    del ours
    merged = subject.tuned is not None and export_format == "bf16"
    limit = _noise(subject, sequences) if merged else None
    with asked(export_format, folder, subject.base, subject) as logits:
        found = [logits(ids) for ids in sequences]
    verdict = _judge(export_format, prompts, sequences, expected, found, limit, effect)
    manifest["proof"]["verified"] = verdict.to_dict()
    with writing(folder):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return verdict


def _source(folder: Path, manifest: dict[str, Any], against: str | None) -> Subject:
    """The model that the export was made from."""
    source, base = manifest.get("source"), manifest["base"]
    if against is None:
        against = _guess(folder, source, base["name"])
    subject = find_subject(against, None)
    if subject.fingerprint != base["fingerprint"]:
        raise FinetuneError(f"this export was made from another base than that of {against}", at=str(folder))
    recorded = source["adapter_sha256"] if source else None
    given = subject.facts().get("source") or {}
    if subject.tuned is None and recorded:
        raise FinetuneError(f"this export has an adapter in it, and {against} has none", at=str(folder))
    if given.get("adapter_sha256") != recorded:
        raise FinetuneError(f"this export has another adapter in it than {against}", at=str(folder))
    return subject


def _guess(folder: Path, source: dict[str, Any] | None, base: str) -> str:
    if source is None:
        return base
    if run := source.get("run"):
        around = [path for path in folder.resolve().parents if path.name == run]
        for path in (*around, Path("runs") / run):
            if RunDir.is_run(path):
                return str(path)
    raise FinetuneError(
        "the run or adapter that this was made from is not here; name it with --against", at=str(folder)
    )


def _reference(subject: Subject, *, rounded_yarn: bool) -> Any:
    """Our model in float32."""
    model: Any = load_base(subject.base.path, dtype=torch.float32)
    if rounded_yarn:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

        model.config.rope_parameters["truncate"] = True
        model.model.rotary_emb = GptOssRotaryEmbedding(config=model.config).to(model.device)
    if subject.tuned:
        model = load_adapter(model, subject.tuned.folder, base=subject.base.path)
    return model.eval()


def _continue(model: Any, ids: list[int]) -> list[int]:
    """The prompt and what the model says next, greedily."""
    given = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return [int(token) for token in out[0]]


def _effect(model: Any, sequences: list[list[int]], tuned: list[Tensor]) -> float | None:
    """How far the adapter moves the logits."""
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return Distance.between(_logits_of(transformers_logits(model), sequences), tuned).mean


@dataclass(frozen=True)
class Distance:
    """Between two programs' logits; `typical` is the median over positions of a position's mean."""

    largest: float
    mean: float
    typical: float

    @classmethod
    def between(cls, some: list[Tensor], others: list[Tensor]) -> Distance:
        apart = torch.cat([(one - other).abs() for one, other in zip(some, others, strict=True)])
        return cls(float(apart.max()), float(apart.mean()), float(apart.mean(-1).median()))


def _noise(subject: Subject, sequences: list[list[int]]) -> Distance:
    """What bf16 costs the judge on the untuned base: a merge, rounded to it, may cost as much and no more."""
    exact = _logits_of(transformers_logits(load_base(subject.base.path, dtype=torch.float32)), sequences)
    rough = _logits_of(transformers_logits(stock_model(subject.base.path, torch.bfloat16)), sequences)
    return Distance.between(exact, rough)


def _logits_of(logits: Logits, sequences: list[list[int]]) -> list[Tensor]:
    return [logits(ids) for ids in sequences]


def _judge(
    export_format: str,
    prompts: Prompts,
    sequences: Sequence[Sequence[int]],
    expected: list[Tensor],
    found: list[Tensor],
    noise: Distance | None,
    effect: float | None,
) -> Verdict:
    """A next token may differ only where the tuned model itself is undecided within what is allowed.

    `noise` is given for a merge, whose mean distance must also be under half the adapter's effect.
    """
    allowed = noise.typical if noise else FLOAT32_LIMIT
    undecided = 2 * (noise.largest if noise else FLOAT32_LIMIT)
    distance = Distance.between(expected, found)
    equal = total = decided = 0
    for before, ours, theirs in zip(prompts.ids, expected, found, strict=True):
        answered = slice(len(before) - 1, len(ours) - 1)
        best = ours[answered].topk(2).values
        same = ours[answered].argmax(-1) == theirs[answered].argmax(-1)
        equal, total = equal + int(same.sum()), total + len(same)
        decided += int((~same & (best[:, 0] - best[:, 1] > undecided)).sum())
    # Comparisons that a NaN fails.
    near = distance.mean <= (effect or 0) / 2 if noise else distance.largest <= FLOAT32_LIMIT
    note = None
    if JUDGE_OF[export_format] == LLAMA:
        note = (
            "llama.cpp knows no YaRN with truncate: false; the tuned model was set to truncate: true for this"
        )
    return Verdict(
        format=export_format,
        judge=JUDGE_OF[export_format],
        prompts=prompts.what,
        tokens=sum(len(ids) for ids in sequences),
        max_difference=distance.largest,
        max_allowed=None if noise else FLOAT32_LIMIT,
        typical_difference=distance.typical,
        typical_allowed=allowed,
        mean_difference=distance.mean,
        effect=effect,
        greedy=total,
        greedy_equal=equal,
        passed=near and distance.typical <= allowed and not decided,
        note=note,
    )
