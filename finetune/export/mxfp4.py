"""A merged checkpoint in the released layout: experts rounded to MXFP4 again, so that what was learned stays.

The base's files are copied and overwritten where the adapter changes something, layer after layer. The
calibration conversations pass through every layer twice, as the tuned model computes them and as the export
does; held-out conversations pass through the base as well, and at the end tell what the rounding cost. After
each layer the streams are kept beside the files, where a merge that was killed finds them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.data.packing import NOT_LEARNED
from finetune.errors import FinetuneError
from finetune.export.calibrate import PROJECTIONS, Rows, fit, round_to_nearest
from finetune.export.dialect import write_configs
from finetune.export.layerwise import Layer, Network, Passage
from finetune.export.merge import DENSE, Deltas
from finetune.export.passages import Passages
from finetune.export.progress import Progress, digest_of
from finetune.export.retention import measure
from finetune.export.subject import Subject
from finetune.export.tensors import as_bytes
from finetune.model.checkpoint import INDEX_FILE
from finetune.model.expert_layer import Factors

# What an error counts at a token whose successor is not learned; those matter through attention alone.
WEIGHT_NOT_LEARNED = 0.2


@dataclass
class Streams:
    """Residual streams by passage, `[L, H]` each, of the versions that are computed in step."""

    tuned: list[Tensor]
    export: list[Tensor]


@dataclass
class Walk:
    """All the streams between two layers."""

    NAMES: ClassVar = ("tuned", "export", "held-out tuned", "held-out export", "held-out base")

    calibration: Streams
    held_out: Streams
    base: list[Tensor]  # the held-out passages through the base

    @classmethod
    def begin(cls, network: Network, passages: Passages) -> Walk:
        first = [network.embed(p) for p in passages.calibration]
        held_out = [network.embed(p) for p in passages.held_out]
        return cls(Streams(first, list(first)), Streams(held_out, list(held_out)), list(held_out))

    @classmethod
    def resume(cls, streams: Mapping[str, list[Tensor]], device: torch.device) -> Walk:
        tuned, export, held_tuned, held_export, base = (
            [one.to(device) for one in streams[name]] for name in cls.NAMES
        )
        return cls(Streams(tuned, export), Streams(held_tuned, held_export), base)

    def streams(self) -> dict[str, list[Tensor]]:
        here, held_out = self.calibration, self.held_out
        values = (here.tuned, here.export, held_out.tuned, held_out.export, self.base)
        return dict(zip(self.NAMES, values, strict=True))


def write_mxfp4(
    subject: Subject, folder: Path, passages: Passages | None, *, kept_at_least: float
) -> dict[str, Any]:
    """Write the merged checkpoint's files into `folder`; returns the figures of the proof.

    Without `passages` every weight is rounded to the nearest value, and nothing is measured.

    Raises:
        FinetuneError: the base is not MXFP4, nothing of the adapter is left after rounding, or less than
            `kept_at_least` of the gain on held-out conversations is.
    """
    tuned = subject.tuned
    assert tuned is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network(subject.base.path, device)
    if network.checkpoint.info.kind != "mxfp4":
        raise FinetuneError("the base's experts are not MXFP4; export bf16", at=subject.base.name)
    _copy_weights(network, folder)
    digest = digest_of([passages.calibration, passages.held_out] if passages else [])
    progress = Progress(folder, digest)
    with torch.inference_mode():
        merge = _Merge(network, Deltas(tuned.adapter, network.config.num_local_experts), folder, progress)
        kept = merge.by_rounding() if passages is None else merge.by_fitting(passages)
    progress.remove()
    if tuned.adapter.learns_experts and not merge.experts_changed:
        raise FinetuneError(
            "the adapter's changes of the experts vanish in MXFP4: the export would equal the base; "
            "serve the adapter instead (--to adapter)"
        )
    if kept:
        _check_kept(kept, kept_at_least)
    write_configs(subject.base.path, network.checkpoint.config, folder, packed=True)
    facts = {
        "rounding": "fitted to conversations"
        if passages
        else "to the nearest value, for want of conversations",
        "expert_values_changed": merge.experts_changed,
        "dense_values_changed": merge.dense_changed,
    }
    return {
        **facts,
        **({"conversations": passages.what} if passages else {}),
        **({"kept": kept} if kept else {}),
    }


def _copy_weights(network: Network, folder: Path) -> None:
    """Copies of the base's shards, under the same names, but for those that a killed merge has made."""
    source = network.checkpoint.info.path
    for file in sorted({place.file for place in network.checkpoint.info.tensors.values()}):
        if not (folder / file.name).is_file():
            part = folder / f"{file.name}.part"
            shutil.copyfile(file, part)
            part.rename(folder / file.name)
    if (source / INDEX_FILE).is_file():
        shutil.copyfile(source / INDEX_FILE, folder / INDEX_FILE)


def _check_kept(kept: Mapping[str, Any], at_least: float) -> None:
    """`gain_kept`, or `change_kept` where the tuned model gains nothing on the held-out conversations."""
    name = "gain" if kept["gain_kept"] is not None else "change"
    share = kept[f"{name}_kept"]
    if share is not None and share < at_least:
        raise FinetuneError(
            f"rounding to MXFP4 keeps {share:.1%} of the adapter's {name} on held-out conversations, not "
            f"{at_least:.0%}; serve the adapter instead (--to adapter), or accept less with --kept-at-least"
        )


