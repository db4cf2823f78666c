"""What /metrics tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from finetune.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = kept = CollectorRegistry()
        self._requests = Counter(
            "finetune_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=kept
        )
        self._prompt = Counter("finetune_prompt_tokens", "Tokens of prompts.", ["model"], registry=kept)
        self._generated = Counter("finetune_generated_tokens", "Tokens of answers.", ["model"], registry=kept)
        first, whole = "From request to first token.", "From request to the end of the answer."
        self._first = Histogram(
            "finetune_time_to_first_token_seconds", first, ["model"], registry=kept, buckets=SECONDS
        )
        self._whole = Histogram("finetune_answer_seconds", whole, ["model"], registry=kept, buckets=SECONDS)
        gauges = {
            "finetune_waiting": ("Requests in the queue.", lambda: engine.waiting),
            "finetune_running": ("Requests that are being answered.", lambda: engine.running),
            "finetune_cache_use": ("Share of the cache's pages that is taken.", lambda: engine.cache_use),
        }
        for name, (what, value) in gauges.items():
            Gauge(name, what, registry=kept).set_function(value)

    def requested(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def answered(self, model: str, prompt: int, generated: int, seconds: float) -> None:
        """An answer has ended, whole or not."""
        self._prompt.labels(model).inc(prompt)
        self._generated.labels(model).inc(generated)
        self._whole.labels(model).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)
