"""What an export costs on held-out tokens: KL to the tuned model, and the share of the gain that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.packing import NOT_LEARNED
from finetune.export.layerwise import Network, Passage
from finetune.export.streams import Version

# Logits of so many tokens at once: 206 MB a version with the 201,088 words of gpt-oss.
TOKENS_AT_ONCE = 256


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
    rows = {name: network.final_norm(torch.cat(list(s))[learned]) for name, s in states.items()}
    targets = targets[learned]
    totals = dict.fromkeys(("base", "tuned", "export", "kl_export", "kl_base", "same_word"), 0.0)
    for first in range(0, len(targets), TOKENS_AT_ONCE):
        chunk = slice(first, first + TOKENS_AT_ONCE)
        logs = {name: _log_probabilities(network, r[chunk]) for name, r in rows.items()}
        for name, log in logs.items():
            totals[name] += float(F.nll_loss(log, targets[chunk], reduction="sum"))
        for name in ("export", "base"):
            totals[f"kl_{name}"] += float(
                F.kl_div(logs[name], logs["tuned"], log_target=True, reduction="sum")
            )
        totals["same_word"] += float((logs["export"].argmax(-1) == logs["tuned"].argmax(-1)).sum())
    mean = {name: total / len(targets) for name, total in totals.items()}
    gain = mean["base"] - mean["tuned"]
    return {
        "tokens": len(targets),
        "loss": {name: mean[name] for name in ("base", "tuned", "export")},
        "kl_to_tuned": mean["kl_export"],
        "kl_of_base_to_tuned": mean["kl_base"],
        "same_greedy_word": mean["same_word"],
        "gain_kept": (mean["base"] - mean["export"]) / gain if gain > 0 else None,
        "change_kept": 1 - mean["kl_export"] / mean["kl_base"] if mean["kl_base"] > 0 else None,
    }


def _log_probabilities(network: Network, rows: Tensor) -> Tensor:
    """`rows [n, H]` -> `[n, vocabulary]`."""
    return torch.cat([rows @ part.mT for part in network.head()], dim=-1).log_softmax(-1)
