"""The cache of tokenised data is whole or not there, and never stale."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.data import cache, prepare, prepare_data
from finetune.errors import FinetuneError
from tests.data_kit import byte_encoder, chat, recipe, write_rows

ROWS = [chat(f"question {number}", f"answer {number}") for number in range(50)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", ROWS)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one whenever rows are tokenised rather than read from the cache."""
    calls: list[int] = []
    original = prepare._chunks

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(prepare, "_chunks", counted)
    yield calls


def tokens(file: Path, place: Path, **data: Any) -> list[list[int]]:
    prepared = prepare_data(recipe(file, **data), byte_encoder(), cache_dir=place)
    return [example.ids.tolist() for part in (prepared.train, prepared.held_out) for example in part]


def test_rows_are_tokenised_once(file: Path, tmp_path: Path, made: list[int]) -> None:
    first = tokens(file, tmp_path / "c")
    assert tokens(file, tmp_path / "c") == first
    assert len(made) == 1


@pytest.mark.parametrize("data", [{"learn": "final_only"}, {"analysis": False}, {"reasoning_effort": "high"}])
def test_other_settings_are_another_entry(
    file: Path, tmp_path: Path, made: list[int], data: dict[str, Any]
) -> None:
    tokens(file, tmp_path / "c")
    tokens(file, tmp_path / "c", **data)
    assert len(made) == 2


def test_other_rows_in_the_same_file_are_another_entry(file: Path, tmp_path: Path, made: list[int]) -> None:
    tokens(file, tmp_path / "c")
    write_rows(file, ROWS[1:])
    assert len(tokens(file, tmp_path / "c")) == 49
    assert len(made) == 2


def test_the_share_that_is_held_out_is_no_reason_to_tokenise_again(
    file: Path, tmp_path: Path, made: list[int]
) -> None:
    tokens(file, tmp_path / "c", held_out=0.1)
    tokens(file, tmp_path / "c", held_out=0.3)
    assert len(made) == 1


@pytest.mark.parametrize("name", ["ids.bin", "learn.bin", "lengths.bin", "keys.bin", "entry.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_again(
    file: Path, tmp_path: Path, made: list[int], name: str, harm: str
) -> None:
    whole = tokens(file, tmp_path / "c")
    (entry,) = (tmp_path / "c").iterdir()
    content = bytearray((entry / name).read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 0xFF
    if harm == "remove":
        (entry / name).unlink()
    else:
        (entry / name).write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    assert tokens(file, tmp_path / "c") == whole
    assert len(made) == 2
    assert tokens(file, tmp_path / "c") == whole
    assert len(made) == 2


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, {}])
    with pytest.raises(FinetuneError):
        tokens(file, tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_nothing_is_kept_without_the_cache(file: Path, tmp_path: Path) -> None:
    assert len(tokens(file, tmp_path / "c", cache=False)) == 50
    assert not (tmp_path / "c").exists()


def test_two_processes_that_prepare_at_once_end_with_one_entry(file: Path, tmp_path: Path) -> None:
    with cache.new_entry(tmp_path / "c", "entry") as slow:
        with cache.new_entry(tmp_path / "c", "entry") as quick:
            write_entry(quick, file)
        write_entry(slow, file)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["entry"]
    assert cache.read(tmp_path / "c" / "entry") is not None


def write_entry(folder: Path, file: Path) -> None:
    found = recipe(file)
    cache.write(folder, prepare._chunks(found.data.train, found.data, byte_encoder(), None))


KILLED = """
import sys, time
from pathlib import Path
from finetune.data import cache
with cache.new_entry(Path(sys.argv[1]), "entry") as folder:
    (folder / "ids.bin").write_bytes(b"half")
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_entry_and_its_remains_are_removed_later(
    tmp_path: Path, file: Path
) -> None:
    place = tmp_path / "c"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(place)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (remains,) = place.iterdir()
    assert remains.name.startswith(".tmp-")
    tokens(file, place)
    assert remains.exists(), "it might be another process at work"
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(remains, (long_ago, long_ago))
    tokens(file, place, learn="final_only")
    assert not remains.exists()


def test_a_full_disk_is_one_sentence(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write", full)
    with pytest.raises(FinetuneError, match="there is no space left for the prepared data"):
        tokens(file, tmp_path / "c")


def test_a_place_that_cannot_be_written_is_one_sentence(file: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file, not a folder")
    with pytest.raises(FinetuneError, match="the data cache cannot be written: "):
        tokens(file, tmp_path / "c")
