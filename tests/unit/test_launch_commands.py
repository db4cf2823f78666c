"""What each engine is started with, and what is said of an export it cannot load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from finetune.errors import FinetuneError
from finetune.serve.launch import commands
from finetune.serve.launch.commands import Address, Gpus, build_command, gpus_needed
from finetune.serve.launch.target import FORMATS, Engine, Target, find_target
from tests.export_kit import write_base
from tests.launch_kit import write_export

FLAGS = json.loads((Path(__file__).resolve().parents[1] / "engine_flags.json").read_text())
ADDRESS = Address()


def target(**fields: Any) -> Target:
    return Target(
        **{
            "name": "mine",
            "model": "openai/gpt-oss-20b",
            "base_name": "gpt-oss-20b",
            "bytes": 13 * 10**9,
            **fields,
        }
    )


def value_of(words: tuple[str, ...], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("tuned", [True, False], ids=["adapter", "merged"])
@pytest.mark.parametrize("engine", get_args(Engine))
@pytest.mark.parametrize("program", [None, "/usr/bin/llama-server"])
def test_every_flag_and_choice_is_one_that_the_engines_own_parser_has(
    engine: Engine, tuned: bool, program: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: program)
    monkeypatch.setattr(commands, "_llama_python_is_here", lambda: True)
    adapters = {"mine": Path("a"), "other": Path("b")} if tuned else {}
    address = Address("0.0.0.0", 8001, "secret", 4096)
    command = build_command(engine, target(adapters=adapters, rank=3), address, Gpus(4, 8 * 10**9))
    known = FLAGS[engine if engine != "llama.cpp" else "llama-server" if program else "llama_cpp.server"]
    flags = [word for word in command.words if word.startswith("--")]
    assert flags and set(flags) <= set(known["flags"])
    for flag, choices in known["choices"].items():
        assert flag not in flags or value_of(command.words, flag) in choices


def test_vllm_gets_the_next_rank_it_knows_the_adapter_and_a_kernel_with_lora() -> None:
    words = build_command("vllm", target(adapters={"mine": Path("/a")}, rank=20), ADDRESS, Gpus()).words
    assert words[:3] == ("vllm", "serve", "openai/gpt-oss-20b")
    assert value_of(words, "--max-lora-rank") == "32" and value_of(words, "--lora-modules") == "mine=/a"
    assert value_of(words, "--moe-backend") == "marlin"
    assert value_of(words, "--served-model-name") == "gpt-oss-20b"
    dense = build_command("vllm", target(adapters={"mine": Path("/a")}, packed=False), ADDRESS, Gpus()).words
    assert "--moe-backend" not in dense
    with pytest.raises(FinetuneError, match="up to rank 512"):
        build_command("vllm", target(adapters={"mine": Path("/a")}, rank=513), ADDRESS, Gpus())


def test_a_merged_model_is_served_under_its_own_name_without_lora() -> None:
    engines: list[Engine] = ["vllm", "sglang"]
    for engine in engines:
        words = build_command(engine, target(), ADDRESS, Gpus()).words
        assert value_of(words, "--served-model-name") == "mine"
        assert not [word for word in words if "lora" in word]


def test_sglang_is_asked_for_the_adapter_behind_a_colon() -> None:
    command = build_command("sglang", target(adapters={"mine": Path("/a")}, rank=20), ADDRESS, Gpus())
    assert command.model == "gpt-oss-20b:mine" and value_of(command.words, "--max-lora-rank") == "20"


@pytest.mark.parametrize(
    ("size", "gpus", "needed"),
    [
        (13, Gpus(8, 80), 1),
        (65, Gpus(8, 80), 2),
        (65, Gpus(1, 80), 1),
        (65, Gpus(4, 24), 4),
        (65, Gpus(3, 24), 2),
        (13, Gpus(), 1),
        (None, Gpus(8, 80), 1),
    ],
)
def test_as_many_gpus_as_the_weights_need(size: int | None, gpus: Gpus, needed: int) -> None:
    found = Gpus(gpus.count, gpus.memory * 10**9)
    assert gpus_needed(target(bytes=size and size * 10**9), found) == needed


@pytest.mark.parametrize("engine", get_args(Engine))
def test_a_key_is_named_in_the_command_for_a_shell_and_never_spelled_out(engine: Engine) -> None:
    command = build_command(engine, target(), Address("0.0.0.0", 1, "secret"), Gpus())
    assert '"$FINETUNE_API_KEY"' in command.shown(with_key=True)
    assert "FINETUNE_API_KEY" not in build_command(engine, target(), ADDRESS, Gpus()).shown(with_key=False)


@pytest.mark.parametrize("engine", get_args(Engine))
def test_a_run_is_served_by_the_export_that_the_engine_prefers(engine: Engine, tmp_path: Path) -> None:
    run = tmp_path
    for name in ("run.json", "recipe.yaml"):
        (run / name).write_text("{}")
    with pytest.raises(
        FinetuneError, match=rf"finetune export {re.escape(str(run))} --to {FORMATS[engine][0]}"
    ):
        find_target(str(run), engine)
    base = write_base(tmp_path / "base")
    if engine == "llama.cpp":
        write_export(run / "export" / "gguf", "gguf")
        assert find_target(str(run), engine).model == str(run / "export" / "gguf" / "model.gguf")
    elif engine == "vllm":
        write_export(run / "export" / "adapter", "adapter", base=str(base), rank_pattern={"q_proj": 24})
        found = find_target(str(run), engine)
        assert (found.name, found.rank, found.model, found.packed) == ("mine", 24, str(base), True)
    else:
        folder = write_export(
            run / "export" / "sglang-lora", "sglang-lora", base=str(base), target_modules=["q_proj"]
        )
        assert find_target(str(run), engine).adapters == {"mine": folder}


@pytest.mark.parametrize("engine", get_args(Engine))
def test_an_export_of_another_format_names_the_export_to_write(engine: Engine, tmp_path: Path) -> None:
    wrong = write_export(tmp_path / "out", "openai")
    with pytest.raises(FinetuneError, match=r"finetune export runs/mine-20260101-000000 --to "):
        find_target(str(wrong), engine)


def test_experts_on_an_mxfp4_base_are_beyond_sglang_and_a_bf16_base_is_asked_for(tmp_path: Path) -> None:
    packed, dense = write_base(tmp_path / "packed"), write_base(tmp_path / "dense", experts_as="bf16")
    modules = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    export = write_export(tmp_path / "out", "sglang-lora", base=str(packed), target_modules=modules)
    with pytest.raises(FinetuneError, match=r"--to bf16 .* --base DIR"):
        find_target(str(export), "sglang")
    assert not find_target(str(export), "sglang", base=str(dense)).packed


def test_llama_cpp_wants_the_base_of_an_adapter_as_a_gguf(tmp_path: Path) -> None:
    export = write_export(tmp_path / "out", "gguf-lora")
    with pytest.raises(FinetuneError, match=r"finetune export nano --to gguf"):
        find_target(str(export), "llama.cpp")
    base = write_export(tmp_path / "base", "gguf")
    for given in (base, base / "model.gguf"):
        assert find_target(str(export), "llama.cpp", base=str(given)).model == str(base / "model.gguf")


def test_an_export_that_failed_its_proof_is_not_served(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "out", "adapter")
    file = folder / "finetune_export.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "proof": {"verified": {"passed": False}}}))
    with pytest.raises(FinetuneError, match="failed its proof"):
        find_target(str(folder), "vllm")


def test_a_base_alone_is_served_as_it_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert find_target(str(base), "vllm").model == str(base)
    assert find_target("openai/gpt-oss-20b", "sglang").model == "openai/gpt-oss-20b"
    with pytest.raises(FinetuneError, match="takes a GGUF"):
        find_target(str(base), "llama.cpp")
