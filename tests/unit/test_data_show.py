"""`finetune data`: what the model will see, for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.chat import Encoded
from finetune.data.show import data_lines, marked, show_data
from finetune.errors import FinetuneError
from tests.data_kit import byte_encoder, chat, write_rows


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_encoder().tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


ROWS = [chat(f"question {number}", f"answer {number}") for number in range(30)]


def test_a_data_file_is_printed_as_ids_and_mask_with_the_line_of_each_row(
    tmp_path: Path, tokenizer: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in ROWS[:2]))
    lines = list(data_lines(str(file), [], tokenizer=tokenizer))
    assert [line["line"] for line in lines] == [1, 3]
    for line, number in zip(lines, (0, 1), strict=True):
        assert set(line) == {"line", "ids", "learn"}
        learned = [token for token, flag in zip(line["ids"], line["learn"], strict=True) if flag]
        text = f"<|channel|>final<|message|>answer {number}<|return|>"
        assert byte_encoder().decode(learned) == text


def test_every_turn_has_a_line_with_all_turns(tmp_path: Path, tokenizer: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"messages": ROWS[0]["messages"] + ROWS[1]["messages"]}])
    lines = list(data_lines(str(file), ["data.learn=all_turns"], tokenizer=tokenizer))
    assert [line["line"] for line in lines] == [1, 1]


def test_rows_limit_the_lines(tmp_path: Path, tokenizer: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", ROWS)
    assert len(list(data_lines(str(file), [], tokenizer=tokenizer, rows=4))) == 4
    assert len(list(data_lines(str(file), [], tokenizer=tokenizer))) == 30


def test_a_file_is_shown_beyond_the_limit_that_recipes_have(tmp_path: Path, tokenizer: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [chat("q", "x" * 50_000)])
    (line,) = data_lines(str(file), [], tokenizer=tokenizer)
    assert len(line["ids"]) > 50_000


def test_a_recipe_is_shown_with_its_own_settings(tmp_path: Path, tokenizer: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [*ROWS, {"bad": 1}])
    file = tmp_path / "r.yaml"
    file.write_text(f"name: r\nmodel: {{base: {tokenizer}}}\ndata: {{train: [a.jsonl], bad_rows: skip}}\n")
    assert len(list(data_lines(str(file), []))) == 30
    with pytest.raises(FinetuneError, match=r"a\.jsonl:31: cannot tell the shape"):
        list(data_lines(str(file), ["data.bad_rows=stop"]))


def test_people_see_what_is_learned_the_lengths_and_what_was_left_out(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, {"bad": 1}, chat("q", "[bold]" + "x" * 900)])
    overrides = ["data.bad_rows=skip", "data.max_tokens=800", "data.too_long=truncate", "data.held_out=0.1"]
    show_data(str(file), overrides, cache_dir=tmp_path / "cache", tokenizer=tokenizer, rows=2)
    out = capsys.readouterr().out
    assert "<|start|>assistant⟦<|channel|>final<|message|>answer 1<|return|>⟧" in out
    assert "answer 2" not in out
    assert f"{file}:1: " in out.replace("\n", "")
    for said in (
        "held out",
        "█",
        "1 examples were cut at 800 tokens",
        "1 bad rows were skipped",
    ):
        assert said in out
    assert f"{file}:31" in out.replace("\n", "")


def test_learned_and_special_tokens_differ_in_colour() -> None:
    encoder = byte_encoder()
    ids = [encoder.start_id, *encoder.encode_text("a"), encoder.end_id, *encoder.encode_text("b")]
    text = marked(Encoded(ids, [0, 0, 1, 1]), encoder, in_colour=True)
    assert text.plain == "<|start|>a<|end|>b"
    assert len({span.style for span in text.spans}) == 4


def test_control_sequences_in_data_do_not_reach_the_terminal() -> None:
    encoder = byte_encoder()
    ids = encoder.encode_text("\x1b[2J")
    assert "\x1b" not in marked(Encoded(ids, [0] * len(ids)), encoder, in_colour=True).plain


def test_a_base_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    file = tmp_path / "r.yaml"
    file.write_text("name: r\nmodel: {base: no/such}\ndata: {train: [a.jsonl]}\n")
    with pytest.raises(FinetuneError, match=r"no tokenizer for no/such .*; name one with --tokenizer DIR"):
        list(data_lines(str(file), []))
