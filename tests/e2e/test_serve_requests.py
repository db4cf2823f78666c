"""What the server says to requests that are wrong, too large, too many, or abandoned; never a 5xx."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.core.result import Ok

from finetune.serve.api.guard import BODY_LIMIT
from finetune.serve.limits import Limits
from tests.checkpoints import write_random_checkpoint
from tests.serve_kit import Running, running, until

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
UNKEPT = {"name": "f", "strict": True, "parameters": {"type": "object", "not": {"required": ["a"]}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A random model, which greedily never ends an answer; one request at a time, two more may wait."""
    base = write_random_checkpoint(tmp_path_factory.mktemp("models") / "base", tokenizer="bytes", layers=2)
    page = base / "page.html"
    page.write_text("<title>a page</title>")
    with running(base, page=page, limits=Limits(batch=1, queue=2, context=2000)) as found:
        yield found


@pytest.fixture
def slow(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take a hundredth of a second at least, so that no answer ends before a test has looked at it."""
    step = server.service.engine.runner.step

    def slowly(*work: Any) -> Any:
        time.sleep(0.01)
        return step(*work)

    monkeypatch.setattr(server.service.engine.runner, "step", slowly)


def post(server: Running, body: Any, path: str = CHAT, **options: Any) -> httpx.Response:
    what = {"content": body} if isinstance(body, bytes | str) else {"json": body}
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(server.url + path, headers=headers, timeout=60, **what, **options)


def refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error["message"]


WRONG: dict[str, tuple[int, Any, str]] = {
    "an unknown model": (404, {"model": "gpt-4"}, "there is no model 'gpt-4' here; this server has base"),
    "no messages": (400, {"messages": []}, "messages"),
    "messages of another type": (400, {"messages": "hello"}, "messages: Input should be a valid list"),
    "an unknown role": (400, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    "an image": (
        400, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "the model reads text only",
    ),
    "temperature as text": (400, {"temperature": "hot"}, "temperature: Input should be a valid number"),
    "a temperature too high": (400, {"temperature": 3}, "should be less than or equal to 2"),
    "an unknown parameter": (400, {"modalities": ["text"]}, "'modalities' is not supported by this server"),
    "too many answers": (400, {"n": 17}, "n: Input should be less than or equal to 16"),
    "a penalty too high": (400, {"frequency_penalty": 3}, "should be less than or equal to 2"),
    "a bias of no token": (400, {"logit_bias": {"x": 1}}, "logit_bias"),
    "a bias of a token beyond the last": (400, {"logit_bias": {"99999": 1}}, "names the token 99999"),
    "a forced call without tools": (400, {"tool_choice": "required"}, "there is no such tool"),
    "a forced call of another tool": (
        400, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "a call of g"
    ),
    "strict arguments that cannot be kept": (
        400, {"tools": [{"type": "function", "function": UNKEPT}]}, "this JSON schema cannot be enforced"
    ),
    "a tool of another kind": (400, {"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "a schema that is none": (400, {"response_format": SCHEMA}, "this JSON schema cannot be enforced"),
    "logprobs without asking for them": (400, {"top_logprobs": 3}, "top_logprobs needs logprobs"),
    "too many stop strings": (400, {"stop": list("abcde")}, "stop"),
    "an empty stop string": (400, {"stop": ""}, "a stop string must not be empty"),
    "an endless answer": (400, {"max_tokens": 5000}, "is more than the 2000 of this server"),
    "a prompt too long": (
        400, {"messages": [{"role": "user", "content": "x" * 3000}]}, "is more than the 2000 of this server"
    ),
    "half a character": (400, {"messages": [{"role": "user", "content": "\ud800"}]}, "half"),
    "half a character in a name": (404, {"model": "\ud800"}, "there is no model"),
    "a result without a call": (400, {"messages": [{"role": "tool", "content": "x"}]}, "no such call"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_said_in_a_sentence(server: Running, what: str) -> None:
    status, change, words = WRONG[what]
    refused(post(server, json.dumps({**HELLO, "max_tokens": 2, **change})), status, words)


@pytest.mark.parametrize("body", ["{", "", "[]", '"text"', "\xff", '{"a":' * 20000])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_body_that_is_no_json_object_is_refused(server: Running, body: str, path: str) -> None:
    response = post(server, body.encode("latin-1"), path)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_schema_of_a_tool_that_is_nested_without_end_is_refused(server: Running) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert post(server, {**HELLO, "tools": [tool], "max_tokens": 2}).status_code == 400


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_before_it_is_read(server: Running, announced: bool) -> None:
    sent = 0

    def ten_megabytes() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(160):
            sent += 1 << 16
            yield b" " * (1 << 16)

    host = urlsplit(server.url).netloc
    connection = http.client.HTTPConnection(host, timeout=60)
    headers = {"Content-Type": "application/json"}
    if announced:
        connection.putrequest("POST", CHAT)
        for name, value in {**headers, "Content-Length": str(10 << 20)}.items():
            connection.putheader(name, value)
        connection.endheaders()
    else:
        headers["Transfer-Encoding"] = "chunked"
        # The server may close the connection while there is still something to send.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", CHAT, body=ten_megabytes(), headers=headers, encode_chunked=True)
        assert sent > BODY_LIMIT
    response = connection.getresponse()
    assert response.status == 413
    assert "larger than 4 MiB" in json.loads(response.read())["error"]["message"]


def test_whoever_leaves_frees_the_place(server: Running, slow: None) -> None:
    engine = server.service.engine
    with server.client().chat.completions.create(**HELLO, stream=True) as stream:
        next(iter(stream))
        until(lambda: engine.running == 1)
    until(lambda: engine.running == 0)
    body = json.dumps(HELLO).encode()
    lines = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    head = "\r\n".join([f"POST {CHAT} HTTP/1.1", *lines, "", ""])
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(head.encode() + body)
        until(lambda: engine.running == 1)
    until(lambda: engine.running == 0)
    assert engine.cache_use == 0 and engine.waiting == 0
    counted = 'finetune_requests_total{endpoint="/v1/chat/completions",status="499"} 1.0'
    until(lambda: counted in httpx.get(server.url + "/metrics").text)


def test_a_full_queue_says_when_to_come_back(server: Running, slow: None) -> None:
    client, engine = server.client(), server.service.engine
    with ThreadPoolExecutor(3) as pool:
        leave = threading.Event()

        def hold() -> None:
            with client.chat.completions.create(**HELLO, stream=True) as stream:
                next(iter(stream))
                leave.wait(20)

        holders = [pool.submit(hold)]
        until(lambda: engine.running == 1)
        holders += [pool.submit(hold) for _ in range(2)]
        until(lambda: engine.waiting == 2)
        response = post(server, HELLO)
        leave.set()
    refused(response, 429, "2 requests wait already")
    assert int(response.headers["retry-after"]) >= 1
    until(lambda: engine.running == engine.waiting == 0)
    for holder in holders:
        holder.result()


def test_metrics_health_and_page_are_there(server: Running) -> None:
    post(server, {**HELLO, "max_tokens": 3})
    text = httpx.get(server.url + "/metrics").text
    assert 'finetune_generated_tokens_total{model="base"}' in text
    assert 'finetune_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    assert 'finetune_time_to_first_token_seconds_count{model="base"}' in text
    assert "finetune_running 0.0" in text and "finetune_cache_use 0.0" in text
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    page = httpx.get(server.url + "/")
    assert "a page" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    refused(httpx.get(server.url + "/v1/nothing"), 404)
    refused(httpx.get(server.url + CHAT), 405)


def test_the_key_is_asked_for_and_only_the_right_one_is_taken(server: Running, tmp_path: Path) -> None:
    with running(server.service.subject.base, api_key="secret") as locked:
        refused(post(locked, HELLO), 401, "Authorization: Bearer KEY")
        refused(post(locked, HELLO, headers={"Authorization": "Bearer wrong"}), 401)
        with pytest.raises(openai.AuthenticationError):
            locked.client(api_key="secrets").models.list()
        assert locked.client(api_key="secret").models.list().data[0].id == "base"
        assert httpx.get(locked.url + "/health").status_code == 200


def test_a_step_that_fails_ends_its_answers_and_not_the_server(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("this step is broken")

    with monkeypatch.context() as patch:
        patch.setattr(server.service.engine.runner, "step", broken)
        refused(post(server, HELLO), 500, "this step is broken")
        chunks = post(server, {**HELLO, "stream": True}).text
        assert "event: error" in chunks and "this step is broken" in chunks
    assert post(server, {**HELLO, "max_tokens": 2}).status_code == 200


def test_nothing_that_the_openapi_document_allows_or_forbids_breaks_the_server(server: Running) -> None:
    document = schemathesis.openapi.from_url(server.url + "/openapi.json")
    kept_to = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    limits = {"/v1/responses": "max_output_tokens"}
    for found in document.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        right = operation.as_strategy()
        wrong = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=20, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
        )
        @given(case=right | wrong if list(operation.body) else right)
        def holds(case: schemathesis.Case[Any]) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                # A name that is not served would end most of them early, and long answers take long.
                case.body.pop("max_completion_tokens", None)
                case.body |= {"model": "base", limits.get(case.operation.path, "max_tokens"): 2}
            case.call_and_validate(checks=kept_to, timeout=60)

        holds()
