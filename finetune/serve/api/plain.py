"""Models, health, metrics, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic import BaseModel

from finetune.serve.api.errors import RESPONSES
from finetune.serve.service import Service

router = APIRouter()

# The page has its script and style within; it talks to this server and to nobody else.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)


class Model(BaseModel):
    """`parent` is the base of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["finetune"] = "finetune"
    parent: str | None
    context_length: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


def _describe(service: Service, name: str) -> Model:
    parent = service.subject.base_name if name in service.subject.adapters else None
    return Model(id=name, created=service.created, parent=parent, context_length=service.context)


@router.get("/v1/models", responses=RESPONSES)
async def list_models(request: Request) -> Models:
    """The tuned models first, the base last."""
    service: Service = request.app.state.service
    return Models(data=[_describe(service, name) for name in service.subject.names])


@router.get("/v1/models/{name:path}", responses=RESPONSES)
async def show_model(name: str, request: Request) -> Model:
    """One model; a hub id's slash may stand in the path as it is."""
    service: Service = request.app.state.service
    return _describe(service, service.model(name))


@router.get("/health", responses={503: {"description": "The engine has stopped."}})
async def tell_health(request: Request) -> Health:
    """Whether requests are being answered."""
    service: Service = request.app.state.service
    if not service.engine.alive:
        return Response(status_code=503)  # type: ignore[return-value]
    return Health(status="ok")


@router.get("/metrics", response_class=PlainTextResponse)
async def tell_metrics(request: Request) -> Any:
    """Counters and histograms in Prometheus's text format."""
    service: Service = request.app.state.service
    return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4")


def page_router(page: Path) -> APIRouter:
    """`/`: one page to talk to the models."""
    at_root = APIRouter()

    @at_root.get("/", include_in_schema=False)
    async def show_page() -> FileResponse:
        # Asked for anew each time: after an update the old page must not meet the new server.
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(page, headers=headers)

    return at_root
