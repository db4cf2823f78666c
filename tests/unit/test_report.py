"""The report of a run: whole in itself, honest about what got worse, and safe to open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from finetune.cli import app
from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.report import gather, write_report
from finetune.report.chart import MOST_POINTS, draw_series
from finetune.rundir import RunDir

EVIL = "</p><script>alert(1)</script><img src=//elsewhere.example/x>"


def answer(right: bool, content: str, **more: Any) -> dict[str, Any]:
    return {"right": right, "thinking": "", "content": content, "tool_calls": [], "ended": "return", **more}


def row(question: str, base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    return {"question": question, "reference": "r", "base": base, "tuned": tuned}


ROWS = [
    *(row(f"won {n}", answer(False, "no"), answer(True, "yes", thinking="because")) for n in range(6)),
    row("lost it", answer(True, "had it"), answer(False, EVIL)),
    row("never", answer(False, ""), answer(False, "", ended=None)),
    row("always", answer(True, "both"), answer(True, "both")),
]


def new_run(folder: Path) -> RunDir:
    data = {"train": [{"path": "rows.jsonl"}]}
    recipe = Recipe.model_validate({"name": "mine", "model": {"base": "nano"}, "data": data})
    return RunDir.create(recipe, folder / "runs")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return new_run(tmp_path)


def finish(run: RunDir) -> None:
    run.update(status="done", base={"where": "nano", "fingerprint": "abc"}, seconds={"training": 200.4})
    steps = [{"step": n, "loss": 3.0 / n, "learning_rate": 1e-3, "reward": n % 3} for n in range(1, 30)]
    lines = [{"step": 0, "eval_loss": 4.5}, *steps, {"step": 29, "eval_loss": 0.25}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    task = {"metric": "exact_match", "n": 9, "base": score, "tuned": score, "empty": 1, "truncated": 1}
    run.eval_dir.mkdir()
    summary = {"held_out_loss": {"base": 4.5, "tuned": 0.25}, "tasks": {"codes": task}}
    (run.eval_dir / "summary.json").write_text(json.dumps(summary))
    (run.eval_dir / "codes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    export = run.path / "export" / "bf16"
    export.mkdir(parents=True)
    verdict = {
        "passed": True,
        "judge": "transformers",
        "greedy": 128,
        "greedy_equal": 127,
        "max_difference": 0.5,
    }
    record = {"format": "bf16", "proof": {"tensors": 48, "verified": verdict}}
    (export / "finetune_export.json").write_text(json.dumps(record))


def test_it_tells_what_was_trained_how_it_went_and_what_came_of_it(run: RunDir) -> None:
    finish(run)
    path = write_report(run.path)
    text = path.read_text()
    assert path == run.path / "report.html"
    for told in (
        "<span>4.5 →</span> 0.25", "40.0% to 60.0%", "3 min 20 s", "127 of 128 greedy tokens",
        "6 won, 1 lost, 1 wrong", "because", "(nothing was said)", "(cut off: no closing token)", "abc",
    ):  # fmt: skip
        assert told in text
    # Some of what was won, all of what was lost; what stayed right shows nothing.
    assert text.count("won ") == 4 and "lost it" in text and "always" not in text
    charts = [chart.name for chart in gather(run).charts]
    # A learning rate that does not change is no curve.
    assert charts == ["loss", "reward"]


def test_nothing_is_run_or_fetched_when_it_is_opened(run: RunDir) -> None:
    finish(run)
    run.update(name=EVIL)
    text = write_report(run.path).read_text()
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(https?:)?//\w", text.replace(EVIL.replace("<", "&lt;").replace(">", "&gt;"), ""))
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_a_run_that_has_just_begun_has_a_report_too(run: RunDir, tmp_path: Path) -> None:
    text = write_report(run.path, tmp_path / "elsewhere" / "r.html").read_text()
    assert "created" in text and "None yet" in text and "<svg" not in text
    assert (tmp_path / "elsewhere").is_dir() and list((tmp_path / "elsewhere").iterdir()) == [
        tmp_path / "elsewhere" / "r.html"
    ]


def test_files_that_cannot_be_read_are_named(run: RunDir) -> None:
    finish(run)
    file = run.eval_dir / "codes.jsonl"
    file.write_text('{"question": "?"}\n')
    with pytest.raises(FinetuneError, match=r"codes\.jsonl:1: not an answer"):
        write_report(run.path)
    (run.eval_dir / "summary.json").write_text("[]")
    with pytest.raises(FinetuneError, match=r"summary\.json: .* mapping"):
        write_report(run.path)
    assert not (run.path / "report.html").exists()


def test_the_command_says_where_it_wrote_and_gives_figures_to_machines(run: RunDir) -> None:
    finish(run)
    runner = CliRunner()
    assert runner.invoke(app, ["report", str(run.path)]).stdout == f"wrote {run.path / 'report.html'}\n"
    found = json.loads(runner.invoke(app, ["report", str(run.path), "--json"]).stdout)
    assert found["held_out_loss"] == {"base": 4.5, "tuned": 0.25} and found["tasks"]["codes"]["lost"] == 1
    assert found["exports"][0]["proof"]["verified"]["passed"]
    missing = runner.invoke(app, ["report", "nowhere"])
    assert missing.exit_code == 1 and "there is no such run" in missing.output


@given(
    st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=2, max_size=700, unique=True),
    st.integers(1, 10**6),
)
def test_every_line_stays_inside_its_chart(values: list[float], stride: int) -> None:
    chart = draw_series("any", {"a": [(float(i * stride), y) for i, y in enumerate(values)]})
    assert chart is not None
    numbers = [float(word) for word in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?", chart.lines[0].path)]
    across, up = numbers[::2], numbers[1::2]
    assert len(across) <= MOST_POINTS
    assert min(across) >= chart.left and max(across) <= chart.width
    assert min(up) >= 0 and max(up) <= chart.height - chart.below + 0.1
    assert 2 <= len(chart.up) <= 12 and len({tick.at for tick in chart.up}) == len(chart.up)


def test_a_loss_that_falls_far_is_drawn_over_powers_of_ten() -> None:
    points = [(float(n), 8.0 / 10 ** (n / 4)) for n in range(20)]
    chart = draw_series("loss", {"a": points})
    assert chart and chart.logarithmic and "0.01" in [tick.text for tick in chart.up]
    assert draw_series("rate", {"a": [(0.0, 1.0), (1.0, 1.0)]}) is None
    assert draw_series("rate", {"a": [(0.0, 1.0)]}) is None
