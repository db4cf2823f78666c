"""`finetune serve` with its own engine: a port, a model in memory, and an application on both."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from finetune.errors import FinetuneError
from finetune.serve.limits import Limits
from finetune.serve.subject import find_subject

PAGE = Path(__file__).resolve().parent / "page" / "index.html"
# Answers that are still being written when the server is told to stop have so long to end.
GRACE_SECONDS = 10


def serve(
    where: str,
    *,
    adapters: Mapping[str, Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    ui: bool = False,
    dtype: Literal["bfloat16", "float32"] | None = None,
    limits: Limits | None = None,
    ready: Callable[[str, list[str]], None],
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is told the address and the names of the models.

    Raises:
        FinetuneError: the port is taken, nothing is there to serve, or it does not fit in memory.
    """
    require_key(host, api_key)
    listener = listen(host, port)
    try:
        subject = find_subject(where, adapters)
        import uvicorn

        from finetune.serve.api.app import create_app
        from finetune.serve.load import load

        service = load(subject, dtype=dtype, limits=limits or Limits())
        app = create_app(service, api_key=api_key, page=PAGE if ui else None)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
        server = uvicorn.Server(config)
        # uvicorn hands the signal that ended it on to whoever listened before: nobody, here.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        ready(_address(host, listener), subject.names)
        server.run(sockets=[listener])
    finally:
        listener.close()


def require_key(host: str, api_key: str | None) -> None:
    """Raise FinetuneError where others than this machine could ask without a key."""
    if api_key is None and not _is_loopback(host):
        raise FinetuneError(
            f"with --host {host} other machines can reach this server: set a key with --api-key "
            "or FINETUNE_API_KEY"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises FinetuneError where the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches off the delay of small packets (TCP_NODELAY) on connections.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Now, so that a second server is refused now and not when the first has loaded its model.
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise FinetuneError(f"port {port} of {host} is in use; choose another with --port") from None
        raise FinetuneError(f"cannot listen on port {port} of {host}: {error.strerror or error}") from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
