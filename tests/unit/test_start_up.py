"""What starting up may import: commands are quick because of what they leave alone, whatever the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train_helpers import write_project

# Packages whose import is a matter of milliseconds, by what each kind of start needs.
FOR_ANY_HELP = {
    "annotated_doc", "annotated_types", "click", "finetune", "pydantic", "pydantic_core", "shellingham",
    "typer", "typing_extensions", "typing_inspection",
}  # fmt: skip
FOR_CHECK = FOR_ANY_HELP | {"numpy", "packaging", "pygments", "rich", "ruamel", "tokenizers"}
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from finetune.cli import app
result = CliRunner().invoke(app, sys.argv[1:])
packages = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(json.dumps([result.exit_code, result.output, sorted(p for p in packages if not p.startswith("_"))]))
"""


def packages_of(*words: str) -> set[str]:
    """Packages outside the standard library that a command has imported when it is over."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    status, output, packages = json.loads(done.stdout)
    assert status == 0, output
    return set(packages)


@pytest.mark.parametrize("words", [(), ("check",), ("train",), ("bench",), ("export",)])
def test_help_imports_next_to_nothing(words: tuple[str, ...]) -> None:
    assert packages_of(*words, "--help") <= FOR_ANY_HELP


@pytest.mark.parametrize("options", [(), ("--gpu", "h100-80", "--price", "2.5"), ("--json",)])
def test_check_needs_no_torch_to_find_out_and_to_predict(tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe = write_project(tmp_path)
    assert packages_of("check", str(recipe), *options) <= FOR_CHECK
