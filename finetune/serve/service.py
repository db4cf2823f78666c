"""What stands between the API and the engine: models by name, limits, and answers as they come."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from finetune.chat import Conversation, HarmonyEncoder
from finetune.errors import FinetuneError
from finetune.serve.answer import Finish, HarmonyReader, Piece, Reader, TextReader
from finetune.serve.constrain import Form, Grammars
from finetune.serve.engine import Engine
from finetune.serve.metrics import Metrics
from finetune.serve.sampling import Sampling
from finetune.serve.scheduler import Event
from finetune.serve.scheduler import Sequence as Running
from finetune.serve.subject import Subject


class ModelNotFound(FinetuneError):
    """No model of that name is served."""


class ContextOverflow(FinetuneError):
    """The prompt, or the prompt and the longest answer asked for, do not fit."""


class AnswerFailed(FinetuneError):
    """The engine could not go on with an answer."""


@dataclass(frozen=True)
class Asked:
    """How answers are to be made, and how many; `form` None is as the model likes."""

    sampling: Sampling
    answers: int = 1
    stops: tuple[str, ...] = ()
    form: Form | None = None


class Answer:
    """One answer: its pieces as they come, then how it finished and what it cost."""

    def __init__(
        self, service: Service, model: str, prompt: list[int], sampling: Sampling, reader: Reader
    ) -> None:
        self.prompt = prompt
        self.tokens = 0
        self.model = model
        adapter = model if model in service.subject.adapters else None
        self.sequence = Running(prompt, adapter, sampling, self._hear)
        self._reader = reader
        self._service = service
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._began = time.perf_counter()
        self._closed = False

    def _hear(self, event: Event) -> None:
        self._events.put_nowait(event)

    @property
    def finish(self) -> Finish:
        assert self._reader.finish is not None, "the answer is still being written"
        return self._reader.finish

    @property
    def reasoning_tokens(self) -> int:
        return self._reader.reasoning_tokens

    async def pieces(self) -> AsyncIterator[Piece]:
        """Whoever stops listening before the end, by an error or by leaving, stops the engine's work on it.

        Raises:
            AnswerFailed: the engine could not go on.
        """
        try:
            while self._reader.finish is None:
                event = await self._events.get()
                if event.token is not None:
                    if not self.tokens:
                        seconds = time.perf_counter() - self._began
                        self._service.metrics.first_token(self.model, seconds)
                    self.tokens += 1
                if event.ending == "failed":
                    raise AnswerFailed(event.problem or "the answer could not be finished")
                for piece in self._reader.feed(event):
                    yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Stop the engine's work on it, if there is any left."""
        if self._closed:
            return
        self._closed = True
        self._service.engine.cancel(self.sequence)
        seconds = time.perf_counter() - self._began
        self._service.metrics.answered(self.model, len(self.prompt), self.tokens, seconds)


def count_tokens(answers: Sequence[Answer]) -> tuple[int, int]:
    """Of the prompts, each counted once, and of the answers."""
    prompts = {id(answer.prompt): len(answer.prompt) for answer in answers}
    return sum(prompts.values()), sum(answer.tokens for answer in answers)


class Service:
    """The models that are served, and how to ask them."""

    def __init__(
        self,
        engine: Engine,
        encoder: HarmonyEncoder,
        subject: Subject,
        metrics: Metrics,
        *,
        context: int,
    ) -> None:
        self.engine = engine
        self.encoder = encoder
        self.subject = subject
        self.metrics = metrics
        self.context = context
        self.created = int(time.time())
        self._grammars: Grammars | None = None

    def model(self, name: str) -> str:
        """`name`, if it is served; raises ModelNotFound."""
        if name not in self.subject.names:
            known = ", ".join(self.subject.names)
            raise ModelNotFound(f"there is no model {name!r} here; this server has {known}")
        return name

    def fingerprint(self, name: str) -> str:
        """Names the weights behind a model: another one for another base or adapter."""
        adapter = self.subject.adapters.get(name)
        return "fp_" + hashlib.sha256(f"{self.subject.base_fingerprint} {adapter}".encode()).hexdigest()[:12]

    async def ask(self, model: str, conversation: Conversation, asked: Asked) -> list[Answer]:
        """Put a conversation before a model.

        Raises:
            FinetuneError: an unknown model, no room, a schema that cannot be enforced, or a full queue.
        """
        self.model(model)
        # In a thread: the tokens of a long conversation, or a large grammar, take tenths of a second.
        prompt = await asyncio.to_thread(self.encoder.prompt_ids, conversation)
        json_only = asked.form is not None and asked.form.final is not None

        def reader() -> Reader:
            return HarmonyReader(self.encoder, asked.stops, final_only=json_only)

        answers = self._prepare(model, [prompt], reader, asked)
        if asked.form is not None:
            grammars = await asyncio.to_thread(self._make_grammars)
            grammar = await asyncio.to_thread(grammars.compile, asked.form)
            for answer in answers:
                answer.sequence.constraint = grammars.constraint(grammar)
        self.engine.submit(*(answer.sequence for answer in answers))
        return answers

    def go_on(self, model: str, prompts: list[list[int]], asked: Asked) -> list[Answer]:
        """Let a model go on from token ids, and read what it writes as text; raises as `ask`."""
        self.model(model)
        answers = self._prepare(model, prompts, lambda: TextReader(self.encoder, asked.stops), asked)
        self.engine.submit(*(answer.sequence for answer in answers))
        return answers

    def _prepare(
        self, model: str, prompts: list[list[int]], reader: Callable[[], Reader], asked: Asked
    ) -> list[Answer]:
        """Of each prompt as many answers as are asked for, with seeds one after the other."""
        most, last = asked.sampling.max_tokens, self.encoder.tokenizer.get_vocab_size() - 1
        if (worst := max(asked.sampling.logit_bias, default=0)) > last:
            raise FinetuneError(f"logit_bias names the token {worst}, and the last one there is is {last}")
        answers = []
        for prompt in prompts:
            room = self.context - len(prompt)
            if room < (most or 1):
                wanted = f" and an answer of up to {most}" if most else ""
                raise ContextOverflow(
                    f"a prompt of {len(prompt)} tokens{wanted} is more than the {self.context} of this server"
                )
            for number in range(asked.answers):
                # Drawn here, so that an answer that has to start over draws the same again.
                seed = asked.sampling.seed
                seed = int.from_bytes(os.urandom(8)) if seed is None else seed + number
                sampling = replace(
                    asked.sampling, max_tokens=most or room, seed=seed, stop_ids=self.encoder.stop_ids
                )
                answers.append(Answer(self, model, prompt, sampling, reader()))
        return answers

    def _make_grammars(self) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self.encoder, self.engine.runner.model.config.vocab_size)
        return self._grammars
