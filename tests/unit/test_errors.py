"""What is told of an exception."""

from __future__ import annotations

import pytest

from finetune.errors import FinetuneError, sentence_of


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FinetuneError("it is wrong", at="rows.jsonl:3"), "rows.jsonl:3: it is wrong"),
        (KeyError("x"), "unexpected KeyError: 'x'; run again with --debug to see where"),
        (ValueError("one\ntwo"), "unexpected ValueError: one; run again with --debug to see where"),
        (MemoryError(), "there is not enough memory (no reason given); a smaller "),
        (OutOfMemoryError("CUDA out of memory.\nmore"), "there is not enough memory (CUDA out of memory.)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory (Default"),
    ],
)
def test_every_exception_has_one_sentence(error: Exception, sentence: str) -> None:
    said = sentence_of(error)
    assert said.startswith(sentence) and "\n" not in said
