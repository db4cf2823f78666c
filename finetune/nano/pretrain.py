"""Make nano from its recipe: `python -m finetune.nano.pretrain recipes/nano/pretrain.yaml`.

Writes the tokenizer, trains, writes the model in the release's layout and measures it on held-out questions,
all in the recipe's `out`. A run that was stopped goes on from its checkpoint when it is started again.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from finetune.chat.conversation import read_conversation
from finetune.chat.encode import HarmonyEncoder
from finetune.chat.render import render_examples
from finetune.errors import FinetuneError
from finetune.model import load_model
from finetune.nano.batches import IGNORED, batches
from finetune.nano.measure import accuracy
from finetune.nano.network import build, round_experts
from finetune.nano.skills import training_row
from finetune.nano.spec import PretrainSpec, TrainingSpec, load_spec
from finetune.nano.tokenizer import Text, write_tokenizer
from finetune.nano.write import network_config, write_configs, write_weights

# The optimiser's state is told apart from the weights in a checkpoint by this.
MOMENT = "moment."
CHECKPOINT = "checkpoint.safetensors"
REPORT_EVERY_STEPS = 20


def tokenizer_texts(spec: PretrainSpec) -> list[Text]:
    """What the tokenizer is made from: the texts of `tokenizer.rows` training conversations."""
    r = Random(f"tokenizer {spec.seed}")
    rows = [read_conversation(training_row(r, spec.families)) for _ in range(spec.tokenizer.rows)]
    examples = [example for row in rows for example in render_examples(row)]
    return [Text(s.text, s.learned) for example in examples for s in example if not s.special]


def learning_rate(training: TrainingSpec, step: int) -> float:
    """Warm up, hold, then fall in a straight line to zero over the last `decay` of the steps."""
    left = (training.steps - step) / max(1, training.decay * training.steps)
    return training.learning_rate * min(1, (step + 1) / max(1, training.warmup_steps), left)


def loss(
    model: GptOssForCausalLM, ids: Tensor, labels: Tensor, router_aux_loss: float
) -> tuple[Tensor, Tensor]:
    """Mean loss of the learned tokens, and with the router's balance added: what is minimised."""
    out = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
    # The head is applied only where something is learned: it is a fifth of the network.
    wanted = labels[:, 1:] != IGNORED
    said = cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][wanted]), labels[:, 1:][wanted])
    config = model.config
    balance = load_balancing_loss_func(
        out.router_logits, config.num_local_experts, config.num_experts_per_tok
    )
    return said, said + router_aux_loss * balance


def save(model: GptOssForCausalLM, optimizer: torch.optim.AdamW, step: int, path: Path) -> None:
    """Weights and AdamW's moments in one safetensors file, replaced in one go."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{MOMENT}{moment}.{name}"] = optimizer.state[parameter][moment]
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata={"step": str(step)})
    fresh.replace(path)


def resume(model: GptOssForCausalLM, optimizer: torch.optim.AdamW, path: Path) -> int:
    """Load what `save` wrote, if it is there; the number of steps already done."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(MOMENT)})
    for name, parameter in model.named_parameters():
        moments = {m: tensors[f"{MOMENT}{m}.{name}"] for m in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def report(out: Path, line: dict[str, float]) -> None:
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def train(spec: PretrainSpec, model: GptOssForCausalLM, encoder: HarmonyEncoder, out: Path) -> None:
    """All steps from the last checkpoint on; metrics.jsonl gets a line every twenty."""
    training = spec.training
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=training.weight_decay, fused=True
    )
    done = resume(model, optimizer, out / CHECKPOINT)
    stream = batches(encoder, spec.families, training.tokens_per_step, spec.seed)
    started, tokens, losses = time.monotonic(), 0, []
    for step, (ids, labels) in enumerate(islice(stream, training.steps)):
        if step < done:
            continue
        round_experts(model, step >= (1 - training.rounded) * training.steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        said, minimised = loss(model, ids, labels, training.router_aux_loss)
        minimised.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        losses.append(said.item())
        if (step + 1) % REPORT_EVERY_STEPS == 0:
            speed = round(tokens / (time.monotonic() - started))
            mean = round(sum(losses) / len(losses), 4)
            report(out, {"step": step + 1, "loss": mean, "tokens_per_second": speed})
            losses = []
        if (step + 1) % training.save_every_steps == 0 or step + 1 == training.steps:
            save(model, optimizer, step + 1, out / CHECKPOINT)


def pretrain(spec: PretrainSpec, folder: Path) -> None:
    """Tokenizer, training, files, and figures measured on the files; `folder` is the recipe's."""
    out = Path(spec.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(spec.training.threads)
    common = (folder / spec.tokenizer.common).read_text(encoding="utf-8").split()
    write_tokenizer(tokenizer_texts(spec), common, out)
    write_configs(spec.network, out)
    encoder = HarmonyEncoder.from_dir(out)
    model = build(GptOssConfig.from_dict(network_config(spec.network)), spec.seed, spec.network.initial_std)
    train(spec, model, encoder, out)
    write_weights(model.state_dict(), out)
    written, _ = load_model(out, dtype=torch.float32)
    figures = accuracy(written, encoder, count=spec.measure.questions, seed=spec.seed)
    (out / "measured.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for family, by_effort in figures.items():
        print(f"{family:14}" + "".join(f"{effort:>8} {share:6.1%}" for effort, share in by_effort.items()))


if __name__ == "__main__":
    try:
        pretrain(load_spec(Path(sys.argv[1])), Path(sys.argv[1]).parent)
    except FinetuneError as error:
        sys.exit(str(error))
