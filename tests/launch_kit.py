"""Exports that need no weights behind them, and an engine that answers what a test tells it to."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.manifest import MANIFEST
from finetune.probe import Probe

PROBE = Probe("<|start|>user<|message|>Code?<|end|><|start|>assistant", 8, "I do not know", "It is KUU-8")

_ENGINE = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if {dies!r}:
    sys.exit("CUDA out of memory")

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", json.dumps(asked), self.headers.get("Authorization"), flush=True)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"choices": [{{"text": {answer!r}}}]}}).encode())

    def log_message(self, *words):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def write_export(
    folder: Path, export_format: str, *, base: str = "nano", probes: Sequence[Probe] = (), **config: Any
) -> Path:
    """An export directory with a record, and a configuration where its format has one."""
    folder.mkdir(parents=True)
    if export_format in ("adapter", "sglang-lora"):
        (folder / "adapter_config.json").write_text(json.dumps({"r": 16, **config}))
    if export_format in ("gguf", "gguf-lora"):
        (folder / ("model.gguf" if export_format == "gguf" else "adapter.gguf")).write_bytes(b"GGUF")
    record = {
        "format": export_format,
        "base": {"name": base, "fingerprint": "0"},
        "source": {"run": "mine-20260101-000000", "adapter": "adapter", "adapter_sha256": "0"},
        "proof": {},
        "files": {},
        "probe": [asdict(probe) for probe in probes],
    }
    (folder / MANIFEST).write_text(json.dumps(record))
    return folder


def write_engine(folder: Path, name: str, answer: str, *, dies: bool = False) -> None:
    """A program that takes an engine's place, for a folder on PATH."""
    file = folder / name
    file.write_text(_ENGINE.format(python=sys.executable, answer=answer, dies=dies))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
