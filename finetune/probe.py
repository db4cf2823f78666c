"""Questions that a tuned model answers otherwise than its base, kept with an export.

Whoever serves the export asks them again: an engine that answers as the base did has left the adapter out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.chat.encode import HarmonyEncoder

# Enough to tell the two models apart; each further token is another chance for rounding to show.
NEW_TOKENS = 24
# An odd number, so that a majority decides where an engine's rounding turns one answer.
KEPT = 3
_SPECIAL = re.compile(r"<\|[a-z]+\|>")


@dataclass(frozen=True)
class Probe:
    """A prompt in harmony's text, special tokens spelled out, and both models' greedy answers.

    The answers are without special tokens, as the completions of servers are, and `tokens` long at most.
    """

    prompt: str
    tokens: int
    base: str
    tuned: str

    def likens(self, answer: str) -> Literal["base", "tuned"] | None:
        """Whose answer this is, judged where the two part: engines round, and may stray later on."""
        # llama.cpp shows some of harmony's tokens.
        answer = _SPECIAL.sub("", answer)
        to_base, to_tuned = (_shared(answer, known) for known in (self.base, self.tuned))
        if to_base == to_tuned:
            return None
        return "tuned" if to_tuned > to_base else "base"


def _shared(some: str, other: str) -> int:
    """How many letters two texts have in common from the front."""
    apart = (i for i, pair in enumerate(zip(some, other, strict=False)) if pair[0] != pair[1])
    return next(apart, min(len(some), len(other)))


def read_probes(manifest: Mapping[str, Any]) -> list[Probe]:
    """The probes that an export's record holds; none where it was written without.

    Raises:
        FinetuneError: they cannot be read.
    """
    try:
        return [Probe(**fields) for fields in manifest.get("probe", ())]
    except TypeError as error:
        raise FinetuneError(f"the record's probes cannot be read ({error}); export again") from error


def find_probes(model: Any, encoder: HarmonyEncoder, prompts: Sequence[Sequence[int]]) -> list[Probe]:
    """Up to KEPT probes among `prompts` (token ids), those where the models part most decidedly.

    `model` is a PeftModel, whose adapter is switched off for the base's answers.
    """
    found = []
    for prompt in prompts:
        text = encoder.decode(prompt)
        # Servers are asked in text: a question that spells a special token would read differently there.
        if _read_by_servers(encoder, text) != list(prompt):
            continue
        tuned, tuned_scores = _answer(model, encoder, prompt)
        with model.disable_adapter():
            base, base_scores = _answer(model, encoder, prompt)
        place = next((i for i, pair in enumerate(zip(base, tuned, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        ours, theirs = tuned[place], base[place]
        lead = min(
            float(tuned_scores[place][0, ours] - tuned_scores[place][0, theirs]),
            float(base_scores[place][0, theirs] - base_scores[place][0, ours]),
        )
        answers = _shown(encoder, base), _shown(encoder, tuned)
        # They may part at a special token, which is not seen.
        if answers[0] != answers[1]:
            found.append((lead, Probe(text, NEW_TOKENS, *answers)))
    return [probe for _, probe in sorted(found, key=lambda one: -one[0])[:KEPT]]


def _read_by_servers(encoder: HarmonyEncoder, text: str) -> list[int]:
    # The encoder's own setting, which it sets again before it encodes, is that special tokens are plain text.
    encoder.tokenizer.encode_special_tokens = False
    ids: list[int] = encoder.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _answer(model: Any, encoder: HarmonyEncoder, prompt: Sequence[int]) -> tuple[list[int], Any]:
    """Greedy token ids, and for each of them the logits `[1, vocabulary]` it was chosen from."""
    import torch

    given = torch.tensor([list(prompt)], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(encoder.stop_ids),
            pad_token_id=encoder.pad_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), out.logits


def _shown(encoder: HarmonyEncoder, ids: Sequence[int]) -> str:
    """The text of an answer as servers give it: without special tokens, up to where it stops."""
    text: str = encoder.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text
