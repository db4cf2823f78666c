"""What an evaluation found, as eval/summary.json holds it and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.evaluate.intervals import wilson

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """A share of right answers."""

    right: int
    n: int

    def to_dict(self) -> dict[str, float]:
        low, high = wilson(self.right, self.n)
        return {"value": self.right / self.n, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = wilson(self.right, self.n)
        return f"{self.right / self.n:6.1%}  ({low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class TaskResult:
    """Base against tuned on one task; `tuned` is None where there is no adapter.

    `empty` answers have neither a final message nor a tool call, `truncated` ones no closing token (some are
    both). They are counted over the tuned model's answers, or the base's where there is no other.
    """

    metric: str
    n: int
    base: Score
    tuned: Score | None
    empty: int
    truncated: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "n": self.n,
            "base": self.base.to_dict(),
            "tuned": self.tuned.to_dict() if self.tuned else None,
            "empty": self.empty,
            "truncated": self.truncated,
        }


@dataclass(frozen=True)
class Summary:
    """The whole evaluation. A loss that was not measured (no held-out rows, no adapter) is None."""

    base_loss: float | None
    tuned_loss: float | None
    tasks: dict[str, TaskResult]

    def to_dict(self) -> dict[str, Any]:
        return {
            "held_out_loss": {"base": self.base_loss, "tuned": self.tuned_loss},
            "tasks": {name: result.to_dict() for name, result in self.tasks.items()},
        }

    def table(self) -> Table:
        from rich.table import Table

        table = Table(caption="scores with 95% intervals")
        for heading in ("", "n", "base", "tuned", "empty", "truncated"):
            table.add_column(heading, justify="left" if heading == "" else "right")
        if self.base_loss is not None:
            tuned = f"{self.tuned_loss:.4f}" if self.tuned_loss is not None else "-"
            table.add_row("held-out loss", "", f"{self.base_loss:.4f}", tuned, "", "")
        for name, result in self.tasks.items():
            counts = (str(result.empty), str(result.truncated))
            label = f"{name} ({result.metric})"
            table.add_row(label, str(result.n), str(result.base), str(result.tuned or "-"), *counts)
        return table
