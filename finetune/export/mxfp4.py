"""A merged checkpoint in the released layout: experts rounded to MXFP4 again, so that what was learned stays.

The base's files are copied and overwritten where the adapter changes something, layer after layer. The
calibration conversations pass through every layer as the base, the tuned model and the export compute them,
and so do held-out conversations, which at the end tell what the rounding cost. After each layer the streams
are kept beside the files, where a merge that was killed finds them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export.calibrate import PROJECTIONS, round_to_nearest
from finetune.export.dialect import write_configs
from finetune.export.fitting import Change, fit_layer
from finetune.export.layerwise import Layer, Network
from finetune.export.merge import DENSE, Deltas
from finetune.export.passages import Passages
from finetune.export.progress import Progress, digest_of
from finetune.export.retention import measure
from finetune.export.streams import Walk
from finetune.export.subject import Subject
from finetune.export.tensors import as_bytes
from finetune.model.checkpoint import INDEX_FILE
from finetune.model.cpu_settings import fast_float32
from finetune.model.expert_layer import Factors

# Multiplications that one sweep of all weights may take for each of up to MOST_SWEEPS. gpt-oss-20b is left
# without: a sweep would take a quarter of its merge's time for a twentieth less of the layers' errors.
MOST_SWEEPS = 8
SWEEP_WORK = 5 * 10**13


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
    with torch.inference_mode(), fast_float32():
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
            self._write_dense(number, self._exact(number))
            self.experts_changed += round_to_nearest(layer.experts, factors)
            self._write_experts(number, layer, factors)
            self._keep(number, {})
        return {}

    def by_fitting(self, passages: Passages) -> dict[str, Any]:
        """Also measures: what `retention.measure` returns."""
        network, reached = self._network, self._reached
        walk = Walk.begin(network, passages)
        if reached:
            walk.resume(reached.streams)
        for number in self._layers_left():
            change = Change(self._exact(number), self._factors(number))
            fitted = fit_layer(network, number, change, walk, sweeps=_sweeps(network))
            self.experts_changed += fitted.changed
            self._write_dense(number, fitted.dense)
            self._write_experts(number, fitted.layer, change.factors)
            self._keep(number, walk.states())
            del change, fitted  # before the next layer is read
        figures = measure(network, passages.held_out, walk.held_out.at)
        return {**figures, "calibration_tokens": len(walk.calibration.learned())}

    def _factors(self, number: int) -> dict[str, Factors]:
        found = {n: self._deltas.experts(f"model.layers.{number}.mlp.experts.{n}") for n in PROJECTIONS}
        device = self._network.device
        return {n: Factors(f.a.to(device), f.b.to(device)) for n, f in found.items() if f is not None}

    def _exact(self, number: int) -> dict[str, Tensor]:
        """The merged weights, float32, by their names in the layer, of those that the adapter changes."""
        exact = {}
        for part in DENSE:
            name = f"model.layers.{number}.{part}"
            delta = self._deltas.dense(name)
            if delta is not None:
                exact[part] = self._network.checkpoint.read(name).float() + delta
        return {part: weights.to(self._network.device) for part, weights in exact.items()}

    def _write_dense(self, number: int, weights: Mapping[str, Tensor]) -> None:
        for part, weight in weights.items():
            name = f"model.layers.{number}.{part}"
            before = self._network.checkpoint.read(name)
            after = weight.cpu().to(before.dtype)
            self.dense_changed += int((after != before).sum())
            self._overwrite(name, after)

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


def _sweeps(network: Network) -> int:
    """Sweeps of coordinate descent that a model of this size leaves time for."""
    config = network.config
    hidden, inner = config.hidden_size, config.intermediate_size
    of_expert = 2 * inner * hidden**2 + hidden * inner**2
    of_all = of_expert * config.num_local_experts * config.num_hidden_layers
    return min(MOST_SWEEPS, int(SWEEP_WORK / of_all))
