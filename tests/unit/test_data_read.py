"""Rows are read from every kind of file with the place they came from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data import Row, read_rows
from finetune.errors import FinetuneError
from finetune.recipe import Source

ROWS = [{"question": "a", "answer": "b"}, {"question": "c\nd", "answer": 'e,"f"'}]


def rows_of(path: Path | str, **source: Any) -> list[Row]:
    return list(read_rows(Source(path=str(path), **source)))


def error_of(path: Path | str) -> str:
    with pytest.raises(FinetuneError) as caught:
        rows_of(path)
    return str(caught.value)


def places(rows: list[Row], folder: Path) -> list[str]:
    return [row.at.replace(f"{folder}/", "") for row in rows]


def test_json_lines_count_blank_lines_and_skip_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n" + json.dumps(ROWS[0]) + "\n\n  \n" + json.dumps(ROWS[1]))
    rows = rows_of(file)
    assert [row.value for row in rows] == ROWS
    assert places(rows, tmp_path) == ["a.jsonl:2", "a.jsonl:5"]
    assert [row.line for row in rows] == [2, 5]


def test_a_list_in_a_json_file_gives_the_line_where_each_element_begins(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ROWS, indent=1))
    rows = rows_of(file)
    assert [row.value for row in rows] == ROWS
    assert places(rows, tmp_path) == ["a.json:2", "a.json:6"]


def test_an_object_with_one_list_is_that_list(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"version": 1, "data": ROWS}))
    rows = rows_of(file)
    assert [row.value for row in rows] == ROWS
    assert places(rows, tmp_path) == ["a.json: row 1", "a.json: row 2"]


def test_one_conversation_in_a_json_file_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    file = tmp_path / "a.json"
    file.write_text(json.dumps(row))
    assert [read.value for read in rows_of(file)] == [row]


def test_json_lines_are_read_from_a_file_called_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = rows_of(file)
    assert [row.value for row in rows] == ROWS
    assert places(rows, tmp_path) == ["a.json:1", "a.json:2"]


def test_csv_rows_have_the_line_where_they_begin(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('question,answer\n"c\nd","e,""f"""\n\na,b\n', encoding="utf-8-sig")
    rows = rows_of(file)
    assert [row.value for row in rows] == [ROWS[1], ROWS[0]]
    assert places(rows, tmp_path) == ["a.csv:2", "a.csv:5"]


def test_a_csv_field_may_be_as_long_as_a_long_conversation(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(rows_of(file)[0].value["text"]) == 1_000_000


def test_parquet_leaves_out_the_inner_keys_that_a_row_does_not_have(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    values = [{"a": {"x": 1}}, {"a": {"y": [{"p": 1}, {"q": 2}]}}]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert [row.value for row in rows] == values
    assert places(rows, tmp_path) == ["a.parquet: row 1", "a.parquet: row 2"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, name: str) -> None:
    text = "question,answer\na,b\n" if "csv" in name else json.dumps(ROWS[0])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [row.value for row in rows_of(tmp_path / name)] == ROWS[:1]


def test_a_folder_and_a_glob_stand_for_their_files_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
    for where in (tmp_path, tmp_path / "*.jsonl"):
        assert [row.value["from"] for row in rows_of(where)] == ["a.jsonl", "b.jsonl"]


def test_a_limit_ends_the_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\nbroken')
    assert [row.value for row in rows_of(file, limit=1)] == [{"a": 1}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_through_datasets(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "a", "extra": 1}\n{"question": "b"}\n')
    rows = list(read_rows(Source(hub=str(folder)), streaming=streaming))
    assert [row.value for row in rows] == [{"question": "a", "extra": 1}, {"question": "b", "extra": None}]
    assert rows[1].at == f"{folder} (train): row 2"


def test_a_hub_data_set_that_cannot_be_had_is_one_sentence() -> None:
    with pytest.raises(FinetuneError, match="no/such-set: this data set cannot be loaded: "):
        list(read_rows(Source(hub="no/such-set")))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[1]", "a row must be a JSON object, not a list"),
        (b'"x"', "a row must be a JSON object, not a text"),
        (b'{"a": }', "this line is not JSON: Expecting value (column 7)"),
        (b'{"a": "\xff"}', "this line is not UTF-8 text"),
        (b'{"a": ' * 100_000, "this row is nested too deep"),
    ],
)
def test_a_line_that_is_no_row_is_a_bad_row_and_the_others_are_read(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    rows = rows_of(file)
    assert [row.problem for row in rows] == ["", problem, ""]
    assert places(rows, tmp_path)[1] == "a.jsonl:2"


def test_a_csv_row_of_another_width_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("a,b\n1\n2,3\n")
    assert [row.problem for row in rows_of(file)] == ["this row has 1 columns and the header has 2", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl: this file has no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl: this file has no rows"),
        ("a.json", b"", "a.json: this file has no rows"),
        ("a.json", b"[]", "a.json: this file has no rows"),
        ("a.csv", b"a,b\n", "a.csv: this file has no rows"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json:2: this file is not JSON: Expecting value (column 7)"),
        (
            "a.json",
            b'[{"a": 1}\n{"a": 2}]',
            "a.json:2: this file is not JSON: a comma or the end of the list",
        ),
        (
            "a.json",
            b'[{"a": 1}',
            "a.json:1: this file is not JSON: a comma or the end of the list is missing",
        ),
        ("a.json", b"\xff\xfe", "a.json: this file is not UTF-8 text"),
        ("a.csv", b'a\n"b', "a.csv:2: this file is not CSV in UTF-8: unexpected end of data"),
        ("a.parquet", b"PAR?", "a.parquet: this file is not parquet: "),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: this file cannot be read: Not a gzipped file"),
        (
            "a.txt",
            b"x",
            "a.txt: cannot tell what kind of file this is; known are .jsonl, .json, .csv, .parquet",
        ),
    ],
)
def test_a_file_without_rows_is_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).replace(f"{tmp_path}/", "").startswith(said)


def test_a_file_or_folder_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: there is no such data file"
    assert error_of(tmp_path / "*.jsonl") == f"{tmp_path}/*.jsonl: there is no such data file"
    assert error_of(tmp_path).startswith(f"{tmp_path}: this folder has no .jsonl, .json, .csv, .parquet")
