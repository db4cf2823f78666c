"""An engine as a child process: started, waited for, ended with whoever started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from finetune.errors import FinetuneError
from finetune.serve.launch.commands import KEY, Address, Command

# Loading 120b from a slow disk and capturing CUDA graphs takes this long at the worst.
START_SECONDS = 1800
# An engine that has not gone by then is not going to.
STOP_SECONDS = 30
# A few answers of some tokens, on a processor too.
ANSWER_SECONDS = 300
LAST_LINES = 20


class Process:
    """A running engine; its log goes to standard error, and the last lines are kept."""

    def __init__(self, command: Command, key: str | None) -> None:
        words = [key or "" if word == f"${KEY}" else word for word in command.words]
        if words[0] == "python":
            words[0] = sys.executable
        environment = dict(os.environ)
        if key and command.key_variable:
            environment[command.key_variable] = key
        self.command = command
        self._log: deque[str] = deque(maxlen=LAST_LINES)
        try:
            self._child = subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                # Its own group: engines start workers, which have to go with it.
                start_new_session=True,
            )
        except OSError as error:
            raise FinetuneError(f"{command.program} cannot be started: {error}") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._log.append(line.rstrip())
            sys.stderr.write(line)

    def wait_until_healthy(self, url: str, seconds: float = START_SECONDS) -> None:
        """Return once the engine answers at `url`.

        Raises:
            FinetuneError: it ended, or the time is over; with the last line it logged.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self._child.poll()
            if status is not None:
                self._reader.join(timeout=1)
                raise FinetuneError(
                    f"{self.command.program} ended with status {status} before it answered{self._last()}"
                )
            with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise FinetuneError(
            f"{self.command.program} did not answer at {url} within {seconds:.0f} seconds{self._last()}"
        )

    def _last(self) -> str:
        said = [line for line in self._log if line.strip()]
        return f"; its last words: {said[-1].strip()}" if said else ", and said nothing"

    def wait(self) -> int:
        """Until it ends; its exit status."""
        return self._child.wait()

    def stop(self) -> None:
        """Ask it to end, then make it."""
        for number, patience in ((signal.SIGINT, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(patience)
                return


@contextmanager
def running(command: Command, key: str | None) -> Iterator[Process]:
    """The engine, for as long as the block; a signal that ends this process ends it too."""
    process = Process(command, key)

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield process
    finally:
        process.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def complete(address: Address, model: str, prompt: str, tokens: int) -> str:
    """The engine's greedy completion of a text, at most `tokens` long.

    Raises:
        FinetuneError: it refuses, or does not answer.
    """
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {address.key}"} if address.key else {}
    )
    request = urllib.request.Request(f"{address.url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
            return text
    except urllib.error.HTTPError as error:
        reason = error.read(500).decode(errors="replace")
        raise FinetuneError(f"the engine refused a request ({error.code}): {reason}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FinetuneError(f"the engine does not answer as OpenAI's API does: {error}") from error
