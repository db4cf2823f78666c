"""The commands for vLLM and SGLang, read by those programs' own argument parsers where they are installed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from finetune.serve.launch.commands import Address, Command, Gpus, build_command
from finetune.serve.launch.target import Engine, Target

TARGETS = {
    "adapter": Target(
        "mine", "openai/gpt-oss-120b", "gpt-oss-120b", {"mine": Path("/a")}, 20, bytes=65 * 10**9
    ),
    "merged": Target("mine", "/merged", "mine", bytes=65 * 10**9),
}


def command(engine: Engine, target: str) -> Command:
    address = Address("0.0.0.0", 8001, "secret", 4096)
    return build_command(engine, TARGETS[target], address, Gpus(4, 48 * 10**9))


@pytest.mark.parametrize("target", TARGETS)
def test_vllm_takes_the_command(target: str) -> None:
    pytest.importorskip("vllm", reason="needs vllm")
    platforms: Any = pytest.importorskip("vllm.platforms")
    # It asks the machine for a GPU before it knows its options.
    platforms.current_platform.device_type = "cuda"
    arguments: Any = pytest.importorskip("vllm.engine.arg_utils")
    frontend: Any = pytest.importorskip("vllm.entrypoints.common.cli_args")
    parser = pytest.importorskip("vllm.utils.argparse_utils").FlexibleArgumentParser()
    frontend.FrontendArgs.add_cli_args(parser)
    arguments.AsyncEngineArgs.add_cli_args(parser)
    _, _, model, *words = command("vllm", target).words
    read = parser.parse_args(["--model", model, *words])
    assert (read.model, read.max_model_len, read.tensor_parallel_size) == (model, 4096, 2)
    assert (read.reasoning_parser, read.tool_call_parser) == ("openai_gptoss", "openai")
    if target == "adapter":
        assert (read.max_lora_rank, read.moe_backend, read.lora_modules[0].path) == (32, "marlin", "/a")


@pytest.mark.parametrize("target", TARGETS)
def test_sglang_takes_the_command(target: str) -> None:
    arguments: Any = pytest.importorskip("sglang.srt.server_args", reason="needs sglang")
    parser = argparse.ArgumentParser()
    arguments.ServerArgs.add_cli_args(parser)
    read = parser.parse_args(list(command("sglang", target).words[3:]))
    assert (read.context_length, read.tp_size, read.reasoning_parser) == (4096, 2, "gpt-oss")
    if target == "adapter":
        assert (read.lora_paths, read.max_lora_rank) == (["mine=/a"], 20)
