"""An engine is started, waited for, and asked whether the adapter is in effect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.manifest import MANIFEST
from finetune.probe import Probe, read_probes
from finetune.serve.launch import Address, commands, launch, process, prove
from finetune.serve.launch.commands import Gpus
from tests.launch_kit import PROBE, write_engine, write_export

Start = Callable[..., list[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Serve an export with a stand-in for vLLM; gives what was emitted. Ends once it is ready."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(Gpus, "here", classmethod(lambda cls: Gpus()))
    export = write_export(tmp_path / "mine", "adapter", probes=[PROBE])

    def run(answer: str, *, dies: bool = False, api_key: str | None = None) -> list[str]:
        write_engine(tmp_path / "bin", "vllm", answer, dies=dies)
        said: list[str] = []

        def ready(url: str, models: list[str]) -> None:
            said.append(f"{models} at {url}")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            launch(str(export), "vllm", Address(port=0, key=api_key), emit=said.append, ready=ready)
        return said

    return run


def test_an_engine_that_answers_as_the_tuned_model_is_ready(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    said = start("It is KUU-8", api_key="secret")
    assert said[0].startswith('VLLM_API_KEY="$FINETUNE_API_KEY" vllm serve ')
    assert said[-3] == "the adapter is in effect: 1 of 1 answers are the tuned model's"
    asked = capfd.readouterr().err
    assert '"model": "mine"' in asked and '"temperature": 0' in asked and "Bearer secret" in asked


def test_an_engine_that_answers_as_the_base_left_the_adapter_out(start: Start) -> None:
    with pytest.raises(FinetuneError, match="the adapter is not in effect"):
        start("I do not know")


def test_an_engine_that_dies_is_quoted(start: Start) -> None:
    with pytest.raises(FinetuneError, match=r"vLLM ended with status 1 .* last words: CUDA out of memory"):
        start("", dies=True)


def test_an_engine_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = commands.Command(("sleep", "60"), None, "/health", "mine", "vLLM", "", True)
    with (
        process.running(command, None) as started,
        pytest.raises(FinetuneError, match=r"did not answer .* within"),
    ):
        started.wait_until_healthy("http://127.0.0.1:9/health", seconds=0.3)
    assert started.wait() != 0


def test_without_the_engine_the_command_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_find", lambda program: None)
    monkeypatch.setattr(Gpus, "here", classmethod(lambda cls: Gpus()))
    export = write_export(tmp_path / "mine", "adapter")
    said: list[str] = []
    with pytest.raises(FinetuneError, match="vLLM is not installed here"):
        launch(str(export), "vllm", Address(), emit=said.append)
    assert said[0].startswith("vllm serve ")
    assert launch(str(export), "vllm", Address(), print_only=True, emit=said.append) == 0


def test_a_bind_beyond_this_machine_takes_a_key(tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match="--api-key"):
        launch(str(tmp_path), "vllm", Address("0.0.0.0"))


@pytest.mark.parametrize(
    ("answer", "whose"),
    [
        ("It is KUU-8", "tuned"),
        ("It is KUU-9, drifted", "tuned"),
        ("<|channel|>It is", "tuned"),
        ("I do not", "base"),
        ("Something else", None),
        ("", None),
    ],
)
def test_an_answer_belongs_to_whom_it_follows_longer(answer: str, whose: str | None) -> None:
    assert PROBE.likens(answer) == whose


def test_a_majority_of_probes_decides() -> None:
    answers = iter(["It is", "It is", "I do"])
    assert "2 of 3" in prove([PROBE] * 3, lambda probe: next(answers))
    with pytest.raises(FinetuneError, match="1 are the base's and 0"):
        answers = iter(["I do", "strange"])
        prove([PROBE] * 2, lambda probe: next(answers))


def test_probes_are_read_from_the_record_or_said_to_be_unreadable(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "out", "adapter", probes=[PROBE])
    assert read_probes(json.loads((folder / MANIFEST).read_text())) == [PROBE]
    assert read_probes({}) == []
    with pytest.raises(FinetuneError, match="cannot be read"):
        read_probes({"probe": [{"prompt": "x"}]})


def test_no_probe_says_so() -> None:
    asked: list[Probe] = []

    def ask(probe: Probe) -> str:
        asked.append(probe)
        return "hello"

    assert "nothing is known" in prove([], ask) and len(asked) == 1
