"""Checkpoints without pickle: whole or absent, and enough to go on exactly where training stopped.

checkpoints/step-000200/
   adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's layout
   optimizer.safetensors                             the moments, each under its parameter's name
   state.json                                        what else the optimizer, the schedule and the random
                                                     generators of every process remember
   trainer_state.json                                step, epoch, tokens and history, by transformers
"""

from __future__ import annotations

import base64
import errno
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.errors import FinetuneError

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
ADAPTER = "adapter_model.safetensors"
TRAINER_STATE = "trainer_state.json"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; safetensors says so only in the text of its own exception."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return isinstance(error, SafetensorError) and any(
        f"(os error {code})" in str(error) for code in _DISK_FULL
    )


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name; it gets its own name once everything is in it.

    Raises:
        FinetuneError: the disk is full. What stood at `final` is as it was, and nothing else is left behind.
    """
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        if not is_disk_full(error):
            raise
        raise FinetuneError(
            "the disk is full: this could not be saved, earlier checkpoints are as they were", at=str(final)
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def keep_newest(checkpoints: list[Path], count: int) -> None:
    """Remove all but the last `count` of the checkpoints, which come oldest first."""
    for old in checkpoints[:-count]:
        shutil.rmtree(old, ignore_errors=True)


def save_state(
    folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, random_states: list[dict[str, Any]]
) -> None:
    """Write optimizer.safetensors and state.json; `random_states` has one entry for each process, by rank."""
    tensors, plain = _optimizer_state(model, optimizer)
    save_file(tensors, folder / OPTIMIZER)
    state = {
        "optimizer": plain,
        "learning_rates": [[group["lr"], group["initial_lr"]] for group in optimizer.param_groups],
        "schedule": scheduler.state_dict(),
        "random": random_states,
    }
    with (folder / STATE).open("w", encoding="utf-8") as file:
        json.dump(state, file)


def load_state(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Put optimizer and schedule back to where `save_state` found them.

    Raises:
        FinetuneError: a file is missing or belongs to another set of trained parameters.
    """
    state, tensors = _read_state(folder), _read_tensors(folder / OPTIMIZER)
    values: dict[str, Any] = {**tensors, **state["optimizer"]}
    names: dict[int, str] = _trained_names(model)
    by_parameter: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, field = key.rsplit(":", 1)
        by_parameter.setdefault(name, {})[field] = value
    if unknown := by_parameter.keys() - set(names.values()):
        raise FinetuneError(f"holds the state of {min(unknown)}, which is not trained here", at=str(folder))
    current = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    current["state"] = {i: by_parameter[name] for i, name in enumerate(order) if name in by_parameter}
    for group, (now, initial) in zip(current["param_groups"], state["learning_rates"], strict=True):
        group.update(lr=now, initial_lr=initial)
    optimizer.load_state_dict(current)
    scheduler.load_state_dict(state["schedule"])


def load_adapter_weights(folder: Path, model: nn.Module) -> None:
    """Copy the saved adapter into the adapter that `model` already has, bit for bit.

    Raises:
        FinetuneError: the file is missing, or its tensors are not those of this adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved, ours = _read_tensors(folder / ADAPTER), get_peft_model_state_dict(model)
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    for name in sorted(shapes.keys() ^ ours.keys()):
        where = "lacks" if name in ours else "holds"
        raise FinetuneError(f"{where} {name}: this adapter was made with other lora settings", at=str(folder))
    for name, value in ours.items():
        if shapes[name] != tuple(value.shape):
            raise FinetuneError(f"{name} has the shape of another rank", at=str(folder / ADAPTER))
    set_peft_model_state_dict(model, saved)


def random_state() -> dict[str, Any]:
    """The random generators of this process, ready for JSON."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [algorithm, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": None if cuda is None else _to_text(cuda),
    }


def restore_random_state(folder: Path, rank: int) -> None:
    """Set this process's generators as they were; a process unknown to the checkpoint keeps its own."""
    states = _read_state(folder)["random"]
    if rank >= len(states):
        return
    state = states[rank]
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _trained_names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters() if p.requires_grad}


def _optimizer_state(model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the rest (bitsandbytes counts steps in a plain int), under "<parameter>:<field>"."""
    names = _trained_names(model)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for parameter, fields in optimizer.state.items():
        for field, value in fields.items():
            key = f"{names[id(parameter)]}:{field}"
            if isinstance(value, Tensor):
                # safetensors refuses tensors that share memory, as bitsandbytes' quantisation maps do.
                tensors[key] = value.detach().cpu().clone().contiguous()
            else:
                plain[key] = value
    return tensors, plain


def require_whole(folder: Path) -> None:
    """Check the files that say where training was; transformers, which reads one of them, would not.

    Raises:
        FinetuneError: one is missing or damaged.
    """
    _read_json(folder / TRAINER_STATE, ("global_step", "max_steps", "log_history"))
    _read_state(folder)


def _read_state(folder: Path) -> dict[str, Any]:
    return _read_json(folder / STATE, ("optimizer", "learning_rates", "schedule", "random"))


def _read_json(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not all(key in state for key in keys):
            raise ValueError(f"it does not hold {', '.join(keys)}")
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    return state


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> FinetuneError:
    said = f"this checkpoint cannot be read ({error}); remove its folder to go on from the one before"
    return FinetuneError(said, at=str(file))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
