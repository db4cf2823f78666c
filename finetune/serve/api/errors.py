"""Every mistake as OpenAI's API tells it: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from finetune.errors import FinetuneError, sentence_of
from finetune.serve.engine import QueueFull
from finetune.serve.service import AnswerFailed, ContextOverflow, ModelNotFound

logger = logging.getLogger(__name__)

# Seconds after which to try again when the queue is full: some answers will have ended by then.
RETRY_AFTER = 1
# Status and code of our own errors; any other FinetuneError is a mistake in the request.
KINDS: dict[type[FinetuneError], tuple[int, str]] = {
    ModelNotFound: (404, "model_not_found"),
    ContextOverflow: (400, "context_length_exceeded"),
    QueueFull: (429, "queue_full"),
    AnswerFailed: (500, "answer_failed"),
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


# For the OpenAPI document of every endpoint that takes a body.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server could not finish the answer."},
}


class AsciiResponse(JSONResponse):
    """JSON that can be sent whatever the request held: half a character is written as an escape."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    type_ = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> AsciiResponse:
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 429 else None
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else headers
    return AsciiResponse(error_body(status, message, param=param, code=code), status, headers)


def told(error: Exception) -> tuple[int, str, str | None]:
    """Status, message and code of an error of ours."""
    if isinstance(error, RecursionError):
        return 400, "the request is nested too deeply", None
    if isinstance(error, UnicodeError):
        return 400, "the request holds text that is not Unicode: half a surrogate pair", None
    if not isinstance(error, FinetuneError):
        return 500, sentence_of(error), "server_error"
    status, code = KINDS.get(type(error), (400, None))
    return status, str(error), code


def install(app: FastAPI) -> None:
    """Turn what endpoints raise into that shape."""

    @app.exception_handler(FinetuneError)
    @app.exception_handler(RecursionError)
    @app.exception_handler(UnicodeError)
    def ours(request: Request, error: Exception) -> AsciiResponse:
        status, message, code = told(error)
        return error_response(status, message, code=code)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> AsciiResponse:
        message, param = _first_problem(error)
        return error_response(400, message, param=param)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> AsciiResponse:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """A sentence about the first thing that is wrong, and the parameter it is about."""
    problem = error.errors()[0]
    # Names of the variants of a union stand among the keys; only what is in the request helps.
    place = [str(part) for part in problem["loc"][1:] if not str(part).startswith(("function-", "list["))]
    param = ".".join(place) or None
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']}", None
    if problem["type"] == "extra_forbidden":
        return f"{param!r} is not supported by this server", param
    if problem["type"] == "missing":
        return f"{param or 'the body'} is missing", param
    text = str(problem["msg"]).removeprefix("Value error, ")
    return (f"{param}: {text}" if param else text), param
