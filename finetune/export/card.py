"""The model card: what the adapter is, how it was made, what was measured, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

if TYPE_CHECKING:
    from finetune.export.subject import Subject
    from finetune.rundir import RunDir

# The values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def model_card(
    subject: Subject,
    use: str | None = None,
    *,
    whole: bool = False,
    proof: Mapping[str, Any] | None = None,
) -> str:
    """README.md with the metadata that the Hugging Face hub reads.

    `use` says how to load it, unless it is in PEFT's layout; `whole` whether this is a model, not an adapter;
    `proof` what rounding cost, where there was any.
    """
    run, base = subject.run, subject.base.name
    shown = str(_without_folders(base))
    title = run.recipe().name if run else (shown if whole else "adapter")
    parts = [_metadata(base, lora=not whole), f"# {title}\n", _what(subject, shown, whole=whole)]
    if run:
        parts += [_data(run), _measured(run), _recipe(run)]
    parts.append(_rounded(proof or {}))
    parts.append(f"## Use\n\n{use}" if use else _use(subject, shown, title))
    return "\n".join(part for part in parts if part)


def _metadata(base: str, *, lora: bool) -> str:
    # A path on this machine is no use to others, and the hub rejects what is not an id.
    named = f"base_model: {base}\n" if _is_hub_id(base) else ""
    kind, tags = ("library_name: peft\n", "lora, ") if lora else ("", "")
    return f"---\nlicense: apache-2.0\n{kind}{named}tags: [{tags}gpt-oss, finetune]\n---\n"


def _is_hub_id(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()


def _what(subject: Subject, base: str, *, whole: bool) -> str:
    mark = subject.fingerprint
    if subject.tuned is None:
        return f"The weights of `{base}` (fingerprint `{mark}`) in another layout.\n"
    adapter = subject.tuned.adapter
    config = adapter.config
    names = sorted([*(config.get("target_modules") or []), *(config.get("target_parameters") or [])])
    targets = ", ".join(f"`{name}`" for name in names)
    kind = "rank-stabilised LoRA" if config.get("use_rslora") else "LoRA"
    start = f"`{base}` with a {kind} adapter merged in" if whole else f"A {kind} adapter for `{base}`"
    return (
        f"{start} (fingerprint of the base `{mark}`), rank {adapter.rank}, "
        f"alpha {config['lora_alpha']}, on {targets}.\n"
    )


def _data(run: RunDir) -> str:
    data = run.info().get("data")
    if not isinstance(data, dict):
        return ""
    facts = [f"{key} {data[key]}" for key in ("rows", "tokens") if key in data]
    return f"Trained on data with the fingerprint `{data.get('fingerprint')}` ({', '.join(facts)}).\n"


def _measured(run: RunDir) -> str:
    file = run.eval_dir / "summary.json"
    if not file.is_file():
        return ""
    summary = json.loads(file.read_text(encoding="utf-8"))
    lines = ["## Measured\n", "| | n | base | tuned |", "| --- | --- | --- | --- |"]
    loss = summary["held_out_loss"]
    if loss["base"] is not None:
        lines.append(f"| held-out loss | | {loss['base']:.4f} | {loss['tuned']:.4f} |")
    for name, task in summary["tasks"].items():
        base, tuned = _score(task["base"]), _score(task["tuned"])
        lines.append(f"| {name} ({task['metric']}) | {task['n']} | {base} | {tuned} |")
    return "\n".join([*lines, "", "Scores with 95% intervals.\n"])


def _rounded(proof: Mapping[str, Any]) -> str:
    """What merging into MXFP4 cost."""
    merge = proof.get("merged", proof)
    if "rounding" not in merge:
        return ""
    kept, lines = merge.get("kept"), [f"## Merged into MXFP4\n\nThe experts are rounded {merge['rounding']}."]
    if kept:
        shares = [
            f"{kept[f'{name}_kept']:.1%} of the adapter's {name}"
            for name in ("gain", "change")
            if kept[f"{name}_kept"] is not None
        ]
        lines.append(
            f"On {kept['tokens']} held-out tokens that keeps {' and '.join(shares)}, with a KL divergence of "
            f"{kept['kl_to_tuned']:.2g} nats from the unrounded model."
        )
    else:
        lines.append("What that costs has not been measured.")
    return "\n".join([*lines, ""])


def _score(score: dict[str, float] | None) -> str:
    return f"{score['value']:.1%} ({score['low']:.1%} to {score['high']:.1%})" if score else "-"


def _recipe(run: RunDir) -> str:
    """The recipe with the folders of this machine left out of its paths."""
    text = StringIO()
    YAML(typ="rt", pure=True).dump(
        _without_folders(run.recipe().model_dump(mode="json", exclude_defaults=True)), text
    )
    return f"## Recipe\n\n```yaml\n{text.getvalue()}```\n"


def _without_folders(value: Any) -> Any:
    """Absolute paths cut down to their last part."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _use(subject: Subject, base: str, title: str) -> str:
    largest = subject.tuned.adapter.largest_rank if subject.tuned else 1
    rank = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    vllm = f"vLLM takes no LoRA of a rank over {VLLM_RANKS[-1]}, and this one has {largest}."
    if rank:
        vllm = f"```\nvllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {title}=.\n```"
    return f"""## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, ".")
```

{vllm}
"""