class _Merge:
    """The walk through the layers."""

    def __init__(self, network: Network, deltas: Deltas, folder: Path, progress: Progress) -> None:
        self._network, self._deltas, self._folder = network, deltas, folder
        self._progress, self._reached = progress, progress.reached()
        counts = self._reached.counts if self._reached else {}
        self.experts_changed = counts.get("experts", 0)
        self.dense_changed = counts.get("dense", 0)

    def _layers_left(self) -> range:
        """A layer that was begun and not finished is done anew, and written over."""
        reached = self._reached.layers if self._reached else 0
        return range(reached, self._network.config.num_hidden_layers)

    def _keep(self, number: int, streams: Mapping[str, list[Tensor]]) -> None:
        counts = {"experts": self.experts_changed, "dense": self.dense_changed}
        self._progress.keep(number + 1, counts, streams)

    def by_rounding(self) -> dict[str, Any]:
        """Measures nothing: there is nothing to measure on."""
        for number in self._layers_left():
            layer, factors = self._network.layer(number), self._factors(number)
            self._dense(number)
            self.experts_changed += round_to_nearest(layer.experts, factors)
            self._write_experts(number, layer, factors)
            self._keep(number, {})
        return {}

    def by_fitting(self, passages: Passages) -> dict[str, Any]:
        """Also measures: what `retention.measure` returns."""
        network, held_out = self._network, passages.held_out
        reached = self._reached
        walk = Walk.resume(reached.streams, network.device) if reached else Walk.begin(network, passages)
        calibration, measured = walk.calibration, walk.held_out
        learned = torch.cat([p.targets for p in passages.calibration]) != NOT_LEARNED
        for number in self._layers_left():
            layer, factors = network.layer(number), self._factors(number)
            walk.base = [layer.finish(s, {}) for s in _attend(layer, walk.base, held_out)]
            merged, rounded = self._dense(number)
            layer.replace(merged)
            before = _attend(layer, calibration.tuned, passages.calibration)
            calibration.tuned = [layer.finish(s, factors) for s in before]
            measured.tuned = [layer.finish(s, factors) for s in _attend(layer, measured.tuned, held_out)]
            layer.replace(rounded)
            export = _attend(layer, calibration.export, passages.calibration)
            self.experts_changed += _fit(layer, factors, Streams(before, export), learned)
            self._write_experts(number, layer, factors)
            calibration.export = [layer.finish(s, {}) for s in export]
            measured.export = [layer.finish(s, {}) for s in _attend(layer, measured.export, held_out)]
            self._keep(number, walk.streams())
        states = {"base": walk.base, "tuned": measured.tuned, "export": measured.export}
        return {**measure(network, held_out, states), "calibration_tokens": len(learned)}

    def _factors(self, number: int) -> dict[str, Factors]:
        found = {n: self._deltas.experts(f"model.layers.{number}.mlp.experts.{n}") for n in PROJECTIONS}
        device = self._network.device
        return {n: Factors(f.a.to(device), f.b.to(device)) for n, f in found.items() if f is not None}

    def _dense(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A layer's merged dense weights by their names in it, float32: exact, and as they were written."""
        exact, rounded = {}, {}
        for part in DENSE:
            name = f"model.layers.{number}.{part}"
            delta = self._deltas.dense(name)
            if delta is not None:
                before = self._network.checkpoint.read(name)
                exact[part] = before.float() + delta
                after = exact[part].to(before.dtype)
                self.dense_changed += int((after != before).sum())
                self._overwrite(name, after)
                rounded[part] = after.float()
        return exact, rounded

    def _write_experts(self, number: int, layer: Layer, factors: Mapping[str, Factors]) -> None:
        for part in factors:
            name = f"model.layers.{number}.mlp.experts.{part}"
            self._overwrite(f"{name}_blocks", layer.experts.get_parameter(part))
            self._overwrite(f"{name}_scales", layer.experts.get_parameter(f"{part}_scales"))

    def _overwrite(self, name: str, tensor: Tensor) -> None:
        place = self._network.checkpoint.info.tensors[name]
        with (self._folder / place.file.name).open("r+b") as file:
            file.seek(place.start)
            file.write(as_bytes(tensor.detach().cpu()))


def _attend(layer: Layer, states: Sequence[Tensor], passages: Sequence[Passage]) -> list[Tensor]:
    return [layer.attend(state, passage) for state, passage in zip(states, passages, strict=True)]


def _fit(layer: Layer, factors: Mapping[str, Factors], streams: Streams, learned: Tensor) -> int:
    """Fit the layer's experts to the streams past attention; returns how many packed values changed.

    `learned [T]` says for each token whether its successor is learned.
    """
    if not factors:
        return 0
    tuned, export = torch.cat(streams.tuned), torch.cat(streams.export)
    indices, scores = layer.route(layer.normed(export))
    counts = torch.where(learned.to(scores.device), 1.0, WEIGHT_NOT_LEARNED)

    def routed(expert: int) -> Rows:
        token, place = torch.where(indices == expert)
        # The layer's output is off by score times the expert's error.
        weight = counts[token] * scores[token, place].square()
        missing = tuned[token] - export[token]
        return Rows(layer.normed(tuned[token]), layer.normed(export[token]), missing, weight / weight.sum())

    return fit(layer.experts, factors, routed)
