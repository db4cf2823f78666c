"""The recipe of nano itself (`recipes/nano/pretrain.yaml`): strict and typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.errors import FinetuneError
from finetune.nano.skills import KINDS


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NetworkSpec(Strict):
    """Sizes of the network; hidden and intermediate are multiples of 32, the block of MXFP4."""

    hidden_size: int = Field(multiple_of=32, gt=0)
    layers: int = Field(gt=0)
    experts: int = Field(gt=0)
    experts_per_token: int = Field(gt=0)
    intermediate_size: int = Field(multiple_of=32, gt=0)
    head_dim: int = Field(gt=0)
    heads: int = Field(gt=0)
    key_value_heads: int = Field(gt=0)
    sliding_window: int = Field(gt=0)
    rope_theta: int = Field(gt=0)
    rope_original_positions: int = Field(gt=0)
    rope_factor: float = Field(ge=1)
    initial_std: float = Field(gt=0)


class TokenizerSpec(Strict):
    """`common` is a file of words beside the recipe."""

    rows: int = Field(gt=0)
    common: str


class TrainingSpec(Strict):
    steps: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    decay: float = Field(ge=0, le=1)
    rounded: float = Field(ge=0, le=1)
    weight_decay: float = Field(ge=0)
    router_aux_loss: float = Field(ge=0)
    save_every_steps: int = Field(gt=0)
    threads: int = Field(gt=0)


class MeasureSpec(Strict):
    questions: int = Field(gt=0)


class PretrainSpec(Strict):
    seed: int
    out: str
    network: NetworkSpec
    tokenizer: TokenizerSpec
    families: dict[str, float]
    training: TrainingSpec
    measure: MeasureSpec

    @field_validator("families")
    @classmethod
    def known(cls, families: dict[str, float]) -> dict[str, float]:
        for name in families:
            if name not in KINDS:
                raise ValueError(f"{name} is not a family of questions; there are {', '.join(KINDS)}")
        return families


def load_spec(path: Path) -> PretrainSpec:
    """Read and check a pretraining recipe; FinetuneError names the file and every key that is wrong."""
    try:
        content: Any = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        return PretrainSpec.model_validate(content)
    except (OSError, YAMLError) as error:
        raise FinetuneError(f"this recipe cannot be read: {error}", at=str(path)) from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise FinetuneError(wrong, at=str(path)) from None
