"""What a recipe asks of a machine at a time: the size of a pass, and what is computed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.recipe import Recipe


@dataclass(frozen=True)
class Workload:
    """One pass of `tokens` tokens on one process, `passes` of them a step.

    `document`: the length of the document that a token stands in, averaged over tokens; `learned`: the share
    of tokens that the output head is asked for; `varied`: packs are not alike. `dense`: dtype of the dense
    weights and the computation; `keep_attention`: layers that do not attend again in backward. On GPUs: `nf4`
    attention, experts `from_host`, and what is kept for backward `offloaded`.
    """

    tokens: int
    passes: int
    rank: int
    targets: list[str]
    dense: str
    checkpointing: bool
    optimizer: str
    document: float
    learned: float = 1.0
    varied: bool = False
    nf4: bool = False
    from_host: bool = False
    offloaded: bool = False
    keep_attention: int = 0

    @classmethod
    def of(
        cls, recipe: Recipe, lengths: Sequence[int] = (), learned: float = 1.0, processes: int = 1
    ) -> Workload:
        """That of a recipe; `lengths` of examples in tokens, or none: examples of data.max_tokens."""
        tokens = recipe.tokens_per_pass
        document = sum(n * n for n in lengths) / sum(lengths) if lengths else recipe.data.max_tokens
        train = recipe.train
        return cls(
            tokens=tokens,
            passes=max(1, round(train.tokens_per_step / (tokens * processes))),
            rank=recipe.lora.rank,
            targets=list(recipe.lora.targets),
            dense=recipe.model.computes_in,
            checkpointing=train.gradient_checkpointing,
            optimizer=train.optimizer,
            document=min(document, tokens),
            learned=learned,
            varied=len(set(lengths)) > 1,
            nf4=recipe.model.dense == "nf4",
            from_host=recipe.model.experts_on == "host",
            offloaded=train.offload_activations,
            keep_attention=train.keep_attention,
        )

    @property
    def bytes(self) -> int:
        """Bytes of a value in the computation."""
        return 4 if self.dense == "float32" else 2
