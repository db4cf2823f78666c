"""The keys of a recipe: their types, bounds and defaults.

Every section is strict (no text where a number belongs), closed (no unknown keys) and frozen.
`finetune.recipe.sentences` turns what pydantic finds wrong into sentences with file and line.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from finetune.recipe.places import Tree

Shape = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "question_answer"]
Learn = Literal["last_turn", "all_turns", "final_only"]
Target = Literal["attention", "experts", "router"]

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


def mistake(key: str, sentence: str) -> PydanticCustomError:
    """An error that a check over several keys raises, pointing at the dotted `key` below the section."""
    return PydanticCustomError("mistake", "{sentence}", {"key": key, "sentence": sentence})


class Spec(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSpec(Spec):
    """The base model. `dense` is the dtype of attention and embeddings and of the computation.

    For GPUs short of memory: `dense: nf4` keeps attention in NF4 and the embedding on the host, and computes
    in bf16; `experts_on: host` keeps the experts in host memory and brings them a few at a time.
    """

    base: Text
    dense: Literal["bf16", "float32", "nf4"] = "bf16"
    experts_on: Literal["device", "host"] = "device"

    @property
    def computes_in(self) -> Literal["bf16", "float32"]:
        return "bf16" if self.dense == "nf4" else self.dense


class LoraSpec(Spec):
    """The adapter. Its effect is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`."""

    rank: Count = 16
    alpha: Positive = 32.0
    targets: Annotated[list[Target], Field(min_length=1)] = ["attention", "experts"]
    rslora: bool = False


class Source(Spec):
    """Rows in a file (or folder) or in a hub data set.

    `columns` maps our names to those of the rows, as in `{question: prompt, answer: reply}`; `system` is put
    in front of every conversation as developer instructions.
    """

    path: Text | None = None
    hub: Text | None = None
    split: Text = "train"
    config: Text | None = None
    shape: Shape = "auto"
    columns: dict[str, str] = {}
    system: str | None = None
    limit: Count | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise mistake("path", "a source needs exactly one of path (a file) and hub (a data set's id)")
        return self


def _as_sources(value: Any) -> Any:
    """Let a path stand for a source: `held_out: data/test.jsonl`, `train: [a.jsonl, b.jsonl]`."""
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[list[Source], Field(min_length=1), BeforeValidator(_as_sources)]
HeldOut = Annotated[
    Annotated[Share, Tag("share")] | Annotated[Sources, Tag("sources")],
    Discriminator(lambda value: "sources" if isinstance(value, str | dict | list) else "share"),
]


class DataSpec(Spec):
    """What is learned from, and how rows become examples.

    `held_out` is a share of the train rows or sources of its own; `analysis: false` leaves the thinking out;
    `reasoning_effort` and `current_date` count where a row gives none; `workers` null: four, if they pay.
    """

    train: Sources
    held_out: HeldOut = 0.05
    learn: Learn = "last_turn"
    analysis: bool = True
    max_tokens: Count = 4096
    too_long: Literal["stop", "drop", "truncate"] = "stop"
    bad_rows: Literal["stop", "skip"] = "stop"
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    current_date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    streaming: bool = False
    cache: bool = True
    workers: Count | None = None


class TrainSpec(Spec):
    """The optimisation. `tokens_per_step` counts over all processes; `warmup` is a share of the steps.

    `profile` records a few steps and where their time and memory went; `force_memory` trains even where the
    memory that is free is predicted not to do. `offload_activations` moves what a GPU keeps for backward to
    the host; `paged_adamw_8bit` lets its moments go there when memory is short. `keep_attention`: so many of
    the layers with full attention keep its result instead of computing it again, for long documents.
    """

    epochs: Positive = 1.0
    max_steps: Count | None = None
    tokens_per_step: Count = 65536
    tokens_per_pass: Count | None = None
    learning_rate: Positive = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.03
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    save_every_steps: Count = 200
    keep_checkpoints: Count = 2
    eval_every_steps: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    gradient_checkpointing: bool = True
    offload_activations: bool = False
    keep_attention: Annotated[int, Field(ge=0)] = 0
    router_aux_loss: NotNegative = 0.0
    verify_frozen: bool = False
    profile: bool = False
    force_memory: bool = False


class Task(Spec):
    """Questions and answers, an answer being a row's last final; `path: held_out` takes the held-out rows."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    path: Text
    metric: Literal["exact_match", "number", "tool_call"] = "exact_match"
    limit: Count | None = None
    shape: Shape = "auto"
    columns: dict[str, str] = {}
    system: str | None = None

    def source(self) -> Source:
        """The rows of a task that names a file."""
        return Source(
            path=self.path, shape=self.shape, columns=self.columns, system=self.system, limit=self.limit
        )


class EvalSpec(Spec):
    """The comparison of base and tuned model; no tasks, no comparison. Temperature 0 decodes greedily."""

    tasks: list[Task] = []
    batch_size: Count = 32
    max_new_tokens: Count = 512
    seed: Annotated[int, Field(ge=0)] = 0
    temperature: NotNegative = 0.0

    @model_validator(mode="after")
    def _names_differ(self) -> EvalSpec:
        """Results are filed under the task's name, so two tasks of one name would overwrite each other."""
        for name, times in Counter(task.name for task in self.tasks).items():
            if times > 1:
                raise mistake("tasks", f"{times} tasks are called {name!r}; each needs a name of its own")
        return self


class ExportSpec(Spec):
    """The formats that are written after training; an empty list writes none."""

    formats: list[Literal["adapter", "bf16", "mxfp4", "gguf", "gguf-lora", "openai", "sglang-lora"]] = [
        "adapter"
    ]


class TrackingSpec(Spec):
    """Weights & Biases: off, kept in the run directory, or sent."""

    wandb: Literal["off", "offline", "online"] = "off"
    project: Text = "finetune"


class Recipe(Spec):
    """A whole recipe. Paths in a loaded recipe are absolute."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    method: Literal["sft"] = "sft"
    model: ModelSpec
    lora: LoraSpec = LoraSpec()
    data: DataSpec
    train: TrainSpec = TrainSpec()
    eval: EvalSpec = EvalSpec()
    export: ExportSpec = ExportSpec()
    tracking: TrackingSpec = TrackingSpec()

    _source: Path | None = PrivateAttr(default=None)
    _tree: Tree | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keys_agree(self) -> Recipe:
        given = self.train.tokens_per_pass
        if given is not None and given < self.data.max_tokens:
            sentence = (
                f"a pass of {given} tokens cannot hold an example of data.max_tokens ({self.data.max_tokens})"
            )
            raise mistake("train.tokens_per_pass", sentence)
        if self.data.held_out == 0:
            for index, task in enumerate(self.eval.tasks):
                if task.path == "held_out":
                    raise mistake(
                        f"eval.tasks.{index}.path", "there are no held-out rows: data.held_out is 0"
                    )
        if "sglang-lora" in self.export.formats and "router" in self.lora.targets:
            raise mistake("export.formats", "SGLang has no LoRA on the router, which lora.targets names")
        return self

    @property
    def source(self) -> Path | None:
        """The file that the recipe was loaded from; None for one made in Python."""
        return self._source

    def at(self, *key: str | int) -> str | None:
        """Where a key was written, as `file:line` or `override key=value`; at("data", "train", 0, "path").

        A key that was left to its default gives the place of the nearest section that was written.
        """
        place = self._tree.place(key) if self._tree else None
        return str(place) if place else None

    @property
    def tokens_per_pass(self) -> int:
        """Length of one packed sequence, hence of one forward pass on one process.

        Unless the recipe says, 8192 tokens: enough to fill the grouped GEMMs of a 32-expert layer, and small
        enough that activations stay a minor part of the memory.
        """
        return self.train.tokens_per_pass or max(self.data.max_tokens, min(self.train.tokens_per_step, 8192))

    def __eq__(self, other: object) -> bool:
        """Equal when every key is; where the recipe was read from does not count."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]
