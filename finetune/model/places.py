"""From the name of a model to its directory: a path, a hub id, a run directory, or `nano`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError

NANO = Path(__file__).resolve().parent.parent / "assets" / "nano"
ADAPTER_FILE = "adapter_model.safetensors"
# Names the base an adapter was trained on, beside PEFT's own files, which have no room for it.
BASE_RECORD = "finetune_base.json"


@dataclass(frozen=True)
class Place:
    """Where a model's files are."""

    base: Path
    adapter: Path | None = None


def resolve(where: str | Path) -> Place:
    """The base directory behind a name, and the adapter where the name is a run or an adapter directory.

    Raises FinetuneError when nothing of that name is there.
    """
    if str(where) == "nano":
        return Place(NANO)
    path = Path(where)
    if (path / "run.json").is_file():
        return _resolve_run(path)
    if (path / ADAPTER_FILE).is_file():
        return Place(resolve(adapter_base(path)).base, path)
    if (path / "config.json").is_file():
        return Place(path)
    if path.is_dir():
        sentence = "no model here: a model directory has config.json, a run has run.json, an adapter has"
        raise FinetuneError(f"{sentence} {ADAPTER_FILE}", at=str(path))
    return Place(_from_hub(str(where)))


def adapter_base(adapter: Path) -> str:
    """The base an adapter names: our record first, then PEFT's."""
    for file, key in ((BASE_RECORD, "where"), ("adapter_config.json", "base_model_name_or_path")):
        try:
            base = json.loads((adapter / file).read_text()).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if base:
            return str(base)
    raise FinetuneError("this adapter does not name its base; give the base's directory too", at=str(adapter))


def _resolve_run(run: Path) -> Place:
    try:
        base = json.loads((run / "run.json").read_text())["base"]["where"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FinetuneError("this run's run.json names no base model", at=str(run)) from None
    adapter = run / "adapter"
    return Place(resolve(base).base, adapter if (adapter / ADAPTER_FILE).is_file() else None)


def check_hub_id(name: str) -> None:
    """Raise FinetuneError for what cannot be the id of a model on the hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FinetuneError(f"there is no model {name}: no folder of that name, and no hub id (owner/name)")


def not_to_be_had(name: str) -> FinetuneError:
    """There is no such directory, and the hub is out of reach."""
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face hub cannot be reached"
    return FinetuneError(f"there is no model {name}: no folder of that name, not on this machine, and {why}")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    check_hub_id(name)
    try:
        # `original/` and `metal/` hold the same weights again in other layouts.
        return Path(snapshot_download(name, ignore_patterns=["original/*", "metal/*"]))
    except LocalEntryNotFoundError:
        raise not_to_be_had(name) from None
    except Exception as error:  # the hub, the network and the file system each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FinetuneError(f"there is no model {name}: no folder, and not on the hub ({reason})") from None
