"""Prompts for `finetune generate`: texts, or rows in any shape whose last answer, if any, is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat import Conversation, Effort, Message, Tool
from finetune.chat.tools import read_tools
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from finetune.data import Row

# A row with one of these and no answer is a question by itself.
QUESTION_KEYS = ("prompt", "question", "instruction")


@dataclass(frozen=True)
class Setting:
    """What surrounds a prompt that is only a text."""

    system: str | None = None
    effort: Effort | None = None
    tools: tuple[Tool, ...] = ()

    @classmethod
    def read(cls, system: str | None, effort: Effort | None, tools: Path | None) -> Setting:
        """From a command's options; `tools` is a JSON file with a list of functions, as in OpenAI's chat API.

        Raises:
            FinetuneError: the file is not there, or holds no list of functions.
        """
        if tools is None:
            return cls(system, effort)
        try:
            return cls(system, effort, read_tools(_text(tools)))
        except FinetuneError as error:
            raise FinetuneError(error.sentence, at=error.at or str(tools)) from None

    def conversation(self, text: str) -> Conversation:
        before = (Message("developer", self.system),) if self.system else ()
        messages = (*before, Message("user", text))
        return Conversation(messages, self.tools, reasoning_effort=self.effort or "medium")


def read_prompts(texts: Sequence[str], file: Path | None, setting: Setting) -> list[Conversation]:
    """The given texts, then the rows of `file` (every kind that a recipe reads, or .txt: a prompt a line).

    Raises:
        FinetuneError: no prompt at all, no such file, or a row that asks nothing, with its place.
    """
    prompts = [setting.conversation(text) for text in texts]
    if file is not None and file.suffix == ".txt":
        lines = _text(file).splitlines()
        prompts += [setting.conversation(line) for line in lines if line.strip()]
    elif file is not None:
        from finetune.data import read_rows
        from finetune.recipe import Source

        prompts += [_from_row(row, setting) for row in read_rows(Source(path=str(file)))]
    if not prompts:
        raise FinetuneError("there is no prompt: give one, a --file of them, or one on standard input")
    return prompts


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FinetuneError("there is no such file", at=str(file)) from None
    except UnicodeDecodeError:
        raise FinetuneError("this file is not UTF-8 text", at=str(file)) from None
    except OSError as error:
        raise FinetuneError(f"this file cannot be read: {error.strerror}", at=str(file)) from error


def _from_row(row: Row, setting: Setting) -> Conversation:
    from finetune.data import row_to_conversation
    from finetune.recipe import DataSpec, Source

    asked = _lone_question(row.value)
    if asked is not None and not row.problem:
        return setting.conversation(asked)
    source = Source(path=row.at, system=setting.system)
    spec = DataSpec(train=[source], reasoning_effort=setting.effort)
    conversation = row_to_conversation(row, source, spec)
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role in ("user", "tool") for message in messages):
        raise FinetuneError("this row asks nothing: it has no user message before its answer", at=row.at)
    return replace(conversation, messages=tuple(messages))


def _lone_question(row: dict[str, Any]) -> str | None:
    """The text of `{"prompt": "..."}` and the like."""
    given = [key for key in QUESTION_KEYS if isinstance(row.get(key), str)]
    answered = {"messages", "conversations", "completion", "answer", "output"} & row.keys()
    return str(row[given[0]]) if len(given) == 1 and not answered else None
