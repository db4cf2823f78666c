"""`finetune generate` and `finetune chat`: answers of a model, its reasoning shown apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from rich.console import Console

from finetune.chat import Conversation, Effort, Message
from finetune.chat.parse import Completion, Delta, StreamParser, parse_completion
from finetune.evaluate.answers import completion_to_dict
from finetune.evaluate.prompts import Setting, read_prompts

if TYPE_CHECKING:
    from finetune.evaluate.subject import Subject, Which

REASONING = "dim italic"
HELP = "/effort low|medium|high · /base · /tuned · /new · /quit"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate_command(
    where: str | Path,
    prompts: Sequence[str] = (),
    *,
    file: Path | None = None,
    setting: Setting | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    base: bool = False,
    emit: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
) -> None:
    """Answer every prompt in batches: `prompts`, then the rows of `file`, or standard input without either.

    Each answer goes to `emit` as {prompt, thinking, content, tool_calls, ended, tokens}, in the order of the
    prompts; without `emit` it is shown on `console`. `base` leaves a run's adapter out.

    Raises:
        FinetuneError: no prompt, or a model that does not load.
    """
    if not prompts and file is None and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().strip()) else []
    asked = read_prompts(prompts, file, setting or Setting())
    from finetune.evaluate.subject import load_subject, require_model

    require_model(where)
    # Only now: the libraries behind this take seconds to import.
    from finetune.evaluate.generation import generate

    subject = load_subject(where)
    ids = [subject.encoder.prompt_ids(conversation) for conversation in asked]
    with subject.acting_as("base" if base else "tuned") as model:
        outputs = generate(model, subject.encoder, ids, batch_size=batch_size, **vars(sampling or Sampling()))
    console = console or Console()
    for conversation, output in zip(asked, outputs, strict=True):
        completion = parse_completion(subject.encoder, output)
        question = conversation.messages[-1].content
        if emit:
            emit({"prompt": question, **completion_to_dict(completion, len(output))})
        else:
            _show(console, question, completion)


def _show(console: Console, question: str, completion: Completion) -> None:
    console.print(f"> {question}", style="bold", markup=False, highlight=False)
    if completion.thinking:
        console.print(completion.thinking, style=REASONING, markup=False, highlight=False)
    if completion.content:
        console.print(completion.content, markup=False, highlight=False)
    for call in completion.tool_calls:
        console.print(f"{call.name}({call.arguments})", style="cyan", markup=False, highlight=False)
    if completion.ended is None:
        console.print("(cut off: no closing token)", style="yellow")
    console.print()


def chat_command(
    where: str | Path,
    *,
    setting: Setting | None = None,
    sampling: Sampling | None = None,
    emit: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talk to a model until `/quit` or the end of input; see HELP for what can be typed.

    Each answer is shown as it comes, or goes to `emit` as {prompt, thinking, content, tool_calls, ended,
    tokens} when it is whole.

    Raises:
        FinetuneError: the model does not load.
    """
    from finetune.evaluate.subject import load_subject

    console = console or Console(highlight=False)
    subject = load_subject(where)
    chat = Chat(subject, console, setting or Setting(), sampling or Sampling(512, temperature=0.7), emit)
    console.print(f"{where} · {chat.which} · {HELP}", style="dim", markup=False)
    while True:
        try:
            line = read(f"{chat.which}> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            console.print(chat.command(line), style="dim", markup=False)
        elif line:
            chat.say(line, read)


@dataclass
class Chat:
    """One conversation with a loaded model."""

    subject: Subject
    console: Console
    setting: Setting
    sampling: Sampling
    emit: Callable[[dict[str, Any]], None] | None = None
    conversation: Conversation = field(init=False)
    which: Which = field(init=False)

    def __post_init__(self) -> None:
        self.which = self.subject.variants[-1]
        self._begin()

    def _begin(self) -> None:
        # The first user message of the setting's conversation is still to be typed.
        begun = self.setting.conversation("")
        self.conversation = replace(begun, messages=begun.messages[:-1])

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to tell the user."""
        word, _, argument = line.partition(" ")
        if word == "/new":
            self._begin()
            return "a new conversation"
        if word in ("/base", "/tuned"):
            if not self.subject.tuned:
                return "this model has no adapter to switch"
            self.which = "base" if word == "/base" else "tuned"
            return f"now talking to the {self.which} model"
        if word == "/effort" and argument in get_args(Effort):
            effort = cast(Effort, argument)
            self.setting = replace(self.setting, effort=effort)
            self.conversation = replace(self.conversation, reasoning_effort=effort)
            return f"reasoning effort {effort}"
        return HELP

    def say(self, text: str, read: Callable[[str], str]) -> None:
        """Send a user message and show the answer as it comes; tool results are asked of the user.

        Ctrl-C takes the message back.
        """
        before = self.conversation
        self._add(Message("user", text))
        try:
            while (completion := self._answer()).ended == "call":
                for call in completion.tool_calls:
                    result = read(f"{call.name} returns> ")
                    self._add(Message("tool", result, name=call.name))
        except (KeyboardInterrupt, EOFError):
            self.conversation = before
            self.console.print("\n(stopped; the message is taken back)", style="yellow")

    def _add(self, *messages: Message) -> None:
        self.conversation = replace(self.conversation, messages=(*self.conversation.messages, *messages))

    def _answer(self) -> Completion:
        from finetune.evaluate.generation import generate_streaming

        parser, printer = StreamParser(self.subject.encoder), _Printer(self.console)
        prompt = self.subject.encoder.prompt_ids(self.conversation)
        # Another seed for each message: else the same words asked twice get the same answer.
        options = {**vars(self.sampling), "seed": self.sampling.seed + len(self.conversation.messages)}

        def show(token: int) -> None:
            for delta in parser.feed(token):
                if not self.emit:
                    printer.write(delta)

        with self.subject.acting_as(self.which) as model:
            ids = generate_streaming(model, self.subject.encoder, prompt, on_token=show, **options)
        completion = parser.finish()
        if self.emit:
            asked = self.conversation.messages[-1].content
            self.emit({"prompt": asked, **completion_to_dict(completion, len(ids))})
        else:
            printer.end(completion)
        self._add(*completion.messages)
        return completion


class _Printer:
    """Shows pieces of text as they come, a new line and style for each channel."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown: tuple[str | None, str | None] | None = None

    def write(self, delta: Delta) -> None:
        place = (delta.channel, delta.recipient)
        style = "cyan" if delta.recipient else REASONING if delta.channel == "analysis" else None
        if place != self.shown:
            self._print("\n" if self.shown else "", None)
            self._print(f"{delta.recipient} " if delta.recipient else "", style)
        self._print(delta.text, style)
        self.shown = place

    def end(self, completion: Completion) -> None:
        self._print("\n", None)
        if completion.ended is None:
            self._print("(cut off: no closing token)\n", "yellow")

    def _print(self, text: str, style: str | None) -> None:
        self.console.print(text, style=style, end="", markup=False, highlight=False, soft_wrap=True)
