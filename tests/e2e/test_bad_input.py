"""Every mistake of `tests.mistakes` ends in its one sentence, and leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from tests.mistakes import MISTAKES, Mistake
from tests.mistakes_of_exporting import MISTAKES_OF_EXPORTING
from tests.mistakes_of_serving import MISTAKES_OF_SERVING
from tests.mistakes_of_size import MISTAKES_OF_SIZE
from tests.train_helpers import write_project

STARTED = "training was started"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    write_project(folder)
    return folder


@pytest.mark.parametrize(
    "mistake",
    [*MISTAKES, *MISTAKES_OF_SIZE, *MISTAKES_OF_SERVING, *MISTAKES_OF_EXPORTING],
    ids=lambda mistake: f"{mistake.title}, {mistake.words[0]}".replace(" ", "-"),
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    project = tmp_path / "project"
    shutil.copytree(clean, project)
    mistake.spoil(project)
    before = sorted(project.rglob("*"))
    monkeypatch.chdir(project)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("finetune.cli_launch.supervise", lambda words: pytest.fail(STARTED))
    result = CliRunner().invoke(app, mistake.words)
    assert mistake.matches(result.stderr, project), result.stderr
    assert (result.exit_code, sorted(project.rglob("*"))) == (mistake.status, before)
