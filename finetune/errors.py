"""The one exception a user's mistake raises."""


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
