"""Rows from files and hub data sets, each with the place it came from.

Files: `.jsonl` / `.ndjson`, `.json` (a list, an object with one list of objects, or JSON lines), `.csv`,
`.parquet`; all but parquet also with `.gz` behind. A folder or a glob stands for the files of these kinds in
it, sorted by name.
"""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.recipe import Source


_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read. `line` is the line of the file where it starts, or its number in a file without lines.

    A row that cannot be read has a `problem` and no value: whether it stops the run is the recipe's choice.
    """

    value: dict[str, Any]
    at: str
    line: int
    problem: str = ""


def read_rows(source: Source, *, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source in order, at most `source.limit`; `streaming` leaves a hub data set on the hub.

    Raises:
        FinetuneError: nothing is there, or it is of no known kind, empty, or not readable at all.
    """
    rows = _hub_rows(source, streaming) if source.hub else _all_files(str(source.path))
    return itertools.islice(rows, source.limit)


def source_files(path: str) -> list[Path]:
    """The files that a path, folder or glob stands for.

    Raises:
        FinetuneError: there are none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file() and _kind(file) in _READERS)
        if not found:
            raise FinetuneError(f"this folder has no {_KINDS} file in it", at=shown(place))
        return found
    if found := sorted(Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file()):
        return found
    raise FinetuneError("there is no such data file", at=shown(place))


def shown(path: Path) -> str:
    """A path as a person would type it: relative to the current folder when it is inside."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _all_files(path: str) -> Iterator[Row]:
    for file in source_files(path):
        yield from _file_rows(file)


def _file_rows(file: Path) -> Iterator[Row]:
    kind = _kind(file)
    if kind not in _READERS:
        raise FinetuneError(f"cannot tell what kind of file this is; known are {_KINDS}", at=shown(file))
    empty = True
    try:
        for row in _READERS[kind](file):
            empty = False
            yield row
    except (OSError, EOFError, zlib.error) as error:
        raise FinetuneError(f"this file cannot be read: {error}", at=shown(file)) from error
    if empty:
        raise FinetuneError("this file has no rows", at=shown(file))


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        if suffixes[-1:] == [".parquet"]:
            return ""
    return suffixes[-1] if suffixes else ""


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _json_lines(file: Path) -> Iterator[Row]:
    name = shown(file)
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield _parsed(line, name, number)


def _parsed(line: bytes, file: str, number: int) -> Row:
    at = f"{file}:{number}"
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return Row({}, at, number, "this line is not UTF-8 text")
    except RecursionError:
        return Row({}, at, number, "this row is nested too deep")
    except ValueError as error:
        return Row({}, at, number, f"this line is not JSON: {_reason(error)}")
    return _as_row(value, at, number)


def _as_row(value: Any, at: str, number: int) -> Row:
    if not isinstance(value, dict):
        return Row({}, at, number, f"a row must be a JSON object, not {_json_name(value)}")
    return Row(value, at, number)


def _json_rows(file: Path) -> Iterator[Row]:
    """The elements of a JSON file. Decoding them one by one tells the line of each, and where the text breaks
    off.
    """
    with _open(file) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FinetuneError("this file is not UTF-8 text", at=shown(file)) from None
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _elements(text, start, file)
        return
    if start == len(text):
        return
    decoder = json.JSONDecoder()
    try:
        value, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise _broken(error, file) from None
    if _skip(text, end) < len(text):
        yield from _json_lines(file)
    elif (rows := _only_list(value)) is not None:
        name = shown(file)
        yield from (_as_row(row, f"{name}: row {number}", number) for number, row in enumerate(rows, 1))
    else:
        yield _as_row(value, f"{shown(file)}:{text.count(chr(10), 0, start) + 1}", 1)


def _elements(text: str, start: int, file: Path) -> Iterator[Row]:
    decoder, name, line, counted = json.JSONDecoder(), shown(file), 1, 0
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken(error, file) from None
        yield _as_row(value, f"{name}:{line}", line)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            at = f"{name}:{1 + text.count(chr(10), 0, position)}"
            raise FinetuneError("this file is not JSON: a comma or the end of the list is missing", at=at)


