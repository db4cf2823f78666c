"""Mistakes that users make, each with the command they would type and the sentence they should see.

Every mistake starts from a project that works (`tests.train_helpers.write_project`), which `spoil` breaks or
adds to. In a sentence, `...` stands for any text and `HERE` for the project's folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import write_random_checkpoint

USER = {"role": "user", "content": "What is 3 + 4?"}
ANSWER = {"role": "assistant", "content": "7"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
RECIPE = "name: tiny\nmodel: {base: base}\ndata: {train: rows.jsonl, max_tokens: 512}\n"

Spoil = Callable[[Path], None]


def nothing(project: Path) -> None:
    """The command itself is the mistake."""


@dataclass(frozen=True)
class Mistake:
    """`words` follow `finetune`; `sentence` is all of standard error, or of wrong usage its last line."""

    title: str
    words: tuple[str, ...]
    sentence: str
    spoil: Spoil = nothing
    status: int = 1

    def matches(self, said: str, project: Path) -> bool:
        """Was this the sentence that was said?"""
        text = said.replace(str(project), "HERE").strip()
        if self.status == 2:
            text = text.splitlines()[-1]
        pattern = ".*".join(re.escape(part) for part in self.sentence.split("..."))
        return "\n" not in text and re.fullmatch(pattern, text) is not None


def file(name: str, content: bytes | str) -> Spoil:
    """Write a file over whatever is there."""

    def spoil(project: Path) -> None:
        (project / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def rows(*values: Any) -> Spoil:
    """Make these the rows."""
    return file("rows.jsonl", "".join(json.dumps(value) + "\n" for value in values))


def removed(name: str) -> Spoil:
    """Take a file away."""
    return lambda project: (project / name).unlink()


def config(**changes: Any) -> Spoil:
    """Change keys of the base's config.json."""

    def spoil(project: Path) -> None:
        place = project / "base" / "config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | changes))

    return spoil


def lost_shard(project: Path) -> None:
    shutil.rmtree(project / "base")
    write_random_checkpoint(project / "base", tokenizer="bytes", shards=3)
    (project / "base" / "model-00001-of-00002.safetensors").unlink()


def cut_off(project: Path) -> None:
    place = project / "base" / "model.safetensors"
    place.write_bytes(place.read_bytes()[:100_000])


def recipe(text: str) -> Spoil:
    return file("recipe.yaml", text)


def _override(title: str, words: str, sentence: str) -> Mistake:
    return Mistake(title, ("check", "recipe.yaml", words), f"override {words}: {sentence}")


RECIPES = [
    Mistake(
        "unknown key",
        ("check", "recipe.yaml"),
        "recipe.yaml:4: lora.rnak: there is no such setting; did you mean 'rank'?",
        recipe(RECIPE + "lora: {rnak: 4}\n"),
    ),
    Mistake(
        "wrong type",
        ("train", "recipe.yaml"),
        "recipe.yaml:4: train.max_steps: must be a whole number, not the text 'soon'",
        recipe(RECIPE + "train: {max_steps: soon}\n"),
    ),
    Mistake("missing recipe", ("train", "nowhere.yaml"), "nowhere.yaml: there is no such recipe or run"),
    Mistake("recipe is a folder", ("check", "base"), "base: this is a folder; name the recipe file in it"),
    Mistake("folder is no run", ("train", "base"), "base: this folder is not a run: it has no run.json"),
    Mistake(
        "recipe is data",
        ("train", "rows.jsonl"),
        "rows.jsonl: this is data, and a recipe is YAML; `finetune data` shows it",
    ),
    Mistake(
        "YAML syntax",
        ("check", "recipe.yaml"),
        "recipe.yaml:5: this is not valid YAML: expected the node content, but found '<stream end>'",
        recipe(RECIPE + "eval: {tasks: [\n"),
    ),
    Mistake(
        "recipe is binary",
        ("check", "recipe.yaml"),
        "recipe.yaml:1: a recipe is UTF-8 text, and this is not",
        file("recipe.yaml", bytes(range(128, 256))),
    ),
    Mistake(
        "recipe is empty",
        ("check", "recipe.yaml"),
        "recipe.yaml:1: a recipe is a mapping of keys to values, as in `name: my-run`",
        recipe(""),
    ),
    Mistake(
        "extends loop",
        ("check", "recipe.yaml"),
        "recipe.yaml:1: extends: these recipes extend each other in a circle: recipe.yaml -> recipe.yaml",
        recipe("extends: recipe.yaml\n"),
    ),
    _override("unknown section", "lroa.rank=3", "lroa: there is no such setting; did you mean 'lora'?"),
    _override(
        "override without value",
        "lora.rank",
        "an override is written dotted.key=value, as in train.max_steps=100",
    ),
    _override(
        "NaN learning rate",
        "train.learning_rate=.nan",
        "train.learning_rate: must be a finite number, not the number nan",
    ),
    _override("negative rank", "lora.rank=-4", "lora.rank: must be at least 1, not the number -4"),
    _override("no data", "data.train=[]", "data.train: must not be empty"),
    _override(
        "two tasks of one name",
        "eval.tasks=[{name: a, path: b.jsonl}, {name: a, path: c.jsonl}]",
        "eval.tasks: 2 tasks are called 'a'; each needs a name of its own",
    ),
    _override("method to come", "method=dpo", "method: dpo is not there yet; sft is the one method so far"),
]

