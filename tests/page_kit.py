"""A browser without a window, and a small server that speaks as `finetune serve` does, also badly."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.serve.server import PAGE

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# As the real server sends it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
BASE: dict[str, Any] = {"id": "nano", "object": "model", "parent": None}
TUNED: dict[str, Any] = {"id": "stock-codes", "object": "model", "parent": "nano"}


def say(*deltas: dict[str, Any], ended: str = "stop") -> list[dict[str, Any]]:
    """The events of an answer."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": ended}]}
    return [*chunks, end, {"choices": [], "usage": {"completion_tokens": 7}}]


@dataclass
class FakeServer:
    """`answers` are taken one by one, by model; a number among the events is a pause in seconds, a string is
    sent as it is, None ends the connection. `asked` are the bodies of the requests."""

    answers: dict[str, list[list[Any]]] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=lambda: [TUNED, BASE])
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def of(self, model: str) -> list[dict[str, Any]]:
        """The requests to a model."""
        return [body for body in self.asked if body["model"] == model]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/v1/models" and self._allowed():
            self._send(200, json.dumps({"data": self.fake.models}).encode())
        elif self.path != "/v1/models":
            self._send(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.fake.asked.append(body)
        events = self.fake.answers[body["model"]].pop(0)
        if isinstance(events[0], int) and events[0] >= 400:
            self._send(events[0], json.dumps({"error": {"message": events[1]}}).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(events)
        except OSError:
            self.fake.asked.append({"model": body["model"], "closed": True})

    def _stream(self, events: Iterable[Any]) -> None:
        for event in events:
            if event is None:
                return
            if isinstance(event, float):
                time.sleep(event)
                continue
            self.wfile.write(
                event.encode() if isinstance(event, str) else f"data: {json.dumps(event)}\n\n".encode()
            )
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _allowed(self) -> bool:
        good = self.fake.key is None or self.headers.get("Authorization") == f"Bearer {self.fake.key}"
        if not good:
            self._send(401, b'{"error": {"message": "a key is needed"}}')
        return good

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """The fake at an address of its own."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def browser(profile: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Chrome]:
    """Headless Chromium; the test is skipped where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window: Chrome = selenium.Chrome(options, selenium.ChromeService(driver))
    try:
        # Narrower than any window may be made, and as dark as one likes.
        window.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield window
    finally:
        window.quit()
