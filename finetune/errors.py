"""The one exception a user's mistake raises, and the sentence that any other one becomes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FinetuneError(Exception):
    """A mistake that the user can mend, said in one sentence; the command line prints it and exits with 1.

    `at` names the place that is wrong, as `file:line` or a path.
    """

    def __init__(self, sentence: str, *, at: str | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.at = at

    def __str__(self) -> str:
        return f"{self.at}: {self.sentence}" if self.at else self.sentence


def sentence_of(error: Exception) -> str:
    """What to tell the user: a mistake in its own words, anything else by its first line and what to try."""
    if isinstance(error, FinetuneError):
        return str(error)
    reason = (str(error) or "no reason given").splitlines()[0]
    # torch has an exception of its own on a GPU, and says so in the text of a RuntimeError on the CPU.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate" in reason
    ):
        return (
            f"there is not enough memory ({reason}); a smaller train.tokens_per_pass, data.max_tokens, "
            "lora.rank or eval.batch_size needs less"
        )
    return f"unexpected {type(error).__name__}: {reason}; run again with --debug to see where"


@contextmanager
def writing(where: str | Path) -> Iterator[None]:
    """Say in one sentence why a file or folder could not be written.

    Raises:
        FinetuneError: the disk is full, or writing is not allowed.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FinetuneError(
                "no space is left on this disk; free some and run again", at=str(where)
            ) from error
        raise FinetuneError(f"this cannot be written: {error.strerror or error}", at=str(where)) from error