DATA = [
    Mistake(
        "missing data file",
        ("train", "recipe.yaml", "data.train=nope.jsonl"),
        "override data.train=nope.jsonl: data.train.0.path: there is no file HERE/nope.jsonl",
    ),
    Mistake(
        "row without messages",
        ("check", "recipe.yaml"),
        "rows.jsonl:2: cannot tell the shape of this row from its keys (text); known are ...",
        rows(GOOD, {"text": "hi"}),
    ),
    Mistake(
        "empty messages",
        ("check", "recipe.yaml"),
        "rows.jsonl:2: the row has no messages",
        rows(GOOD, {"messages": []}),
    ),
    Mistake(
        "unknown role",
        ("train", "recipe.yaml"),
        "rows.jsonl:2: message 1 has the unknown role 'bot'; a role is one of system, developer, "
        "user, assistant, tool",
        rows(GOOD, {"messages": [{"role": "bot", "content": "hi"}]}),
    ),
    Mistake(
        "assistant turn missing",
        ("train", "recipe.yaml"),
        "rows.jsonl:2: the conversation has no assistant message to learn",
        rows(GOOD, {"messages": [USER]}),
    ),
    Mistake(
        "tool call, no tools",
        ("check", "recipe.yaml"),
        "rows.jsonl:1: the conversation calls 'add', and the row has no tools; list it there",
        rows({"messages": [USER, CALL]}),
    ),
    Mistake(
        "tool call, no such tool",
        ("check", "recipe.yaml"),
        "rows.jsonl:1: message 2 (assistant) calls 'add', which is not among its tools: sub",
        rows({"messages": [USER, CALL], "tools": [{"name": "sub"}]}),
    ),
    Mistake(
        "tool result, no call",
        ("check", "recipe.yaml"),
        "rows.jsonl:1: message 2 (tool) answers a call, and no such call is open before it",
        rows({"messages": [USER, {"role": "tool", "content": "7"}, ANSWER]}),
    ),
    Mistake(
        "too long",
        ("train", "recipe.yaml"),
        "rows.jsonl:2: this conversation has ... tokens and data.max_tokens is 512; raise data.max_tokens, "
        "or set data.too_long to drop or truncate",
        rows(GOOD, {"messages": [USER, {**ANSWER, "content": "7" * 900}]}),
    ),
    Mistake(
        "all too long",
        ("check", "recipe.yaml", "data.too_long=drop"),
        "HERE/rows.jsonl: no example is left to learn from; all rows are bad or too long",
        rows({"messages": [USER, {**ANSWER, "content": "7" * 900}]}),
    ),
    Mistake(
        "empty data", ("train", "recipe.yaml"), "rows.jsonl: this file has no rows", file("rows.jsonl", "\n")
    ),
    Mistake(
        "not UTF-8",
        ("check", "recipe.yaml"),
        "rows.jsonl:2: this line is not UTF-8 text",
        file("rows.jsonl", json.dumps(GOOD).encode() + b'\n{"messages": "caf\xe9"}\n'),
    ),
    Mistake(
        "binary data",
        ("check", "recipe.yaml"),
        "rows.jsonl:1: this line is not UTF-8 text",
        file("rows.jsonl", bytes(range(128, 256)) * 40),
    ),
    Mistake(
        "broken JSON",
        ("check", "recipe.yaml"),
        "rows.jsonl:1: this line is not JSON: Expecting value (column 15)",
        file("rows.jsonl", '{"messages": [}\n'),
    ),
    Mistake(
        "unknown kind of file",
        ("check", "recipe.yaml", "data.train=rows.txt"),
        "rows.txt: cannot tell what kind of file this is; known are .jsonl, .json, .csv, .parquet (...)",
        file("rows.txt", "hello\n"),
    ),
    Mistake(
        "not parquet",
        ("check", "recipe.yaml", "data.train=rows.parquet"),
        "rows.parquet: this file is not parquet: ...",
        file("rows.parquet", "hello, hello, hello\n"),
    ),
    Mistake(
        "ragged CSV",
        ("check", "recipe.yaml", "data.train=rows.csv"),
        "rows.csv:3: this row has 1 columns and the header has 2",
        file("rows.csv", "question,answer\n1+1?,2\n1+2?\n"),
    ),
    Mistake(
        "column missing",
        ("check", "recipe.yaml", "data.train=[{path: rows.jsonl, columns: {question: ask}}]"),
        "rows.jsonl:1: there is no column 'ask' for question; this row has messages",
    ),
    Mistake(
        "task without answers",
        ("check", "recipe.yaml", "eval.tasks=[{name: sums, path: rows.jsonl, metric: tool_call}]"),
        "HERE/rows.jsonl: task 'sums' has no question: none of its 1 rows ends in a tool call",
        rows({"messages": [USER, {**ANSWER, "learn": False}, USER, ANSWER, USER]}),
    ),
]

