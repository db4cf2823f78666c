"""Answers of a given form: a grammar of the whole turn decides which tokens may come next.

The grammar is llguidance's (github.com/guidance-ai/llguidance), over harmony's messages: thinking if the
model likes, a preamble if it likes, and then what was asked for, a final message in JSON or a call of a tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from finetune.chat import HarmonyEncoder
from finetune.errors import FinetuneError

Schema = Mapping[str, Any]
# Any JSON object.
OBJECT: Schema = {"type": "object"}
# Between two parts of the JSON: a space, or a new line and its indentation. Without a bound, a model that is
# not sure of itself writes white space until it runs out of tokens.
WHITE_SPACE = r"[ ]|\n[ ]{0,32}"


@dataclass(frozen=True)
class Form:
    """What a turn has to end in.

    `final` is the schema of the final message, None for free text; `calls` are the functions that may be
    called instead, with the schema of their arguments; with `must_call` only a call will do.
    """

    final: Schema | None
    calls: Mapping[str, Schema]
    must_call: bool = False

    def grammar(self) -> str:
        """In llguidance's dialect of Lark."""
        endings = [f"call_{number}" for number in range(len(self.calls))]
        if not self.must_call:
            endings.append("final")
        final = "TEXT" if self.final is None else _json(self.final)
        rules = [
            f"start: analysis? preamble? ({' | '.join(endings)})",
            'analysis: <|channel|> "analysis" <|message|> TEXT <|end|> <|start|> "assistant"',
            'preamble: <|channel|> "commentary" <|message|> TEXT <|end|> <|start|> "assistant"',
            f'final: <|channel|> "final" (" "? <|constrain|> "json")? <|message|> {final}',
            r"TEXT: /(.|\n)*/",
        ]
        for number, (name, schema) in enumerate(self.calls.items()):
            # The recipient stands before the channel or after it.
            to = json.dumps(f" to=functions.{name}"), json.dumps(f"commentary to=functions.{name}")
            header = f'({to[0]} <|channel|> "commentary" | <|channel|> {to[1]})'
            rules.append(
                f'call_{number}: {header} (" "? <|constrain|> "json")? <|message|> {_json(schema)} <|call|>'
            )
        return "\n".join(rules)


def _json(schema: Schema) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


class Grammars:
    """The vocabulary as llguidance wants it, made once for a tokenizer."""

    def __init__(self, encoder: HarmonyEncoder, vocabulary: int) -> None:
        """`vocabulary`: how many logits the model gives, which may be more than the tokenizer has tokens."""
        self.vocabulary = vocabulary
        text = encoder.tokenizer.to_str()
        self._tokens = LLTokenizer(text, n_vocab=vocabulary, eos_token=encoder.return_id)

    def compile(self, form: Form) -> str:
        """The grammar of a form.

        Raises:
            FinetuneError: a schema is wrong, or asks for something that cannot be enforced.
        """
        try:
            grammar = form.grammar()
            problem = LLMatcher.validate_grammar(grammar, self._tokens)
        except (ValueError, RecursionError) as error:
            problem = str(error) or type(error).__name__
        if problem:
            why = problem.strip().splitlines()[0].rpartition("compile JSON schema: ")[2]
            raise FinetuneError(f"this JSON schema cannot be enforced: {why}")
        return grammar

    def constraint(self, grammar: str) -> Constraint:
        """A new answer's constraint."""
        return Constraint(LLMatcher(self._tokens, grammar), self.vocabulary)


class Constraint:
    """What may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)

    def allowed(self) -> Tensor:
        """`[V]` bool."""
        fill_next_token_bitmask(self._matcher, self._bits, 0)
        spread = self._bits.view(-1, 1) >> torch.arange(32, dtype=torch.int32) & 1
        mask: Tensor = spread.flatten()[: self._vocabulary].bool()
        return mask

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)
