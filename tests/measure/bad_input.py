"""Every mistake of `tests.mistakes`, and those that need a run, made with the real command: what it says.

    python -m tests.measure.bad_input [--only WORD] [--record]

Prints a table of commands, sentences and exit statuses, in red what is not as it should be. Full disks are
small tmpfs mounts, which only root can make.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.checkpoints import write_random_checkpoint
from tests.measure.conditions import record
from tests.mistakes import GOOD, MISTAKES, Mistake, file, rows
from tests.mistakes_of_exporting import MISTAKES_OF_EXPORTING
from tests.mistakes_of_serving import MISTAKES_OF_SERVING
from tests.mistakes_of_size import MISTAKES_OF_SIZE
from tests.train_helpers import write_project

RUN, ADAPTER = "runs/done", "runs/done/adapter"
PROGRAM = [sys.executable, "-c", "from finetune.cli import main; main()"]
SIZE = {"cache": "600k", "runs": "2m", "small": "160k"}
LONG_LINE = 200_000_000


def other_base(project: Path) -> None:
    shutil.rmtree(project / "base")
    write_random_checkpoint(project / "base", tokenizer="bytes", seed=5)


def no_adapter(project: Path) -> None:
    shutil.rmtree(project / ADAPTER)


def fewer_rows(project: Path) -> None:
    (project / "rows.jsonl").write_text("".join((project / "rows.jsonl").read_text().splitlines(True)[1:]))


def many_rows(project: Path) -> None:
    question = "How much is one and one and one and one and one and one and one?"
    chats = [
        {"messages": [{"role": "user", "content": f"{i}: {question}"}, GOOD["messages"][1]]}
        for i in range(9000)
    ]
    rows(*chats)(project)


# These begin with a finished run, whose directory is runs/done.
WITH_RUN = [
    Mistake(
        "run without an adapter",
        ("generate", RUN, "hi"),
        "runs/done: this run has no adapter yet; finetune train runs/done goes on with it",
        no_adapter,
    ),
    Mistake(
        "adapter of another base",
        ("generate", RUN, "hi"),
        "runs/done/adapter: this adapter was trained on other weights ('HERE/base') than those in HERE/base",
        other_base,
    ),
    Mistake(
        "adapter of another base",
        ("export", RUN, "--out", "out"),
        "HERE/runs/done/adapter: this adapter was trained on another base than HERE/base",
        other_base,
    ),
    Mistake(
        "corrupt adapter",
        ("generate", RUN, "hi"),
        "runs/done/adapter...: ...",
        file(f"{ADAPTER}/adapter_model.safetensors", b"\0" * 999),
    ),
    Mistake(
        "corrupt adapter",
        ("export", RUN, "--out", "out"),
        "HERE/runs/done/adapter: this adapter cannot be read: ...",
        file(f"{ADAPTER}/adapter_model.safetensors", b"\0" * 999),
    ),
    Mistake(
        "export is there",
        ("export", RUN, "--out", "base"),
        "HERE/base: this exists already; choose another folder or use --force to replace it",
    ),
    Mistake(
        "base is a run",
        ("train", "recipe.yaml", f"model.base={RUN}"),
        f"override model.base={RUN}: model.base: this names a tuned model; ...",
    ),
    Mistake(
        "data changed since",
        ("train", RUN, "train.max_steps=4"),
        "HERE/runs/done: the data changed since this run began, so it cannot go on: start a new run",
        fewer_rows,
    ),
    Mistake(
        "damaged checkpoint",
        ("train", RUN, "train.max_steps=4"),
        "HERE/runs/done/checkpoints/step-000002/state.json: this checkpoint cannot be read (...); "
        "remove its folder to go on from the one before",
        file(f"{RUN}/checkpoints/step-000002/state.json", "{}"),
    ),
    Mistake(
        "line of 200 MB",
        ("check", "recipe.yaml"),
        "rows.jsonl:1: this line is not JSON: ...",
        file("rows.jsonl", b"x" * LONG_LINE),
    ),
]

# The folder of this name is a disk with no more room than SIZE says.
FULL_DISK = {
    "cache": Mistake(
        "no space for prepared data",
        ("data", "recipe.yaml", "--rows", "0"),
        "cache: the data cache cannot be written: there is no space left for the prepared data "
        "(5 bytes a token)",
        many_rows,
    ),
    "runs": Mistake(
        "no space for a checkpoint",
        ("train", "recipe.yaml", "lora.rank=64"),
        "HERE/runs/...: the disk is full: this could not be saved, earlier checkpoints are as they were",
    ),
    "small": Mistake(
        "no space for an export",
        ("export", "base", "--to", "bf16", "--out", "small/out"),
        "HERE/small/out: no space is left on this disk; free some and run again",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What a command said, with the project's folder written HERE."""

    title: str
    command: str
    sentence: str
    status: int
    as_it_should_be: bool


