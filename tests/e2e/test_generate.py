"""`finetune generate` and `chat` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from finetune.cli import app
from tests.checkpoints import NANO, write_random_checkpoint


def finetune(*words: str, typed: str = "") -> Result:
    """The command in this process: importing torch and transformers for every test would take seconds."""
    return CliRunner().invoke(app, list(words), input=typed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base"), tokenizer="bytes", layers=1)


def test_a_file_of_questions_gives_one_json_line_each_and_nothing_else(base: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(5)))
    words = ["generate", str(base), "--file", str(questions), "--json", "--max-new-tokens", "5"]
    program = f"import sys; sys.argv[1:] = {words!r}; from finetune.cli import main; main()"
    # A process of its own: libraries write to the real standard output, past what CliRunner sees.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == [f"question {i}" for i in range(5)]
    assert all(line.keys() >= {"thinking", "content", "tool_calls", "ended", "tokens"} for line in lines)


def test_a_prompt_is_read_from_standard_input(base: Path) -> None:
    done = finetune("generate", str(base), "--json", "--max-new-tokens", "2", typed="one prompt\n")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "one prompt"


def test_no_prompt_and_no_model_are_said_in_a_sentence(base: Path, tmp_path: Path) -> None:
    empty = finetune("generate", str(base))
    assert (empty.exit_code, empty.stdout) == (1, "")
    assert empty.stderr.count("\n") == 1 and "there is no prompt" in empty.stderr
    missing = finetune("generate", str(tmp_path), "hello")
    assert missing.exit_code == 1
    assert "no model here" in missing.stderr and "Traceback" not in missing.stderr


def test_chat_ends_with_its_input(base: Path) -> None:
    done = finetune("chat", str(base), "--max-new-tokens", "3", typed="hello\n/tuned\n/quit\n")
    assert done.exit_code == 0, done.stderr
    assert "/effort low|medium|high" in done.stdout
    assert "cut off" in done.stdout and "no adapter to switch" in done.stdout


def test_nano_answers_and_closes_its_turn() -> None:
    if not (NANO / "config.json").is_file():
        pytest.skip("the bundled model is not there")
    done = finetune("generate", "nano", "What is 3 + 4?", "--json", "--max-new-tokens", "200")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ended"] == "return"
    assert answer["content"]