BASES = [
    Mistake(
        "shard missing",
        ("train", "recipe.yaml"),
        "HERE/base: shard model-00001-of-00002.safetensors is missing (...)",
        lost_shard,
    ),
    Mistake(
        "wrong shape",
        ("train", "recipe.yaml"),
        "HERE/base/model.safetensors: tensor 'model.embed_tokens.weight' has the shape [320, 64] where "
        "config.json asks for [320, 96]",
        config(hidden_size=96),
    ),
    Mistake(
        "other architecture",
        ("train", "recipe.yaml"),
        "HERE/base/config.json: this is a model of type 'llama'; finetune trains gpt-oss models "
        "(model_type 'gpt_oss')",
        config(model_type="llama"),
    ),
    Mistake(
        "cut off checkpoint",
        ("check", "recipe.yaml"),
        "HERE/base/model.safetensors: the file is cut off: ... bytes are missing",
        cut_off,
    ),
    Mistake(
        "no tokenizer",
        ("check", "recipe.yaml"),
        "HERE/base: there is no tokenizer.json here",
        removed("base/tokenizer.json"),
    ),
    Mistake(
        "tokenizer of another model",
        ("check", "recipe.yaml"),
        "HERE/base/tokenizer.json: the tokenizer has no <|start|> token, which the harmony format needs",
        file("base/tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'),
    ),
    Mistake(
        "hub id while offline",
        ("train", "recipe.yaml", "model.base=openai/gpt-oss-20b"),
        "override model.base=openai/gpt-oss-20b: model.base: there is no model openai/gpt-oss-20b: "
        "no folder of that name, not on this machine, and HF_HUB_OFFLINE is set",
    ),
    Mistake(
        "no such base",
        ("train", "recipe.yaml", "model.base=./nope"),
        "override model.base=./nope: model.base: there is no model HERE/nope: no folder of that name, "
        "and no hub id (owner/name)",
    ),
]

NO_MODEL = "there is no model nope: no folder of that name, and no hub id (owner/name)"
NO_TASK = "base: this is not a run, so there are no held-out rows: name a task to measure it on"
COMMANDS = [
    Mistake(
        "data is not there",
        ("data", "nope.jsonl", "--tokenizer", "base"),
        "nope.jsonl: there is no such data file",
    ),
    Mistake("no such model", ("generate", "nope", "hi"), NO_MODEL),
    Mistake("no such model", ("chat", "nope"), NO_MODEL),
    Mistake("no such model", ("eval", "nope"), NO_MODEL),
    Mistake("nothing to measure", ("eval", "base"), NO_TASK),
    Mistake(
        "no such questions",
        ("eval", "base", "--task", "nope.jsonl"),
        "nope.jsonl: there is no such file of questions",
    ),
    Mistake(
        "no prompt",
        ("generate", "base"),
        "there is no prompt: give one, a --file of them, or one on standard input",
    ),
    Mistake(
        "prompts not UTF-8",
        ("generate", "base", "--file", "asked.txt"),
        "asked.txt: this file is not UTF-8 text",
        file("asked.txt", b"caf\xe9"),
    ),
    Mistake(
        "tools not a list",
        ("generate", "base", "hi", "--tools", "tools.json"),
        "tools.json: tools must be a list, not a mapping",
        file("tools.json", "{}"),
    ),
    Mistake("folder is there", ("new", "base"), "base: this is there already; choose another name"),
    Mistake("unknown command", ("trian", "recipe.yaml"), "Error: No such command 'trian'...", status=2),
    Mistake(
        "unknown option", ("check", "recipe.yaml", "--colour"), "Error: No such option: --colour...", status=2
    ),
    Mistake("recipe not named", ("check",), "Error: Missing argument 'RECIPE'...", status=2),
]

MISTAKES = [*RECIPES, *DATA, *BASES, *COMMANDS]
