"""llama.cpp's server, started for real on a tuned nano: it answers as the tuned model does, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.errors import FinetuneError
from finetune.export import export
from finetune.manifest import MANIFEST
from finetune.model.places import NANO
from finetune.probe import read_probes
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from finetune.serve.launch import Address, commands, launch
from tests.export_kit import write_adapter

ADDRESS = Address(port=0, context=512)
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
    for text in ("5 + 14 = ?", "What is 8 times 7?", "Smallest number in 5, 89, 8, 11?", "Say hello.")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on nano, with an adapter that changes everything it says."""
    if not commands._llama_python_is_here():
        pytest.skip("needs llama-cpp-python[server]")
    folder = tmp_path_factory.mktemp("llama")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {
        "train": [{"path": str(folder / "rows.jsonl")}],
        "held_out": [{"path": str(folder / "rows.jsonl")}],
    }
    recipe = Recipe.model_validate({"name": "mine", "model": {"base": "nano"}, "data": data})
    made = RunDir.create(recipe, folder / "runs")
    made.update(base={"where": "nano"})
    write_adapter(made.adapter, NANO, rank=8, size=0.2)
    export(made.path, "gguf-lora", made.path / "export" / "gguf-lora")
    export("nano", "gguf", folder / "base")
    return made.path


def serve(export_dir: Path, base: Path) -> list[str]:
    said: list[str] = []

    def ready(url: str, models: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(str(export_dir), "llama.cpp", ADDRESS, base=str(base), emit=said.append, ready=ready)
    return said


def test_llama_cpp_answers_as_the_tuned_model(run: Path) -> None:
    said = serve(run, run.parents[1] / "base")
    assert said[-2].startswith("the adapter is in effect")
    probes = read_probes(json.loads((run / "export" / "gguf-lora" / MANIFEST).read_text()))
    assert probes and all(probe.base != probe.tuned for probe in probes)


def test_the_base_in_the_adapters_place_is_found_out(run: Path, tmp_path: Path) -> None:
    """A merge that is none: the base's GGUF, under a record that says it was tuned."""
    forged = tmp_path / "forged"
    shutil.copytree(run.parents[1] / "base", forged)
    record = json.loads((forged / MANIFEST).read_text())
    tuned = json.loads((run / "export" / "gguf-lora" / MANIFEST).read_text())
    (forged / MANIFEST).write_text(json.dumps({**record, "source": tuned["source"], "probe": tuned["probe"]}))
    with pytest.raises(FinetuneError, match="the adapter is not in effect"):
        launch(str(forged), "llama.cpp", ADDRESS, emit=print)
