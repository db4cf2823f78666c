"""What an export costs on held-out tokens: KL to the tuned model, and the share of the gain that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.data.packing import NOT_LEARNED
from finetune.export.layerwise import Network, Passage
from finetune.export.streams import Version
from finetune.export.words import Words, logits_by_part, score_words

COMPARED: tuple[Version, ...] = ("export", "base")


def measure(
    network: Network, passages: Sequence[Passage], states: Mapping[Version, Sequence[Tensor]]
) -> dict[str, Any]:
    """Compare the versions `base`, `tuned` and `export` by their last layers' outputs, `[L, H]` a passage.

    All figures are means over the learned tokens, in nats. `gain_kept` is the share of the tuned model's gain
    in loss over the base; it is None where the tuned model gains nothing. `change_kept` is 1 minus
    KL(tuned, export) over KL(tuned, base).
    """
    targets = torch.cat([p.targets for p in passages])
    learned = targets != NOT_LEARNED
    rows = {name: torch.cat(list(state))[learned] for name, state in states.items()}
    words = {name: score_words(network, state, targets[learned]) for name, state in rows.items()}
    kl = _divergences(network, rows, words)
    loss = {name: float(words[name].losses.mean()) for name in ("base", "tuned", "export")}
    gain = loss["base"] - loss["tuned"]
    return {
        "tokens": len(words["tuned"].losses),
        "loss": loss,
        "kl_to_tuned": kl["export"],
        "kl_of_base_to_tuned": kl["base"],
        "same_greedy_word": float((words["export"].best == words["tuned"].best).float().mean()),
        "gain_kept": (loss["base"] - loss["export"]) / gain if gain > 0 else None,
        "change_kept": 1 - kl["export"] / kl["base"] if kl["base"] > 0 else None,
    }


def _divergences(
    network: Network, rows: Mapping[Version, Tensor], words: Mapping[Version, Words]
) -> dict[Version, float]:
    """Mean KL(tuned, other) of the two others."""
    found: dict[Version, float] = dict.fromkeys(COMPARED, 0.0)
    names: tuple[Version, ...] = ("tuned", *COMPARED)
    for part in logits_by_part(network, *(rows[name] for name in names)):
        logs = {
            name: logits.sub_(words[name].total[part.tokens].unsqueeze(1))
            for name, logits in zip(names, part.logits, strict=True)
        }
        share = logs["tuned"].exp()
        for name in COMPARED:
            apart = logs[name].sub_(logs["tuned"]).mul_(share)
            found[name] -= float(apart.sum(dtype=torch.float64))
    return {name: total / len(rows["tuned"]) for name, total in found.items()}