def _skip(text: str, position: int) -> int:
    """The next position that is not JSON white space."""
    space = _SPACE.match(text, position)
    return space.end() if space else position


def _only_list(value: Any) -> list[Any] | None:
    """The rows of `{"data": [...]}`; a list of messages is no list of rows, so one conversation stays one."""
    if not isinstance(value, dict):
        return None
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) == 1 and lists[0] and all(isinstance(row, dict) for row in lists[0]):
        return None if {"role", "from"} & set(lists[0][0]) else lists[0]
    return None


def _broken(error: ValueError | RecursionError, file: Path) -> FinetuneError:
    if isinstance(error, RecursionError):
        return FinetuneError("this file is nested too deep", at=shown(file))
    line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    return FinetuneError(f"this file is not JSON: {_reason(error)}", at=f"{shown(file)}{line}")


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "a number in it is too long"  # the one other thing that Python's reader refuses


def _json_name(value: object) -> str:
    names: dict[type, str] = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _csv_rows(file: Path) -> Iterator[Row]:
    # The module's default limit of 128 KiB a field is below the length of a long conversation.
    csv.field_size_limit(sys.maxsize)
    name, start = shown(file), 1
    with TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            start = reader.line_num + 1
            for cells in reader:
                at = f"{name}:{start}"
                if cells and len(cells) != len(header):
                    problem = f"this row has {len(cells)} columns and the header has {len(header)}"
                    yield Row({}, at, start, problem)
                elif cells:
                    yield Row(dict(zip(header, cells, strict=True)), at, start)
                start = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise FinetuneError(f"this file is not CSV in UTF-8: {error}", at=f"{name}:{start}") from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    name, number = shown(file), 0
    try:
        # A batch is held as Python objects: 256 rows of a long context are some tens of MB.
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield Row(_columns(value), f"{name}: row {number}", number)
    except pyarrow.ArrowException as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise FinetuneError(f"this file is not parquet: {reason}", at=name) from None


def _hub_rows(source: Source, streaming: bool) -> Iterator[Row]:
    name, number = f"{source.hub} ({source.split})", 0
    rows = load_hub(source, streaming)
    try:
        for number, value in enumerate(rows, 1):
            yield Row(_columns(value), f"{name}: row {number}", number)
    except Exception as error:  # as in `load_hub`: a streamed data set is fetched while it is read
        raise _hub_error(source, error) from error
    if not number:
        raise FinetuneError("this data set has no rows", at=name)


def load_hub(source: Source, streaming: bool) -> Any:
    """The `datasets` object of a hub source; code from the hub is never run.

    Raises:
        FinetuneError: it cannot be had, with the first line of the reason.
    """
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.config, split=source.split, streaming=streaming)
    except Exception as error:  # the hub, the network, the file system and Arrow each raise their own
        raise _hub_error(source, error) from error


def hub_identity(source: Source) -> dict[str, Any]:
    """What a hub source's rows depend on: the files (with their revision) that its data set is built from."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.hub, source.config)
    except Exception as error:  # as in `load_hub`
        raise _hub_error(source, error) from error
    return {"data_set": builder.dataset_name, "config": builder.config_id, "code": builder.hash}


def _hub_error(source: Source, error: Exception) -> FinetuneError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return FinetuneError(f"this data set cannot be loaded: {reason}", at=source.hub)


def _columns(value: dict[str, Any]) -> dict[str, Any]:
    """A row of a columnar file: its columns stay, null or not, so that a mapped one can be told from none."""
    return {key: _without_nulls(item) for key, item in value.items()}


def _without_nulls(value: Any) -> Any:
    """Columnar files give every struct all the keys that any row has; those that a row lacks come back as
    null.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
_KINDS = ".jsonl, .json, .csv, .parquet (also .jsonl.gz, .json.gz, .csv.gz)"
