"""What is left of an adapter in each export: nano learns stock codes, and every export answers held-out ones.

    python -m tests.measure.merge_retention [--seeds 5] [--sizes small middle large] [--steps 150]
                                            [--adapters DIR] [--jobs 1] [--record]

Learning rates give deltas of several sizes: rounding to nearest keeps little of a small one, and nearly
all of a large one. Of the loss on held-out questions `kept` is the share of the tuned model's gain over the
base; `kl` is to the tuned model, in nats a learned token; `right` is the share of answers that are exactly
right, decoded greedily. A delta that vanishes in rounding counts as the base. Adapters in DIR are kept there,
and those that are there already are not trained again. The GGUF is read back by `finetune import`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.chat import HarmonyEncoder
from finetune.chat.parse import parse_completion
from finetune.data import PackedDataset, prepare_data, read_conversations
from finetune.errors import FinetuneError
from finetune.evaluate.generation import generate
from finetune.export import export
from finetune.export.importing import import_model
from finetune.model import add_lora, load_adapter, load_base, resolve, save_adapter
from finetune.recipe import DataSpec, ModelSpec, Recipe, Source
from tests.measure.conditions import record

DATA = Path(__file__).resolve().parents[2] / "recipes" / "nano" / "data"
TRAIN, HELD_OUT = DATA / "stock-codes.jsonl", DATA / "stock-codes-held-out.jsonl"
LEARNING_RATES = {"small": 5e-5, "middle": 2e-4, "large": 1e-3}
RANK, TOKENS_PER_STEP, WARM_UP_STEPS = 8, 2048, 20
NEVER_TOO_LITTLE = float("-inf")


@dataclass(frozen=True)
class Setting:
    base: Path
    encoder: HarmonyEncoder
    recipe: Recipe
    cache: Path

    @classmethod
    def make(cls, cache: Path) -> Setting:
        base = resolve("nano").base
        data = DataSpec(train=[Source(path=str(TRAIN))], held_out=[Source(path=str(HELD_OUT))])
        recipe = Recipe(name="retention", model=ModelSpec(base="nano"), data=data)
        return cls(base, HarmonyEncoder.from_dir(base), recipe, cache)


def tune(setting: Setting, learning_rate: float, steps: int, seed: int, out: Path) -> None:
    """A short training in float32; writes the adapter."""
    torch.manual_seed(seed)
    model = add_lora(
        load_base(setting.base, dtype=torch.float32),
        rank=RANK,
        alpha=2 * RANK,
        targets=["attention", "experts"],
    )
    examples = prepare_data(setting.recipe, setting.encoder, cache_dir=setting.cache).train
    packs = PackedDataset(examples, TOKENS_PER_STEP, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    for step in range(steps):
        rate = learning_rate * min(1, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        batch = {name: t.unsqueeze(0).to(model.device) for name, t in packs[step % len(packs)].items()}
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, out, base=setting.base, where="nano")


@dataclass(frozen=True)
class Answers:
    """`log [n, vocabulary]` and `targets [n]` of the learned held-out tokens; `right` over the questions."""

    log: Tensor
    targets: Tensor
    right: float

    @property
    def loss(self) -> float:
        return float(F.nll_loss(self.log, self.targets))


def answers(setting: Setting, model: Any) -> Answers:
    examples = prepare_data(setting.recipe, setting.encoder, cache_dir=setting.cache).held_out
    packs = PackedDataset(examples, TOKENS_PER_STEP)
    logs, targets = [], []
    with torch.no_grad():
        for pack in (packs[index] for index in range(len(packs))):
            labels = pack.pop("labels")[1:]
            batch = {name: t.unsqueeze(0).to(model.device) for name, t in pack.items()}
            learned = labels != -100
            logs.append(model(**batch, use_cache=False).logits[0, :-1].cpu()[learned].log_softmax(-1))
            targets.append(labels[learned])
    return Answers(torch.cat(logs), torch.cat(targets), share_right(setting, model))


def share_right(setting: Setting, model: Any) -> float:
    source = Source(path=str(HELD_OUT))
    asked = read_conversations(source, DataSpec(train=[source]))
    prompts = [setting.encoder.prompt_ids(replace(one, messages=one.messages[:-1])) for one in asked]
    found = generate(model, setting.encoder, prompts, max_new_tokens=96, batch_size=64)
    pairs = zip(found, asked, strict=True)
    right = sum(
        parse_completion(setting.encoder, ids).content == one.messages[-1].content for ids, one in pairs
    )
    return right / len(asked)


def compare(found: Answers, base: Answers, tuned: Answers) -> dict[str, float]:
    kl = F.kl_div(found.log, tuned.log, log_target=True, reduction="batchmean")
    kept = (base.loss - found.loss) / (base.loss - tuned.loss)
    return {"kept": kept, "kl": float(kl), "right": found.right}


def exported(setting: Setting, adapter: Path, to: str, out: Path, calibrate: Path | None) -> Any:
    """The model that an export holds; None where nothing of the adapter is left by rounding."""
    try:
        export(adapter, to, out, calibrate=calibrate, kept_at_least=NEVER_TOO_LITTLE)
    except FinetuneError as error:
        print(adapter.name, to, error, file=sys.stderr)
        return None
    if to == "gguf":
        import_model(out, out / "back")
        out = out / "back"
    return load_base(out, dtype=torch.float32)


def one_seed(setting: Setting, size: str, steps: int, seed: int, adapters: Path) -> dict[str, Any]:
    """Figures of the base and of every export."""
    torch.set_num_threads(1)
    adapter = adapters / f"{size}-{seed}"
    if not adapter.is_dir():
        tune(setting, LEARNING_RATES[size], steps, seed, adapter)
    model = load_base(setting.base, dtype=torch.float32)
    base = answers(setting, model)
    tuned = answers(setting, load_adapter(model, adapter, base=setting.base))
    figures: dict[str, Any] = {"loss of base": base.loss, "loss tuned": tuned.loss}
    figures |= {"base": compare(base, base, tuned), "adapter": compare(tuned, base, tuned)}
    with tempfile.TemporaryDirectory() as folder:
        for name, to, calibrate in (
            ("bf16", "bf16", None), ("mxfp4 nearest", "mxfp4", None),
            ("mxfp4", "mxfp4", TRAIN), ("gguf", "gguf", TRAIN),
        ):  # fmt: skip
            found = exported(setting, adapter, to, Path(folder) / name, calibrate)
            figures[name] = compare(answers(setting, found), base, tuned) if found else figures["base"]
    print(size, seed, json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def measure(
    sizes: list[str], seeds: int, steps: int, jobs: int, cache: Path, adapters: Path
) -> dict[str, Any]:
    """All sizes: every seed's figures, and means over the seeds."""
    setting = Setting.make(cache)
    figures: dict[str, Any] = {"rank": RANK, "steps": steps, "learning_rates": LEARNING_RATES}
    # Prepared once, so that processes beside each other find it.
    prepare_data(setting.recipe, setting.encoder, cache_dir=cache)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {
            size: [pool.submit(one_seed, setting, size, steps, seed, adapters) for seed in range(seeds)]
            for size in sizes
        }
        for size, running in tasks.items():
            found = [task.result() for task in running]
            figures[size] = {"mean": means(found), "seeds": found}
    return figures


def means(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of every version's figures, over the seeds."""
    versions = [name for name, value in found[0].items() if isinstance(value, dict)]
    return {
        name: {figure: statistics.mean(f[name][figure] for f in found) for figure in ("kept", "kl", "right")}
        for name in versions
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--adapters", type=Path, help="where trained adapters are kept")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of a thread each")
    parser.add_argument("--record", action="store_true", help="keep the figures under runs/reference/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = options.adapters or Path(folder)
        adapters.mkdir(parents=True, exist_ok=True)
        figures = measure(
            options.sizes, options.seeds, options.steps, options.jobs, Path(folder) / "cache", adapters
        )
    print(json.dumps({size: figures[size]["mean"] for size in options.sizes}, indent=2))
    if options.record:
        command = f"python -m tests.measure.merge_retention --seeds {options.seeds} --steps {options.steps}"
        record("merge_retention", command, figures)


if __name__ == "__main__":
    main()
