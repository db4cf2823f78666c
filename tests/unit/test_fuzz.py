"""Whatever is in a file, reading it ends well or in a FinetuneError; no other exception comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.chat import HarmonyEncoder, read_conversation, render_examples, render_prompt
from finetune.data.read import read_rows
from finetune.data.tokenise import tokenise
from finetune.errors import FinetuneError
from finetune.export.peft_files import Adapter
from finetune.model import fingerprint, inspect_checkpoint, resolve
from finetune.recipe import DataSpec, Source, load_recipe
from tests.checkpoints import write_random_checkpoint
from tests.data_kit import byte_encoder
from tests.train_helpers import RECIPE

QUICK: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
quick = settings(max_examples=60, **QUICK)


KEYS = (
    *(
        "messages",
        "role",
        "content",
        "thinking",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "tool_call_id",
    ),
    *(
        "learn",
        "weight",
        "tools",
        "parameters",
        "type",
        "properties",
        "text",
        "conversations",
        "from",
        "value",
    ),
    *("prompt", "completion", "question", "answer", "history", "system", "reasoning_effort", "current_date"),
)
words = st.sampled_from(
    ["user", "assistant", "tool", "system", "human", "gpt", "object", "[]", "{}", "high", ""]
)
scalars = (
    words | st.text(max_size=8) | st.none() | st.booleans() | st.integers() | st.floats() | st.just("\ud800")
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
# Almost conversations: the further a row gets, the more it tests.
calls = st.lists(st.fixed_dictionaries({"name": words, "arguments": values}), max_size=2)
messages = st.fixed_dictionaries(
    {"role": words, "content": values},
    optional={"thinking": values, "tool_calls": calls | values, "name": values, "learn": values},
)
rows = st.fixed_dictionaries(
    {"messages": st.lists(messages | values, max_size=4)},
    optional={
        "tools": st.lists(calls | values, max_size=2),
        "reasoning_effort": scalars,
        "current_date": scalars,
    },
) | st.dictionaries(st.sampled_from(KEYS), values, max_size=4)


@settings(max_examples=200, **QUICK)
@given(rows, st.sampled_from(["last_turn", "all_turns", "final_only"]), st.booleans())
def test_any_row_is_rendered_or_refused(row: dict[str, Any], learn: Any, analysis: bool) -> None:
    with suppress(FinetuneError):
        conversation = read_conversation(row)
        byte_encoder().encode(render_prompt(conversation))
        byte_encoder().encode_many(render_examples(conversation, learn=learn, analysis=analysis))


@quick
@given(st.lists(rows, min_size=1, max_size=3), st.sampled_from(["", '{"messages":', "[1]", "\ud800"]))
def test_any_file_of_rows_is_tokenised_or_refused(tmp_path: Path, found: list[Any], broken: str) -> None:
    file = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in found) + broken
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    source = Source(path=str(file), system="Be brief.")
    for bad_rows in ("skip", "stop"):
        with suppress(FinetuneError):
            spec = DataSpec(train=[source], bad_rows=bad_rows)
            tokenise(list(read_rows(source)), source, spec, byte_encoder())


@quick
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz"]), st.binary(max_size=300)
)
def test_any_bytes_as_data_are_read_or_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    file = tmp_path / f"rows{kind}"
    file.write_bytes(content)
    source = Source(path=str(file))
    with suppress(FinetuneError):
        tokenise(list(read_rows(source)), source, DataSpec(train=[source], bad_rows="skip"), byte_encoder())


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes; or `content` cut off, or with some bytes replaced."""
    places = st.integers(0, max(0, len(content) - 1))
    pieces = st.tuples(places, st.binary(min_size=1, max_size=12))
    return (
        st.binary(max_size=200)
        | places.map(lambda end: content[:end])
        | pieces.map(lambda at: content[: at[0]] + at[1] + content[at[0] + len(at[1]) :])
    )


@quick
@given(damaged(RECIPE.encode()))
def test_any_bytes_as_a_recipe_are_loaded_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with suppress(FinetuneError):
        load_recipe(file)


sections = st.sampled_from(["data.train", "eval.tasks", "lora", "model.base", "extends"])


@quick
@given(st.text(max_size=30) | st.builds("{}={}".format, sections, values.map(json.dumps)))
def test_any_override_is_taken_or_refused(tmp_path: Path, override: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    with suppress(FinetuneError):
        load_recipe(file, [override])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base"), layers=1, tokenizer="bytes", shards=2)


def inspect(folder: Path) -> None:
    inspect_checkpoint(resolve(folder).base)
    fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", inspect),
        ("model.safetensors.index.json", inspect),
        ("model-00000-of-00001.safetensors", inspect),
        ("tokenizer.json", HarmonyEncoder.from_dir),
    ],
)
def test_any_bytes_as_a_file_of_a_checkpoint_are_read_or_refused(
    base: Path, tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    whole = (folder / name).read_bytes()

    @quick
    # The start of a safetensors file is its header, where nearly all that can be wrong is.
    @given(damaged(whole[:8000]))
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content + whole[8000:])
        with suppress(FinetuneError):
            read(folder)

    check()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_any_bytes_as_a_file_of_an_adapter_are_read_or_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    whole = (tmp_path / name).read_bytes()

    @quick
    @given(damaged(whole))
    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with suppress(FinetuneError):
            Adapter.read(tmp_path)

    check()
