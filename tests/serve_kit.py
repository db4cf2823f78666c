"""A server in this process: the real application, engine and socket, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn

from finetune.serve.api.app import create_app
from finetune.serve.limits import Limits
from finetune.serve.load import load
from finetune.serve.server import listen
from finetune.serve.service import Service
from finetune.serve.subject import find_subject

WEATHER = {
    "name": "get_weather",
    "description": "Weather of today.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Running:
    url: str
    service: Service

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)


@contextmanager
def running(
    where: str | Path,
    adapters: dict[str, Path] | None = None,
    *,
    api_key: str | None = None,
    page: Path | None = None,
    limits: Limits | None = None,
) -> Iterator[Running]:
    """Serve in float32 on a free port until the block ends."""
    service = load(find_subject(str(where), adapters or {}), dtype="float32", limits=limits)
    listener = listen("127.0.0.1", 0)
    app = create_app(service, api_key=api_key, page=page)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listener.close()


def until(true: Any, seconds: float = 20) -> None:
    """Wait for something that happens on another thread."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
