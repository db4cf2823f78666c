"""Other engines: the right command for an export, started, and asked whether the adapter is in effect."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast, get_args

from finetune.errors import FinetuneError, writing
from finetune.manifest import MANIFEST
from finetune.probe import Probe, read_probes
from finetune.serve.launch.commands import Address, Gpus, build_command
from finetune.serve.launch.process import complete, running
from finetune.serve.launch.target import Engine, Target, find_target
from finetune.serve.server import listen, require_key

__all__ = ["Address", "launch"]


def launch(
    where: str,
    engine: str,
    address: Address,
    *,
    adapters: Mapping[str, Path] | None = None,
    base: str | None = None,
    print_only: bool = False,
    emit: Callable[[str], None] = print,
    ready: Callable[[str, list[str]], None] | None = None,
) -> int:
    """Serve `where` (a run, an export, a model) with another engine until that ends; its exit status.

    `emit` is told the command, and once the engine answers, what the probes said and its address; after
    that `ready` gets the address and the names to ask for. Port 0 takes any free one.

    Raises:
        FinetuneError: the engine cannot load this export, is not installed, does not start, or answers as
            the base does; the port is taken, or others than this machine could ask without a key.
    """
    if engine not in get_args(Engine):
        raise FinetuneError(f"there is no engine {engine!r}; known are local, {', '.join(get_args(Engine))}")
    chosen = cast(Engine, engine)
    require_key(address.host, address.key)
    target = find_target(where, chosen, base=base, adapters=adapters)
    if not print_only:
        with listen(address.host, address.port) as free:
            address = replace(address, port=free.getsockname()[1])
    command = build_command(chosen, target, address, Gpus.here())
    emit(command.shown(with_key=address.key is not None))
    if print_only:
        return 0
    if not command.installed:
        raise FinetuneError(
            f"{command.program} is not installed here ({command.install}); the command above runs where it is"
        )
    probes = probes_of(target)
    with running(command, address.key) as process:
        process.wait_until_healthy(address.url + command.health)
        emit(prove(probes, lambda one: complete(address, command.model, one.prompt, one.tokens)))
        emit(f"ready at {address.url}: ask for the model {command.model!r}")
        if ready:
            # What SGLang wants before the name of an adapter, it wants before each.
            before = command.model.removesuffix(target.name)
            others = [before + name for name in target.adapters if name != target.name]
            ready(address.url, [command.model, *others])
        try:
            return process.wait()
        except KeyboardInterrupt:
            # That is how a server is ended.
            return 0


def prove(probes: list[Probe], ask: Callable[[Probe], str]) -> str:
    """Ask the probes; what they show, in words.

    Raises:
        FinetuneError: no more answers are the tuned model's than are its base's.
    """
    if not probes:
        ask(Probe("<|start|>user<|message|>Hello<|end|><|start|>assistant", 8, "", ""))
        return "it answers; nothing is known here that would tell a tuned model from its base"
    said = Counter(probe.likens(ask(probe)) for probe in probes)
    if said["tuned"] <= said["base"]:
        raise FinetuneError(
            f"the adapter is not in effect: of {len(probes)} answers, {said['base']} are the base's and "
            f"{said['tuned']} the tuned model's"
        )
    return f"the adapter is in effect: {said['tuned']} of {len(probes)} answers are the tuned model's"


def probes_of(target: Target) -> list[Probe]:
    """The probes of an export; where its record has none, asked of its run and added to the record.

    Empty for what is no export, and where the run that it was made from is not on this machine.
    """
    if target.manifest is None or target.folder is None:
        return []
    if known := read_probes(target.manifest):
        return known
    run = _run_of(target.manifest, target.folder)
    if run is None:
        return []
    from finetune.serve.launch.asking import ask_run

    probes = ask_run(run)
    record: dict[str, Any] = {**target.manifest, "probe": [asdict(probe) for probe in probes]}
    with writing(target.folder):
        (target.folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return probes


def _run_of(manifest: Mapping[str, Any], folder: Path) -> Path | None:
    """The run that an export was made from: around it, or among the runs here."""
    source = manifest.get("source") or manifest.get("made_from", {}).get("source") or {}
    name = source.get("run")
    if not name:
        return None
    around = [path for path in folder.resolve().parents if path.name == name]
    found = (path for path in (*around, Path("runs") / name) if (path / "adapter").is_dir())
    return next(found, None)
