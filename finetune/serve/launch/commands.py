"""The command line that starts an engine on a target; what it says is checked against the engines' parsers.

Flags as in vLLM 0.33.0, SGLang 0.5.23, llama.cpp as in llama-cpp-python 0.3.36, and that package's server.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.serve.launch.target import Engine, Target

# The values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# llama.cpp reserves the whole context at once: 131,072 tokens would be gigabytes, on a laptop too.
LLAMA_CONTEXT = 8192
# Beyond the weights: activations, CUDA graphs and a key-value cache for a few long conversations.
HEADROOM = 1.25
# The released models have 8 key-value heads, which tensor parallelism shares out.
MOST_GPUS = 8
KEY = "FINETUNE_API_KEY"


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this machine: how many, and the bytes of the smallest one."""

    count: int = 0
    memory: int = 0

    @classmethod
    def here(cls) -> Gpus:
        import torch

        found = [torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count())]
        return cls(len(found), min(found, default=0))


@dataclass(frozen=True)
class Command:
    """A command line; `key_variable` is the environment variable in which the engine looks for an API key.

    Without one, `words` hold `$FINETUNE_API_KEY` for a shell to fill in.
    """

    words: tuple[str, ...]
    key_variable: str | None
    health: str
    model: str  # what requests ask for
    program: str  # how it is called in sentences
    install: str
    installed: bool

    def shown(self, *, with_key: bool) -> str:
        """As one would type it; a key is named, never spelled out."""
        before = f'{self.key_variable}="${KEY}" ' if with_key and self.key_variable else ""
        return before + " ".join(
            f'"{word}"' if word == f"${KEY}" else shlex.quote(word) for word in self.words
        )


@dataclass(frozen=True)
class Address:
    """Where to listen, the key that clients send, and the longest context in tokens (None: the engine's)."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    context: int | None = None

    @property
    def url(self) -> str:
        """As this machine asks it: a server that listens on every address is found on its own."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def build_command(engine: Engine, target: Target, address: Address, gpus: Gpus) -> Command:
    """The engine's command for this target and machine.

    Raises:
        FinetuneError: the adapter's rank is more than the engine takes.
    """
    if engine == "vllm":
        return _vllm(target, address, gpus)
    if engine == "sglang":
        return _sglang(target, address, gpus)
    return _llama_server(target, address, gpus) or _llama_python(target, address, gpus)


def _vllm(target: Target, address: Address, gpus: Gpus) -> Command:
    served = target.base_name if target.adapters else target.name
    words = ["vllm", "serve", target.model, "--served-model-name", served]
    words += ["--host", address.host, "--port", str(address.port)]
    words += ["--reasoning-parser", "openai_gptoss"]
    words += ["--tool-call-parser", "openai", "--enable-auto-tool-choice"]
    if address.context:
        words += ["--max-model-len", str(address.context)]
    if (needed := gpus_needed(target, gpus)) > 1:
        words += ["--tensor-parallel-size", str(needed)]
    if target.adapters:
        rank = next((rank for rank in VLLM_RANKS if rank >= target.rank), None)
        if rank is None:
            raise FinetuneError(
                f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, and this one has {target.rank}; "
                "export it merged, with --to mxfp4"
            )
        words += ["--enable-lora", "--max-loras", str(len(target.adapters)), "--max-lora-rank", str(rank)]
        if target.packed:
            # Of vLLM's MXFP4 kernels, Marlin has LoRA for experts on every NVIDIA GPU since Ampere.
            words += ["--moe-backend", "marlin"]
        words += ["--lora-modules", *(f"{name}={path.resolve()}" for name, path in target.adapters.items())]
    return Command(tuple(words), "VLLM_API_KEY", "/health", target.name, "vLLM", "pip install vllm",
                   _find("vllm") is not None)  # fmt: skip


def _sglang(target: Target, address: Address, gpus: Gpus) -> Command:
    served = target.base_name if target.adapters else target.name
    words = ["python", "-m", "sglang.launch_server", "--model-path", target.model]
    words += ["--served-model-name", served, "--host", address.host, "--port", str(address.port)]
    words += ["--reasoning-parser", "gpt-oss", "--tool-call-parser", "gpt-oss"]
    if address.context:
        words += ["--context-length", str(address.context)]
    if (needed := gpus_needed(target, gpus)) > 1:
        words += ["--tensor-parallel-size", str(needed)]
    if target.adapters:
        words += ["--enable-lora", "--max-lora-rank", str(target.rank)]
        # Left to itself it takes triton_kernels for a bf16 gpt-oss, which has no LoRA for experts.
        words += ["--moe-runner-backend", "triton"]
        words += ["--lora-paths", *(f"{name}={path.resolve()}" for name, path in target.adapters.items())]
    if address.key is not None:
        words += ["--api-key", f"${KEY}"]
    # SGLang looks adapters up behind a colon.
    model = f"{served}:{target.name}" if target.adapters else target.name
    return Command(tuple(words), None, "/health", model, "SGLang", "pip install sglang",
                   importlib.util.find_spec("sglang") is not None)  # fmt: skip


def _llama_server(target: Target, address: Address, gpus: Gpus) -> Command | None:
    """llama.cpp's own server; None where it is not installed and llama-cpp-python is."""
    found = shutil.which("llama-server")
    if found is None and _llama_python_is_here():
        return None
    words = ["llama-server", "--model", target.model, "--alias", target.name]
    words += ["--host", address.host, "--port", str(address.port)]
    words += ["--ctx-size", str(address.context or LLAMA_CONTEXT), "--jinja", "--reasoning-format", "auto"]
    if gpus.count:
        words += ["--n-gpu-layers", "all"]
    words += [word for path in target.adapters.values() for word in ("--lora", str(path))]
    return Command(tuple(words), "LLAMA_API_KEY", "/health", target.name, "llama.cpp",
                   "brew install llama.cpp, or its releases", found is not None)  # fmt: skip


def _llama_python(target: Target, address: Address, gpus: Gpus) -> Command:
    words = ["python", "-m", "llama_cpp.server", "--model", target.model, "--model_alias", target.name]
    words += ["--host", address.host, "--port", str(address.port)]
    # It would keep the logits of every position of the context.
    words += ["--n_ctx", str(address.context or LLAMA_CONTEXT), "--logits_all", "false"]
    if gpus.count:
        words += ["--n_gpu_layers", "-1"]
    words += [word for path in target.adapters.values() for word in ("--lora_path", str(path))]
    return Command(tuple(words), "API_KEY", "/v1/models", target.name, "llama.cpp",
                   "pip install 'llama-cpp-python[server]'", True)  # fmt: skip


def gpus_needed(target: Target, gpus: Gpus) -> int:
    """The smallest power of two of GPUs that hold the weights, as many as there are at most; 1 if unknown."""
    needed = 1
    while target.bytes and gpus.memory and needed * 2 <= min(gpus.count, MOST_GPUS):
        if target.bytes * HEADROOM <= needed * gpus.memory:
            break
        needed *= 2
    return needed


def _llama_python_is_here() -> bool:
    wanted = ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings")
    return all(importlib.util.find_spec(name) is not None for name in wanted)


def _find(program: str) -> str | None:
    """On the path, or beside this interpreter where its environment is not activated."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