def run(mistake: Mistake, project: Path, **environment: str) -> Outcome:
    """Type the command in the project's folder."""
    done = subprocess.run(
        [*PROGRAM, *mistake.words],
        cwd=project,
        env=surroundings(**environment),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return outcome(mistake, done.stderr, done.returncode, project)


def surroundings(**more: str) -> dict[str, str]:
    """The environment of a command; training runs in a process of its own, so by variables alone."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, **more}


def outcome(mistake: Mistake, said: str, status: int, project: Path) -> Outcome:
    right = mistake.matches(said, project) and status == mistake.status
    text = said.replace(str(project), "HERE").strip()
    text = text.splitlines()[-1] if mistake.status == 2 and text else text
    return Outcome(mistake.title, f"finetune {' '.join(mistake.words)}", text, status, right)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of `size` bytes at `place`."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def interrupted(project: Path) -> Outcome:
    """Ctrl-C while the data are prepared."""
    said = "interrupted; `finetune train HERE/runs/...` goes on"
    mistake = Mistake("Ctrl-C while data are prepared", ("train", "recipe.yaml"), said, many_rows)
    mistake.spoil(project)
    process = subprocess.Popen(
        [*PROGRAM, *mistake.words], cwd=project, env=surroundings(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not list(project.glob("runs/.cache/.tmp-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate()
    return outcome(mistake, text, process.returncode, project)


def outcomes(clean: Path, trained: Path, only: str) -> Iterator[Outcome]:
    """Each mistake in a copy of a project that works."""

    def wanted(mistakes: Sequence[Mistake]) -> list[Mistake]:
        return [mistake for mistake in mistakes if only in mistake.title]

    for mistake in wanted([*MISTAKES, *MISTAKES_OF_SIZE, *MISTAKES_OF_SERVING, *MISTAKES_OF_EXPORTING]):
        with copy(clean) as project:
            mistake.spoil(project)
            yield run(mistake, project)
    for mistake in wanted(WITH_RUN):
        with copy(trained) as project:
            mistake.spoil(project)
            yield run(mistake, project)
    if os.geteuid() == 0:
        for name, mistake in FULL_DISK.items():
            if mistake in wanted([mistake]):
                with copy(clean) as project, small_disk(project / name, SIZE[name]):
                    mistake.spoil(project)
                    yield run(mistake, project, FINETUNE_CACHE="cache")
    if only in "Ctrl-C":
        with copy(clean) as project:
            yield interrupted(project)


@contextmanager
def copy(project: Path) -> Iterator[Path]:
    """A copy of a project in which its own folder is named wherever the original was."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "project"
        shutil.copytree(project, place)
        for record_ in (
            *place.glob("runs/*/*.json"),
            *place.glob("runs/*/*.yaml"),
            *place.glob(f"{ADAPTER}/*.json"),
        ):
            record_.write_text(record_.read_text().replace(str(project), str(place)))
        yield place


def train_once(clean: Path, trained: Path) -> None:
    shutil.copytree(clean, trained)
    words = ["train", "recipe.yaml", "train.max_steps=2"]
    subprocess.run([*PROGRAM, *words], cwd=trained, env=surroundings(), check=True, stdout=subprocess.DEVNULL)
    (trained / "runs" / "latest").resolve().rename(trained / RUN)
    (trained / "runs" / "latest").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="mistakes with this in their title")
    parser.add_argument(
        "--record", action="store_true", help="keep the table in runs/reference/bad_input.json"
    )
    options = parser.parse_args()
    table = Table("mistake", "command", "what is said", "exit", show_lines=True)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        clean, trained = Path(folder) / "clean", Path(folder) / "trained"
        clean.mkdir()
        write_project(clean)
        train_once(clean, trained)
        for one in outcomes(clean, trained, options.only):
            found.append(one)
            table.add_row(
                one.title,
                one.command,
                one.sentence,
                str(one.status),
                style=None if one.as_it_should_be else "red",
            )
            print(f"{'ok ' if one.as_it_should_be else 'NO '} {one.title}", file=sys.stderr, flush=True)
    Console(width=200).print(table)
    wrong = sum(not one.as_it_should_be for one in found)
    print(f"{len(found)} mistakes, {wrong} of them not said as they should be")
    if options.record:
        figures = {
            "mistakes": len(found),
            "not as they should be": wrong,
            "table": [asdict(one) for one in found],
        }
        print(
            record("bad_input", "python -m tests.measure.bad_input --record", json.loads(json.dumps(figures)))
        )


if __name__ == "__main__":
    main()
