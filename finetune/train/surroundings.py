"""What the libraries around us say and load, set before they are imported."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from finetune.recipe import Recipe

# Names a file that training makes once it listens to Ctrl-C.
LISTENS = "FINETUNE_LISTENS"

_TALKATIVE = ("accelerate", "bitsandbytes", "datasets", "torch", "torchao", "transformers", "trl")


def set_up_wandb(recipe: Recipe, run: Path) -> None:
    """Tell W&B through its environment where to put the run; with "off" its package is not even imported.

    transformers and trl import wandb wherever it is installed, so this comes before them.
    """
    if recipe.tracking.wandb == "off":
        if "wandb" not in sys.modules:
            # Python's own way to say "not to be had": find_spec and import both stop at the None.
            sys.modules["wandb"] = None  # type: ignore[assignment]
        return
    os.environ.update(
        WANDB_MODE=recipe.tracking.wandb,
        WANDB_DIR=str(run),
        WANDB_PROJECT=recipe.tracking.project,
        WANDB_SILENT="true",
        WANDB_LOG_MODEL="false",
        WANDB_WATCH="false",
    )


def wanted_packages(recipe: Recipe) -> dict[str, tuple[str, str, str]]:
    """Packages that only some recipes need, each with the section, key and value that ask for it."""
    wanted = {}
    if recipe.model.dense == "nf4":
        wanted["bitsandbytes"] = ("model", "dense", "nf4")
    elif recipe.train.optimizer != "adamw":
        wanted["bitsandbytes"] = ("train", "optimizer", recipe.train.optimizer)
    if recipe.tracking.wandb != "off":
        wanted["wandb"] = ("tracking", "wandb", recipe.tracking.wandb)
    return wanted


def quieten() -> None:
    """Keep the libraries' notices and bars off the screen; errors still show, --debug shows everything."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # torch's C++ parts and its profiler write past Python's logging.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_TALKATIVE)}|peft)(\..*)?$")
