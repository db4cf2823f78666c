"""Customise gpt-oss on the MXFP4 weights as released: recipe, data, model, train, evaluate, export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.model import load_model
    from finetune.recipe import load_recipe

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Found on first use, so that importing finetune takes no time."""
    if name == "load_model":
        from finetune.model import load_model

        return load_model
    if name == "load_recipe":
        from finetune.recipe import load_recipe

        return load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
