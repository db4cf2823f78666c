"""A recipe says what to train: YAML in, one checked and frozen `Recipe` out."""

from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.paths import require_files
from finetune.recipe.specs import (
    DataSpec,
    EvalSpec,
    ExportSpec,
    LoraSpec,
    ModelSpec,
    Recipe,
    Source,
    Task,
    TrackingSpec,
    TrainSpec,
)

__all__ = [
    "DataSpec",
    "EvalSpec",
    "ExportSpec",
    "LoraSpec",
    "ModelSpec",
    "Recipe",
    "Source",
    "Task",
    "TrackingSpec",
    "TrainSpec",
    "dump_recipe",
    "load_recipe",
    "require_files",
]
