"""`finetune serve`: with the engine that comes along, or by starting another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.cli_common import Debug, Json, command
from finetune.errors import FinetuneError

Served = Annotated[
    str, typer.Argument(metavar="RUN|EXPORT|CHECKPOINT", help="A run, an export, a model, a hub id or nano.")
]
More = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=DIR", help="One more adapter of the same base; may be given several times."),
]
Engine = Annotated[
    Literal["local", "vllm", "sglang", "llama.cpp"],
    typer.Option(help="Which program answers; all but local have to be installed."),
]
Host = Annotated[str, typer.Option(help="Where to listen; beyond this machine it takes a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")]
Key = Annotated[str | None, typer.Option(envvar="FINETUNE_API_KEY", help="What clients have to send.")]
Page = Annotated[bool, typer.Option("--ui", help="Local engine: a page at / to talk to base and tuned.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"] | None,
    typer.Option(help="Local engine: what to compute in; the run's, or bfloat16, unless given."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Longest prompt and answer in tokens; the model's unless given."),
]
Batch = Annotated[int, typer.Option(min=1, help="Local engine: requests answered at once.")]
Waiting = Annotated[int, typer.Option(min=1, help="Local engine: requests that may wait; more get 429.")]
CacheGb = Annotated[
    float | None,
    typer.Option(min=0, help="Local engine: memory for keys and values; a share of the free unless given."),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Other engines: the base of an adapter in the form that they load."),
]
Print = Annotated[bool, typer.Option("--print", help="Other engines: only print the command that starts it.")]


# Settings that mean nothing to the other kind of engine.
OF_LOCAL = ("ui", "dtype", "batch", "queue", "cache_gb")
OF_OTHERS = ("base", "print_only")


def serve(
    context: typer.Context,
    where: Served,
    adapter: More = None,
    engine: Engine = "local",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    ui: Page = False,
    dtype: Dtype = None,
    longest: Context = None,
    batch: Batch = 32,
    queue: Waiting = 256,
    cache_gb: CacheGb = None,
    base: Base = None,
    print_only: Print = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve base and tuned model over OpenAI's API: chat, completions, responses, models; Ctrl-C ends it.

    --json prints one object when the server is ready: its address and the names of its models.
    """
    with command(as_json, debug, libraries=True) as output:
        adapters = _named(adapter or [])

        def ready(url: str, models: list[str]) -> None:
            if as_json:
                output.json({"url": url, "models": models})
            elif engine == "local":
                typer.echo(_welcome(url, models, ui))

        _refuse_settings_of_another(context, engine)
        if engine != "local":
            from finetune.serve.launch import Address, launch

            address = Address(host, port, api_key, longest)
            raise typer.Exit(
                launch(
                    where, engine, address, adapters=adapters, base=base, print_only=print_only, ready=ready
                )
            )
        from finetune.serve.limits import Limits
        from finetune.serve.server import serve as run

        run(
            where,
            adapters=adapters,
            host=host,
            port=port,
            api_key=api_key,
            ui=ui,
            dtype=dtype,
            limits=Limits(batch, queue, longest, cache_gb),
            ready=ready,
        )


def _refuse_settings_of_another(context: typer.Context, engine: str) -> None:
    for parameter in context.command.params:
        name, source = str(parameter.name), context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        if engine != "local" and name in OF_LOCAL:
            raise FinetuneError(f"{parameter.opts[0]} is a setting of the local engine; {engine} has its own")
        if engine == "local" and name in OF_OTHERS:
            raise FinetuneError(
                f"{parameter.opts[0]} is a setting of the other engines; choose one with --engine"
            )


def _named(given: list[str]) -> dict[str, Path]:
    """`NAME=DIR` by name."""
    adapters: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise FinetuneError(f"--adapter is NAME=DIR, as in mine=runs/latest/adapter, not {text!r}")
        if name in adapters:
            raise FinetuneError(f"two adapters are called {name!r}")
        adapters[name] = Path(folder)
    return adapters


def _welcome(url: str, models: list[str], ui: bool) -> str:
    body = json.dumps({"model": models[0], "messages": [{"role": "user", "content": "Hello"}]})
    lines = [f"serving {', '.join(models)} at {url}/v1"]
    if ui:
        lines.append(f"the page to talk to them: {url}/")
    lines.append(f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    return "\n".join(lines)
