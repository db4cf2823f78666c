"""Answers that have to be JSON: a grammar decides which tokens may come next in the final message.

The grammar is llguidance's (github.com/guidance-ai/llguidance). Thinking stays free; once the header of the
final message is written, every token is one that the grammar allows, and the message can end only where the
JSON is whole.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from finetune.chat import HarmonyEncoder
from finetune.errors import FinetuneError
from finetune.serve.harmony import Position

# Any JSON object.
OBJECT: dict[str, Any] = {"type": "object"}
# Between two parts of the JSON: a space, or a new line and its indentation. Without a bound, a model that is
# not sure of itself writes white space until it runs out of tokens.
WHITE_SPACE = r"[ ]|\n[ ]{0,32}"


class Grammars:
    """The vocabulary as llguidance wants it, made once for a tokenizer."""

    def __init__(self, encoder: HarmonyEncoder, vocabulary: int) -> None:
        """`vocabulary`: how many logits the model gives, which may be more than the tokenizer has tokens."""
        self.encoder = encoder
        self.vocabulary = vocabulary
        text = encoder.tokenizer.to_str()
        self._tokens = LLTokenizer(text, n_vocab=vocabulary, eos_token=encoder.return_id)

    def compile(self, schema: dict[str, Any]) -> str:
        """The grammar of a JSON schema.

        Raises:
            FinetuneError: the schema is wrong, or asks for something that cannot be enforced.
        """
        try:
            grammar = str(
                LLMatcher.grammar_from_json_schema(
                    json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE}
                )
            )
            problem = LLMatcher.validate_grammar(grammar, self._tokens)
        except (ValueError, RecursionError) as error:
            problem = str(error) or type(error).__name__
        if problem:
            raise FinetuneError(f"this JSON schema cannot be enforced: {problem.strip().splitlines()[0]}")
        return grammar

    def constraint(self, grammar: str, *, may_call: bool) -> JsonFinal:
        """A new answer's constraint; `may_call`: it may also end with a call of a tool."""
        return JsonFinal(self, LLMatcher(self._tokens, grammar), may_call)


class JsonFinal:
    """What may come next in one answer."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher, may_call: bool) -> None:
        encoder = grammars.encoder
        self._encoder = encoder
        self._matcher = matcher
        self._position = Position(encoder)
        # The turn cannot end before there is a final message.
        self._closing = [encoder.return_id, encoder.pad_id, *([] if may_call else [encoder.call_id])]
        self._outside = torch.ones(grammars.vocabulary, dtype=torch.bool)
        self._outside[self._closing] = False
        self._bits = allocate_token_bitmask(1, grammars.vocabulary)

    @property
    def _in_final(self) -> bool:
        return self._position.channel == "final" and not self._position.addressed

    def allowed(self) -> Tensor:
        """`[V]` bool."""
        if not self._in_final:
            return self._outside
        fill_next_token_bitmask(self._matcher, self._bits, 0)
        spread = self._bits.view(-1, 1) >> torch.arange(32, dtype=torch.int32) & 1
        mask: Tensor = spread.flatten()[: len(self._outside)].bool()
        return mask

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        if self._in_final:
            self._matcher.consume_token(token)
        self._position.feed(token)
