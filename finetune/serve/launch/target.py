"""What an engine is to serve: which export of a run it can load, over which base, under which name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import FinetuneError
from finetune.manifest import MANIFEST, read_manifest
from finetune.model import inspect_checkpoint, resolve
from finetune.model.places import check_hub_id
from finetune.rundir import RunDir

Engine = Literal["vllm", "sglang", "llama.cpp"]
# What each engine loads; of a run's exports the first one found is served. A merged model needs nothing
# beside it; vLLM alone puts an adapter on the MXFP4 base as released.
FORMATS: dict[str, tuple[str, ...]] = {
    "vllm": ("adapter", "mxfp4", "bf16"),
    "sglang": ("mxfp4", "bf16", "sglang-lora"),
    "llama.cpp": ("gguf", "gguf-lora"),
}
_ADAPTERS = ("adapter", "sglang-lora", "gguf-lora")
# A run's directory name ends in the time it began.
_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")


@dataclass(frozen=True)
class Target:
    """`model` is what the engine loads: a directory, a hub id or a .gguf; `adapters` go on top, by name.

    `name` is what clients ask for, `rank` the largest of the adapters', `packed` whether the experts of
    `model` are in MXFP4, `bytes` the size of its weights where they are on this machine. `manifest` is the
    export's record and `folder` where it lies; both None for a model that is no export.
    """

    name: str
    model: str
    base_name: str
    adapters: dict[str, Path] = field(default_factory=dict)
    rank: int = 0
    packed: bool = True
    bytes: int | None = None
    manifest: dict[str, Any] | None = None
    folder: Path | None = None


def find_target(
    where: str, engine: Engine, *, base: str | None = None, adapters: Mapping[str, Path] | None = None
) -> Target:
    """What `where` (a run, an export, or a model) means to `engine`.

    `base` replaces the base that an adapter names; `adapters` are further exports to serve beside it.

    Raises:
        FinetuneError: the engine cannot load what is there, and which export it could.
    """
    folder = _export_of_run(where, engine) if RunDir.is_run(where) else Path(where)
    if not (folder / MANIFEST).is_file():
        return _bare_model(where, engine, adapters or {})
    manifest = read_manifest(folder)
    _require_proof(manifest, folder)
    found = manifest["format"]
    if found not in FORMATS[engine]:
        raise _wrong_format(engine, found, _named_source(manifest))
    name = _name(manifest, folder)
    if found not in _ADAPTERS:
        if adapters:
            raise FinetuneError("this is merged already: --adapter goes with an adapter's export", at=where)
        return _whole(folder, engine, name, manifest)
    named = {name: folder} | {other: _require_same(path, found) for other, path in (adapters or {}).items()}
    place = base or str(manifest["base"]["name"])
    if engine == "llama.cpp":
        if len(named) > 1:
            raise FinetuneError("llama.cpp is started with one adapter; leave --adapter out", at=where)
        gguf = _base_gguf(base, place)
        return Target(name, str(gguf), gguf.stem, {name: folder / "adapter.gguf"}, 0, True,
                      gguf.stat().st_size, manifest, folder)  # fmt: skip
    model, packed, size = _weights(place)
    configs = [_adapter_config(path) for path in named.values()]
    if engine == "sglang" and packed and any(map(_has_experts, configs)):
        raise FinetuneError(
            "SGLang puts an adapter of experts on a bf16 base alone; write one with: "
            f"finetune export {place} --to bf16 --out DIR, and name it with --base DIR"
        )
    rank = max(_rank(config) for config in configs)
    return Target(name, model, Path(place).name, named, rank, packed, size, manifest, folder)


def _export_of_run(run: str, engine: Engine) -> Path:
    for name in FORMATS[engine]:
        folder = Path(run) / "export" / name
        if (folder / MANIFEST).is_file():
            return folder
    raise _wrong_format(engine, None, run)


def _wrong_format(engine: Engine, found: str | None, source: str) -> FinetuneError:
    what = f"an export of format {found}" if found else "a run without an export"
    to = FORMATS[engine][0]
    takes = ", ".join(FORMATS[engine])
    return FinetuneError(
        f"{engine} cannot load {what} (it takes {takes}); write one with: "
        f"finetune export {source} --to {to} --out {to}-export"
    )


def _named_source(manifest: Mapping[str, Any]) -> str:
    run = (manifest.get("source") or manifest.get("made_from", {}).get("source") or {}).get("run")
    return f"runs/{run}" if run else "RUN"


def _require_proof(manifest: Mapping[str, Any], folder: Path) -> None:
    verdict = manifest.get("proof", {}).get("verified")
    if verdict and not verdict["passed"]:
        raise FinetuneError(
            "this export failed its proof; look with finetune verify, and export again", at=str(folder)
        )


def _require_same(folder: Path, export_format: str) -> Path:
    found = read_manifest(folder)["format"]
    if found != export_format:
        raise FinetuneError(
            f"this is of format {found}, and the first adapter {export_format}", at=str(folder)
        )
    return folder


def _bare_model(where: str, engine: Engine, adapters: Mapping[str, Path]) -> Target:
    """A model as it is: nothing was tuned, or nobody recorded it."""
    if adapters:
        raise FinetuneError("--adapter goes with the export of an adapter", at=where)
    if engine == "llama.cpp":
        file = _gguf_in(Path(where))
        if file is None:
            raise FinetuneError(
                f"llama.cpp takes a GGUF; write one with: finetune export {where} --to gguf --out DIR",
                at=where,
            )
        return Target(file.stem, str(file), file.stem, bytes=file.stat().st_size)
    if (Path(where) / "adapter_config.json").is_file():
        raise FinetuneError(
            f"{engine} is given exports; write one with: finetune export {where} "
            f"--to {'adapter' if engine == 'vllm' else 'sglang-lora'} --out DIR",
            at=where,
        )
    model, packed, size = _weights(where)
    return Target(Path(where).name, model, Path(where).name, packed=packed, bytes=size)


def _whole(folder: Path, engine: Engine, name: str, manifest: dict[str, Any]) -> Target:
    if engine == "llama.cpp":
        file = folder / "model.gguf"
        return Target(name, str(file), name, {}, 0, True, file.stat().st_size, manifest, folder)
    model, packed, size = _weights(str(folder))
    return Target(name, model, name, {}, 0, packed, size, manifest, folder)


def _weights(place: str) -> tuple[str, bool, int | None]:
    """What an engine is told to load, whether its experts are in MXFP4, and its bytes.

    A hub id stays one, for the engine to fetch; what OpenAI released there is in MXFP4.
    """
    if place != "nano" and not Path(place).exists():
        check_hub_id(place)
        return place, True, None
    info = inspect_checkpoint(resolve(place).base)
    return str(info.path), info.kind == "mxfp4", info.bytes


def _base_gguf(base: str | None, named: str) -> Path:
    found = _gguf_in(Path(base)) if base else None
    if found is None:
        raise FinetuneError(
            "llama.cpp needs the adapter's base as a GGUF too; write one with: "
            f"finetune export {named} --to gguf --out DIR, and name it with --base DIR"
        )
    return found


def _gguf_in(path: Path) -> Path | None:
    if path.is_file() and path.suffix == ".gguf":
        return path
    inside = path / "model.gguf"
    return inside if inside.is_file() else None


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FinetuneError(f"this adapter cannot be read: {error}", at=str(file)) from error
    if not isinstance(config, dict):
        raise FinetuneError("this adapter's configuration is not a mapping", at=str(file))
    return config


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _has_experts(config: Mapping[str, Any]) -> bool:
    return any(name in ("gate_proj", "up_proj", "down_proj") for name in config.get("target_modules") or ())


def _name(manifest: Mapping[str, Any], folder: Path) -> str:
    """The recipe's name, which a run's directory begins with, or that of the export's folder."""
    source = manifest.get("source") or manifest.get("made_from", {}).get("source") or {}
    return _STAMP.sub("", source.get("run") or folder.resolve().name)
