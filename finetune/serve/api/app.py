"""The application: endpoints, what guards them, and the engine's life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.types import ASGIApp

from finetune.serve.api import chat, completions, errors, plain, responses
from finetune.serve.api.guard import Guard
from finetune.serve.service import Service


def create_app(service: Service, *, api_key: str | None = None, page: Path | None = None) -> ASGIApp:
    """The ASGI application over a service whose engine it starts and stops."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        service.engine.post = loop.call_soon_threadsafe
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    app = FastAPI(
        title="finetune serve",
        version="1",
        description="OpenAI's API over gpt-oss and adapters of it.",
        lifespan=life,
        # Its pages would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for part in (chat, completions, responses, plain):
        app.include_router(part.router)
    if page is not None:
        app.include_router(plain.page_router(page))
    errors.install(app)
    return Guard(app, api_key=api_key, metrics=service.metrics)
