"""`python -m finetune.train` from a recipe to an adapter, and what comes between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from finetune.rundir import RunDir
from finetune.train.__main__ import main
from tests.train_helpers import read_metrics, write_project

ADAPTER = "adapter_model.safetensors"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run the command in this process with --json; returns what it printed."""
    capsys.readouterr()
    main([*arguments, "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1, "standard output should hold the JSON alone"
    return dict(json.loads(printed))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_project(tmp_path)


def test_a_recipe_becomes_a_run_with_everything_the_design_lists(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = "eval.tasks=[{name: sums, path: held_out, limit: 2}]"
    keys = ("train.verify_frozen=true", "eval.max_new_tokens=4", "export.formats=[adapter]", tasks)
    result = run_json(capsys, str(project), *keys)
    assert result["status"] == "done"
    run = RunDir.open(result["run"])
    assert run.path == Path("runs/latest").resolve()
    info = run.info()
    assert info["status"] == "done"
    assert info["command"].startswith("accelerate launch -m finetune.train ")
    assert info["frozen"]["before"] == info["frozen"]["after"]
    assert info["base"]["fingerprint"] and info["data"]["fingerprint"]
    assert info["versions"]["torch"] and info["hardware"]["cpus"]
    assert [path.name for path in run.checkpoints()] == ["step-000002", "step-000004"]
    rows = read_metrics(run.path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert safetensors.torch.load_file(run.adapter / ADAPTER)
    assert result["tasks"]["sums"]["n"] == 2
    assert result["held_out_loss"]["tuned"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-4)
    assert (Path(result["exports"]["adapter"]) / "finetune_export.json").is_file()
    assert not list(run.path.rglob("*.bin")) and not list(run.path.rglob("*.pt*"))


def test_a_run_that_goes_on_repeats_the_uninterrupted_one_bit_for_bit_without_pickle(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    # Seven steps of three passes: more than an epoch, saved in the middle of one.
    keys = ("train.max_steps=7", "train.save_every_steps=3", "train.tokens_per_step=1536")
    whole = Path(run_json(capsys, str(project), *keys)["run"])
    broken = whole.with_name("broken")
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "adapter")
    RunDir(broken).update(status="training")
    for later in RunDir(broken).checkpoints()[1:]:
        shutil.rmtree(later)
    assert RunDir(broken).checkpoints()[0].name == "step-000006"
    assert run_json(capsys, str(broken))["status"] == "done"
    assert read_metrics(broken) == read_metrics(whole)
    assert (broken / "adapter" / ADAPTER).read_bytes() == (whole / "adapter" / ADAPTER).read_bytes()


def test_a_full_disk_is_one_sentence_and_the_earlier_checkpoint_goes_on(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.train.checkpoint as checkpoint

    save, calls = safetensors.torch.save_file, []

    def fill_up(tensors: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    result = run_json(capsys, str(project))
    assert result["status"] == "failed"
    assert "step-000004: the disk is full" in result["error"] and "\n" not in result["error"]
    run = RunDir.open("runs/latest")
    assert run.info()["status"] == "failed"
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    os.chdir(project.parent)
    assert run_json(capsys, str(run.path))["status"] == "done"
    assert [row["step"] for row in read_metrics(run.path)] == [0, 1, 2, 3, 4, 4]


def test_a_run_that_was_killed_after_its_last_step_takes_no_further_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.open(run_json(capsys, str(project))["run"])
    rows, weights = read_metrics(run.path), (run.adapter / ADAPTER).read_bytes()
    shutil.rmtree(run.adapter)
    run.update(status="training")
    assert run_json(capsys, str(run.path))["status"] == "done"
    assert read_metrics(run.path) == rows
    assert (run.adapter / ADAPTER).read_bytes() == weights


def test_a_done_run_is_left_as_it_is_unless_overrides_ask_for_more(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.open(run_json(capsys, str(project))["run"])
    assert run_json(capsys, str(run.path)) == {"run": str(run.path), "status": "done"}
    assert run_json(capsys, str(run.path), "train.max_steps=6")["status"] == "done"
    assert [row["step"] for row in read_metrics(run.path)] == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert run.recipe().train.max_steps == 6
    assert len(run.info()["went_on"]) == 1


def test_data_that_changed_cannot_be_gone_on_with(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.open(run_json(capsys, str(project), "train.max_steps=2")["run"])
    shutil.rmtree(run.adapter)
    run.update(status="training")
    rows = project.parent / "rows.jsonl"
    rows.write_text("\n".join(rows.read_text().splitlines()[:-1]))
    assert "the data changed since this run began" in run_json(capsys, str(run.path))["error"]


def launch(*arguments: str, folder: Path, launcher: tuple[str, ...] = (), **keywords: Any) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *(launcher or ("finetune.train",)), *arguments]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(root)}, text=True, **keywords
    )


def test_ctrl_c_saves_and_says_how_to_go_on(project: Path) -> None:
    process = launch(
        str(project), "train.max_steps=5000", "train.save_every_steps=5000", "train.schedule=constant",
        folder=project.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = project.parent / "runs" / "latest" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    run = RunDir.open(project.parent / "runs" / "latest")
    assert process.returncode == 1
    assert f"`finetune train {run.path}` goes on" in said
    assert "Traceback" not in said
    assert run.info()["status"] == "stopped"
    step = read_metrics(run.path)[-1]["step"]
    assert [path.name for path in run.checkpoints()] == [f"step-{step:06d}"]


def test_two_processes_learn_what_one_does(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Path(run_json(capsys, str(project), "name=alone")["run"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # accelerate's --cpu would start one process only, whatever their number.
    launcher = (
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    )
    launcher += f" --mixed_precision no --dynamo_backend no --main_process_port {port} -m finetune.train"
    process = launch(
        str(project), "name=pair", launcher=tuple(launcher.split()), folder=project.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    pair = RunDir.open(project.parent / "runs" / "latest")
    assert pair.info()["hardware"]["processes"] == 2
    ours, theirs = read_metrics(alone), read_metrics(pair.path)
    for one, two in zip(ours, theirs, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["off", "offline"])
def test_wandb_is_imported_only_when_asked_for(project: Path, mode: str) -> None:
    pytest.importorskip("wandb")
    script = (
        "import sys; from finetune.train.__main__ import main; "
        f"assert main([{str(project)!r}, 'train.max_steps=1', 'tracking.wandb={mode}']) == 0; "
        "print('imported' if sys.modules.get('wandb') else 'absent')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project.parent, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("absent" if mode == "off" else "imported")
    assert (project.parent / "runs" / "latest" / "wandb").is_dir() == (mode == "offline")
