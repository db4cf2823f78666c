"""An export to MXFP4 that is killed goes on with the layer it had come to."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.export.layerwise import Layer, Network
from finetune.export.progress import FILE
from tests.export_kit import write_adapter, write_base, write_talk

PROGRAM = "import sys; from finetune.cli import main; main()"
LAYERS = 7
LONGEST_WAIT = 120  # seconds


def killed_in_a_layer(words: list[str], part: Path) -> None:
    """Run the command until it has finished a layer, and kill it in one that follows."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stderr=subprocess.PIPE)
    began = time.monotonic()
    while not (part / FILE).is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - began < LONGEST_WAIT
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_export_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", layers=LAYERS, hidden=64, intermediate=64, shards=2)
    adapter = write_adapter(tmp_path / "adapter", base)
    talk = write_talk(tmp_path / "talk.jsonl", rows=16)
    fit = ["--calibrate", str(talk), "--kept-at-least", "0"]
    words = ["export", str(adapter), "--to", "mxfp4", *fit, "--out"]
    killed_in_a_layer([*words, str(tmp_path / "out")], tmp_path / ".out.part")
    assert not (tmp_path / "out").exists()
    done: list[int] = []
    plain = Network.layer

    def noted(network: Network, number: int) -> Layer:
        done.append(number)
        return plain(network, number)

    monkeypatch.setattr(Network, "layer", noted)

    def export(out: str, *more: str) -> list[int]:
        done.clear()
        result = CliRunner().invoke(app, [*words, str(tmp_path / out), *more])
        assert result.exit_code == 0, result.stderr
        return list(dict.fromkeys(done))  # the last layer is read for every round of its fit

    assert export("undisturbed") == list(range(LAYERS))
    resumed = export("out")
    assert resumed == list(range(LAYERS))[-len(resumed) :] and len(resumed) < LAYERS
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "undisturbed").iterdir()}
    for name in names - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    assert not list(tmp_path.glob(".out.*"))
