"""From a run directory to one HTML file that says what was trained, how it went and what came of it."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import writing
from finetune.report.gather import Facts, gather
from finetune.rundir import RunDir

__all__ = ["Facts", "gather", "render", "write_report"]

FILE = "report.html"


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return its path: `out`, or report.html in the run.

    Raises:
        FinetuneError: there is no run, one of its files cannot be read, or `out` cannot be written.
    """
    opened = RunDir.open(run)
    text = render(gather(opened))
    path = Path(out) if out is not None else opened.path / FILE
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return path


def render(facts: Facts) -> str:
    """The page: whole in itself, with no script and no address of anything elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from finetune.report import words

    environment = Environment(
        loader=PackageLoader("finetune.report", "."),
        # Answers of models and names of files are text, whatever they spell.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= words.FILTERS
    return environment.get_template("template.html").render(facts=facts)
