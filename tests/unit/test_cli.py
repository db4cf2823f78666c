"""The command line: what it prints, where it prints it, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune import cli_launch
from finetune.cli import app
from finetune.evaluate.summary import Summary
from finetune.recipe import load_recipe
from finetune.rundir import RunDir
from tests.checkpoints import write_random_checkpoint

COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)  # type: ignore[union-attr]
SMALL = "name: small\nmodel: {base: base}\ndata: {train: [{path: rows.jsonl}]}\n"
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
runner = CliRunner()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    write_random_checkpoint(tmp_path / "base", layers=1, tokenizer="bytes")
    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL)
    return file


def test_help_of_every_command_is_quick_and_imports_nothing_heavy() -> None:
    program = f"""
import sys
from typer.testing import CliRunner
from finetune.cli import app
from finetune.evaluate.summary import Summary
for name in {COMMANDS!r}:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, name
heavy = {{"torch", "transformers", "datasets", "trl", "peft", "accelerate", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    took = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    # The help of all commands together keeps the promise made for each, even on a busy machine.
    assert took < 3


def test_every_command_can_show_a_traceback_and_speaks_json() -> None:
    for name in COMMANDS:
        help_text = runner.invoke(app, [name, "--help"]).output
        assert "--debug" in help_text and "--json" in help_text


def test_a_starter_recipe_can_be_checked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = runner.invoke(app, ["new", "my-first"])
    assert made.exit_code == 0
    assert "next: finetune check my-first/recipe.yaml" in made.output
    assert load_recipe("my-first/recipe.yaml").name == "my-first"
    again = runner.invoke(app, ["new", "my-first"])
    assert again.exit_code == 1
    assert again.stderr == "my-first: this is there already; choose another name\n"
    assert runner.invoke(app, ["new", "no spaces"]).exit_code == 1
    assert "my-first" in runner.invoke(app, ["check", "my-first/recipe.yaml"]).output


def test_a_mistake_is_one_sentence_and_exit_status_1(recipe: Path) -> None:
    result = runner.invoke(app, ["check", str(recipe), "lora.rnak=3"])
    expected = "override lora.rnak=3: lora.rnak: there is no such setting; did you mean 'rank'?\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", expected)


def test_a_mistake_is_also_told_as_json_alone_on_standard_output(recipe: Path) -> None:
    result = runner.invoke(app, ["check", "nowhere.yaml", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"error": "nowhere.yaml: there is no such recipe file"}


def test_debug_shows_the_traceback_of_a_mistake(recipe: Path) -> None:
    command = [sys.executable, "-c", "from finetune.cli import main; main()", "check", "nowhere.yaml"]
    quiet, loud = (
        subprocess.run(words, capture_output=True, text=True) for words in (command, [*command, "--debug"])
    )
    assert quiet.returncode == loud.returncode == 1
    assert "Traceback" not in quiet.stderr and "Traceback" in loud.stderr


def test_what_nobody_foresaw_is_a_sentence_too(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr("finetune.recipe.load_recipe", broken)
    result = runner.invoke(app, ["check", str(recipe)])
    assert result.exit_code == 1
    assert result.stderr == "unexpected RuntimeError: the disk; run again with --debug to see where\n"


def test_wrong_usage_is_exit_status_2() -> None:
    for words in (
        ["nonsense"],
        ["check"],
        ["new"],
        ["doctor", "--colour"],
        ["generate", "x", "--effort", "huge"],
    ):
        assert runner.invoke(app, words).exit_code == 2


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What `finetune train` would run."""
    words: list[str] = []

    def start(program: list[str], **_: object) -> SimpleNamespace:
        words.extend(program)
        return SimpleNamespace(pid=0, wait=lambda: 0)

    monkeypatch.setattr("finetune.cli_launch.subprocess.Popen", start)
    yield words


def test_train_prints_the_command_it_runs(recipe: Path, launched: list[str]) -> None:
    result = runner.invoke(app, ["train", "recipe.yaml", "train.max_steps=3", "data.held_out=0"])
    assert result.exit_code == 0
    config = Path(cli_launch.__file__).parent.parent / "configs" / "single.yaml"
    training = ["-m", "finetune.train", "recipe.yaml", "train.max_steps=3", "data.held_out=0"]
    assert result.stdout.split() == [
        "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        str(config),
        *training,
    ]
    assert launched[:3] == [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    assert launched[3:] == result.stdout.split()[1:]


def test_what_follows_two_dashes_goes_to_accelerate(recipe: Path, launched: list[str]) -> None:
    words = ["train", "recipe.yaml", "lora.rank=2", "--", "--config_file", "my.yaml", "--num_processes", "4"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0
    assert result.stdout.split() == [
        *["accelerate", "launch", "--quiet", "--config_file", "my.yaml", "--num_processes", "4"],
        *["-m", "finetune.train", "recipe.yaml", "lora.rank=2"],
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_finetune_train_reaches_training_past_the_launcher(number: signal.Signals) -> None:
    # Stands for accelerate: it must survive what its child, standing for training, is told.
    training = (
        "import os, signal, sys; signal.signal(2, lambda *_: sys.exit(0)); "
        "open(os.environ['FINETUNE_LISTENS'], 'w'); print('ready'); signal.pause()"
    )
    launcher = (
        f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-u', '-c', {training!r}]))"
    )
    code = (
        "import sys; from finetune import cli_launch; popen = cli_launch.subprocess.Popen; "
        f"cli_launch.subprocess.Popen = lambda _, **k: popen([sys.executable, '-c', {launcher!r}], **k); "
        "sys.exit(cli_launch.supervise(['accelerate']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == 0


def test_a_signal_before_training_listens_ends_the_launcher() -> None:
    launcher = "import time; print('ready', flush=True); time.sleep(60)"
    code = (
        "import sys; from finetune import cli_launch; popen = cli_launch.subprocess.Popen; "
        f"cli_launch.subprocess.Popen = lambda _, **k: popen([sys.executable, '-c', {launcher!r}], **k); "
        "cli_launch.supervise(['accelerate'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert said.endswith("FinetuneError: stopped before training began\n")


def test_train_passes_json_and_debug_on_and_keeps_standard_output_free(
    recipe: Path, launched: list[str]
) -> None:
    result = runner.invoke(app, ["train", "recipe.yaml", "--json", "--debug"])
    assert result.stdout == "" and launched[-2:] == ["--json", "--debug"]
    assert "accelerate launch" in result.stderr


@pytest.mark.parametrize("mistake", ["train.max_steps=soon", "data.train=[{path: missing.jsonl}]"])
def test_train_says_a_mistake_before_anything_is_launched(
    recipe: Path, launched: list[str], mistake: str
) -> None:
    result = runner.invoke(app, ["train", "recipe.yaml", mistake])
    assert (result.exit_code, result.stdout, launched) == (1, "", [])
    assert result.stderr.startswith(f"override {mistake}: ")


def test_train_goes_on_with_a_run(recipe: Path, launched: list[str], tmp_path: Path) -> None:
    run = RunDir.create(load_recipe(recipe), tmp_path / "runs")
    assert runner.invoke(app, ["train", "runs/latest"]).exit_code == 0
    assert launched[-1] == "runs/latest"
    (run.path / "recipe.yaml").write_text("name: 3\n")
    assert runner.invoke(app, ["train", "runs/latest"]).stderr.startswith("runs/latest/recipe.yaml:1: name: ")


def test_runs_are_listed_with_their_latest_figures(recipe: Path, tmp_path: Path) -> None:
    assert "no runs in runs yet" in runner.invoke(app, ["runs"]).output
    run = RunDir.create(load_recipe(recipe))
    run.metrics.write_text('{"step": 7, "loss": 1.25}\n')
    shown = runner.invoke(app, ["runs"]).output
    assert run.path.name in shown and "1.2500" in shown
    (listed,) = json.loads(runner.invoke(app, ["runs", "--json"]).stdout)
    assert (listed["status"], listed["latest"]["step"]) == ("created", 7)


def test_doctor_names_every_package_and_finds_nothing_missing_here() -> None:
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert {"torch", "transformers", "peft", "trl"} <= {package["name"] for package in found["packages"]}
    assert found["problems"] == []
    assert "all is well" in runner.invoke(app, ["doctor"]).output


def test_doctor_says_how_a_cpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.cli_doctor.multiplies", lambda kind: kind == "float32")
    assert "native in float32" in runner.invoke(app, ["doctor"]).output
    monkeypatch.setattr("finetune.cli_doctor.multiplies", lambda kind: False)
    assert "C compiler" in runner.invoke(app, ["doctor"]).output


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.cli_doctor.requires", lambda _: ["no-such-package>=3", "typer<0.1"])
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "no-such-package is missing: pip install 'no-such-package>=3'" in result.output
    assert "outside the tested range <0.1" in result.output


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `finetune eval` asks of the evaluation."""
    asked: list[dict[str, Any]] = []

    def evaluate(where: str, **options: Any) -> Summary:
        asked.append({"where": where, **options})
        return Summary(1.5, 0.5, {})

    monkeypatch.setattr("finetune.evaluate.compare.evaluate", evaluate)
    monkeypatch.setattr("finetune.evaluate.subject.require_model", lambda where: None)
    return asked


def test_eval_measures_a_run_by_its_recipe_and_the_changes_to_it(
    recipe: Path, measured: list[dict[str, Any]]
) -> None:
    RunDir.create(load_recipe(recipe))
    words = ["eval", "runs/latest", "eval.max_new_tokens=9", "--task", "rows.jsonl", "--metric", "number"]
    result = runner.invoke(app, [*words, "--limit", "3", "--json"])
    assert json.loads(result.stdout) == {"held_out_loss": {"base": 1.5, "tuned": 0.5}, "tasks": {}}
    (asked,) = measured
    changed = load_recipe(recipe, asked["overrides"]).eval
    assert (changed.max_new_tokens, asked["limit"], asked["aside"]) == (9, 3, "rows")
    assert [(t.name, t.metric, t.path) for t in changed.tasks] == [
        ("rows", "number", str(recipe.parent / "rows.jsonl"))
    ]


def test_eval_measures_a_model_without_a_run_on_a_file(recipe: Path, measured: list[dict[str, Any]]) -> None:
    (recipe.parent / "my rows.jsonl").write_text(ROW)
    runner.invoke(app, ["eval", "nano", "--task", "my rows.jsonl", "eval.max_new_tokens=9"])
    spec = measured[0]["spec"]
    assert (spec.tasks[0].name, spec.max_new_tokens) == ("my-rows", 9)
    refused = runner.invoke(app, ["eval", "nano", "lora.rank=3"])
    assert refused.stderr.startswith("lora.rank=3: a model without a run has no recipe")
    missing = runner.invoke(app, ["eval", "nano", "--task", "nowhere.jsonl"])
    assert missing.stderr == "nowhere.jsonl: there is no such file of questions\n"
