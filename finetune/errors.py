"""The one exception a user's mistake raises."""

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
