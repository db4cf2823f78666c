"""`finetune serve` as a user types it: a process that starts, answers and ends, and mistakes before that."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner, Result

from finetune.cli import app
from finetune.export import export
from finetune.manifest import MANIFEST
from tests.checkpoints import write_random_checkpoint
from tests.export_kit import write_adapter, write_base


def serve(*words: str) -> Result:
    """In this process: every mistake is found before anything is served."""
    return CliRunner().invoke(app, ["serve", *words])


def refused(done: Result, *words: str) -> None:
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base") / "tiny", tokenizer="bytes", layers=2)


@pytest.fixture
def exported(base: Path, tmp_path: Path) -> Path:
    export(write_adapter(tmp_path / "adapter", base), "bf16", tmp_path / "merged")
    return tmp_path / "merged"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_answers_and_ends_cleanly(base: Path, number: int) -> None:
    words = ["serve", str(base), "--port", "0", "--json", "--context", "64", "--dtype", "float32"]
    program = f"import sys; sys.argv[1:] = {words!r}; from finetune.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FINETUNE_API_KEY": "of the environment"},
    )  # fmt: skip
    try:
        assert process.stdout
        told = json.loads(process.stdout.readline())
        assert told["models"] == ["tiny"]
        assert httpx.get(told["url"] + "/v1/models").status_code == 401
        key = {"Authorization": "Bearer of the environment"}
        (model,) = httpx.get(told["url"] + "/v1/models", headers=key, timeout=60).json()["data"]
        assert (model["id"], model["context_length"]) == ("tiny", 64)
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, rest, errors) == (0, "", "")


def test_a_port_in_use_is_said_before_anything_is_loaded(base: Path, taken: int) -> None:
    refused(serve(str(base), "--port", str(taken)), f"port {taken} of 127.0.0.1 is in use", "--port")


def test_other_machines_are_let_in_only_with_a_key(base: Path) -> None:
    refused(serve(str(base), "--host", "0.0.0.0"), "--api-key or FINETUNE_API_KEY")


def test_an_export_is_served_as_it_was_written_or_not_at_all(exported: Path) -> None:
    file = exported / "model.safetensors"
    file = file if file.is_file() else next(iter(sorted(exported.glob("*.safetensors"))))
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    refused(serve(str(exported), "--port", "0"), f"{file.name}: this file is not as it was exported")


def test_an_export_that_failed_its_proof_is_refused(exported: Path) -> None:
    record = exported / MANIFEST
    facts = json.loads(record.read_text())
    facts["proof"]["verified"] = {"passed": False}
    record.write_text(json.dumps(facts))
    refused(serve(str(exported), "--port", "0"), "is not the model it was made from; export it again")


def test_an_export_for_another_engine_names_that_engine(tmp_path: Path) -> None:
    export(write_base(tmp_path / "base"), "gguf", tmp_path / "gguf")
    refused(serve(str(tmp_path / "gguf"), "--port", "0"), "finetune serve --engine llama.cpp does")


def test_adapters_are_given_by_name_fit_the_base_and_share_no_name(base: Path, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "other", tokenizer="bytes", layers=2, seed=9)
    adapter = write_adapter(tmp_path / "adapter", other)
    port = ("--port", "0")
    refused(serve(str(base), "--adapter", "mine", *port), "--adapter is NAME=DIR")
    refused(serve(str(base), "--adapter", f"mine={base}", *port), "there is no adapter here")
    refused(serve(str(base), "--adapter", f"mine={adapter}", *port), "was trained on other weights")
    twice = ("--adapter", f"mine={adapter}") * 2
    refused(serve(str(other), *twice, *port), "two adapters are called 'mine'")
    refused(serve(str(other), "--adapter", f"other={adapter}", *port), "as its base is")


def test_limits_that_cannot_be_kept_are_said(base: Path) -> None:
    port = ("--port", "0")
    refused(serve(str(base), "--context", "10000000", *port), "more than the model's")
    refused(serve(str(base), "--cache-gb", "0.000001", *port), "larger --cache-gb")


@pytest.mark.parametrize("option", ["--ui", "--dtype=float32", "--batch=32", "--queue=256", "--cache-gb=1"])
def test_a_setting_of_the_local_engine_is_refused_by_the_others(base: Path, option: str) -> None:
    name = option.partition("=")[0]
    said = f"{name} is a setting of the local engine; sglang has its own"
    refused(serve(str(base), "--engine", "sglang", option), said)


@pytest.mark.parametrize("option", ["--base=base", "--print"])
def test_a_setting_of_other_engines_is_refused_by_the_local_one(base: Path, option: str) -> None:
    refused(serve(str(base), option), f"{option.partition('=')[0]} is a setting of the other engines")
