"""The bundled model: small, in the release's layout and dialect, and able to answer."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch

from finetune.chat.encode import HarmonyEncoder
from finetune.model import inspect_checkpoint, load_model, resolve
from finetune.nano.measure import solved
from finetune.nano.problem import EFFORTS
from finetune.nano.skills import BASE_SKILLS, problem
from finetune.nano.spec import load_spec
from finetune.nano.write import released_config

NANO = resolve("nano").base
ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((NANO / name).read_text(encoding="utf-8"))
    return content


def test_it_is_at_most_eight_megabytes() -> None:
    assert sum(file.stat().st_size for file in NANO.rglob("*") if file.is_file()) <= 8_000_000


def test_its_config_has_the_releases_keys_and_kinds_of_values(shared: Path) -> None:
    released = json.loads((shared / "released" / "gpt-oss-20b" / "config.json").read_text(encoding="utf-8"))
    ours = read("config.json")
    assert list(ours) == list(released)
    assert {key: type(value) for key, value in ours.items()} == {k: type(v) for k, v in released.items()}
    for key in ("rope_scaling", "quantization_config"):
        assert ours[key].keys() == released[key].keys()  # type: ignore[attr-defined]


def test_its_config_is_the_recipes() -> None:
    assert read("config.json") == released_config(
        load_spec(ROOT / "recipes" / "nano" / "pretrain.yaml").network
    )


def test_generation_stops_at_return_call_and_endoftext() -> None:
    encoder = HarmonyEncoder.from_dir(NANO)
    assert set(read("generation_config.json")["eos_token_id"]) == set(encoder.stop_ids)  # type: ignore[call-overload]


def test_its_tensors_are_named_as_the_releases_in_two_shards(shared: Path) -> None:
    index = json.loads(
        (shared / "released" / "gpt-oss-20b" / "model.safetensors.index.json").read_text(encoding="utf-8")
    )
    beyond = tuple(f"model.layers.{layer}." for layer in range(4, 24))
    released = {name for name in index["weight_map"] if not name.startswith(beyond)}
    ours = read("model.safetensors.index.json")["weight_map"]
    assert set(ours) == released  # type: ignore[call-overload]
    assert len(set(ours.values())) == 2  # type: ignore[attr-defined]
    inspect_checkpoint(NANO)


def test_it_solves_held_out_questions_of_its_base_skills() -> None:
    torch.set_num_threads(1)
    model, _ = load_model("nano", dtype=torch.float32)
    r = Random(11)
    asked = [(problem(r, family, held_out=True), effort) for family in BASE_SKILLS for effort in EFFORTS]
    right = solved(model, HarmonyEncoder.from_dir(NANO), asked)
    assert sum(right) >= 0.95 * len(right)
