"""Proof that an export is the tuned model: another program loads it, and their logits are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.chat import HarmonyEncoder
from finetune.data.packing import NOT_LEARNED
from finetune.errors import FinetuneError, writing
from finetune.export.distance import Distance
from finetune.export.judges import (
    JUDGE_OF,
    LLAMA,
    asked,
    llama_as_it_is,
    stock_model,
    transformers_logits,
    why_not,
)
from finetune.export.kept import (
    Q8_0_SHARE_LIMIT,
    SHARE_LIMIT,
    Kept,
    Row,
    measure_kept,
    rows_of,
    rows_of_sequences,
)
from finetune.export.passages import find_passages
from finetune.export.prompts import Prompts, find_prompts
from finetune.export.reading import read_back
from finetune.export.subject import Subject, find_subject
from finetune.export.verdict import Answers, Verdict, judge_answers
from finetune.manifest import MANIFEST, read_manifest
from finetune.model import inspect_checkpoint, load_base
from finetune.model.lora import load_adapter
from finetune.probe import Probe, find_probes
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from finetune.export.judges import Logits

# Of 32 normal values Q8_0 is off by 0.5% of a typical one (root mean square), bf16 by 0.17%.
Q8_0_OVER_BF16 = 3
NEW_TOKENS = 16
# Each is answered twice more, by the tuned model and by its base.
PROBED = 4


def verify(where: str | Path, *, against: str | None = None, data: Path | None = None) -> Verdict:
    """Compare the export in `where` with the model it was made from, and add the figures to its record.

    The record also gets probes, by which those who serve the export see whether the adapter is in effect.

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
    rounded = how_rounded(manifest)
    prompts = find_prompts(subject, data)
    # llama.cpp knows YaRN only with its correction range rounded.
    ours = _reference(subject, rounded_yarn=judge == LLAMA)
    sequences = [_continue(ours, ids) for ids in prompts.ids]
    expected = _logits_of(transformers_logits(ours), sequences)
    effect = _effect(ours, sequences, expected)
    read = _read_back(export_format, folder, sequences) if rounded in ("mxfp4", "q8_0") else None
    allowance = _allowance(subject, sequences, rounded) if rounded in ("bf16", "q8_0") else None
    rows, stated = _held_out(subject, manifest, sequences, data) if rounded == "mxfp4" else ([], None)
    longest = max(map(len, [*sequences, *(row.ids.tolist() for row in rows)]))
    as_it_is: list[Tensor] | None = None
    with asked(export_format, folder, subject, longest) as logits:
        found = _logits_of(logits, sequences)
        allowed = Q8_0_SHARE_LIMIT if manifest["proof"].get("dense") == "q8_0" else SHARE_LIMIT
        kept = _kept(ours, rows, logits, stated, allowed) if rows else None
        if export_format == "gguf":
            as_it_is = _logits_of(llama_as_it_is(folder, longest), sequences)
    answers = Answers(prompts, sequences, expected, found, read, as_it_is)
    verdict = judge_answers(export_format, answers, allowance, effect, kept)
    manifest["proof"]["verified"] = verdict.to_dict()
    if probes := _probes(ours, subject, prompts):
        manifest["probe"] = [asdict(probe) for probe in probes]
    with writing(folder):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return verdict


def can_verify(export_format: str, base: Path, up_to: int) -> bool:
    """Whether the judge of a format can be asked, of a model with no more than `up_to` bytes in float32."""
    size = 4 * inspect_checkpoint(base).weights
    return size <= up_to and why_not(JUDGE_OF[export_format], size) is None


def how_rounded(manifest: Mapping[str, Any]) -> str | None:
    """The coarsest numbers that values were rounded to: mxfp4, bf16 or q8_0; None where none was."""
    proof, own = manifest["proof"], manifest["format"]
    into = proof.get("merged", {}).get("into")
    if into is None and manifest["source"] and own in ("mxfp4", "bf16"):
        into = own
    return into or ("q8_0" if proof.get("dense") == "q8_0" else None)


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


def _probes(model: Any, subject: Subject, prompts: Prompts) -> list[Probe]:
    """What to ask whoever serves the export; none of a model without an adapter."""
    if not subject.tuned or not (subject.base.path / "tokenizer.json").is_file():
        return []
    return find_probes(model, HarmonyEncoder.from_dir(subject.base.path), prompts.ids[:PROBED])


def _allowance(subject: Subject, sequences: list[list[int]], rounded: str) -> Distance:
    """What bf16 costs the judge on the untuned base: what is rounded to it may cost as much and no more."""
    exact = _logits_of(transformers_logits(load_base(subject.base.path, dtype=torch.float32)), sequences)
    rough = _logits_of(transformers_logits(stock_model(subject.base.path, torch.bfloat16)), sequences)
    return Distance.between(exact, rough).times(Q8_0_OVER_BF16 if rounded == "q8_0" else 1)


def _logits_of(logits: Logits, sequences: list[list[int]]) -> list[Tensor]:
    return [logits(ids) for ids in sequences]


def _read_back(export_format: str, folder: Path, sequences: list[list[int]]) -> list[Tensor]:
    with read_back(export_format, folder) as itself:
        model = _reference(itself, rounded_yarn=JUDGE_OF[export_format] == LLAMA)
    return _logits_of(transformers_logits(model), sequences)


def _held_out(
    subject: Subject, manifest: dict[str, Any], sequences: list[list[int]], data: Path | None
) -> tuple[list[Row], dict[str, Any] | None]:
    """Rows to measure on what a merge keeps, and the figures that the export states of the same rows.

    Without held-out conversations they are the sequences, and nothing is stated of those.
    """
    passages = find_passages(subject, data)
    if passages is None:
        return list(rows_of_sequences(sequences)), None
    proof = manifest["proof"].get("merged", manifest["proof"])
    rows = list(rows_of(passages.held_out))
    learned = sum(int((row.targets != NOT_LEARNED).sum()) for row in rows)
    stated = proof.get("kept")
    same = stated and proof["conversations"] == passages.what and stated["tokens"] == learned
    return rows, stated if same else None


def _kept(model: Any, rows: list[Row], judge: Logits, stated: dict[str, Any] | None, allowed: float) -> Kept:
    tuned = transformers_logits(model)

    def base(ids: Sequence[int]) -> Tensor:
        with model.disable_adapter():
            return tuned(ids)

    return measure_kept(rows, base, tuned, judge, stated, allowed=allowed)
