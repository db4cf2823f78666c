"""From files to a service that can be asked."""

from __future__ import annotations

from typing import Literal

import torch

from finetune.chat import HarmonyEncoder
from finetune.errors import FinetuneError
from finetune.model import load_base
from finetune.serve.adapters import Adapters
from finetune.serve.cache import KeyValueCache, free_bytes, plan_cache
from finetune.serve.engine import Engine
from finetune.serve.limits import Limits
from finetune.serve.metrics import Metrics
from finetune.serve.runner import Runner
from finetune.serve.service import Service
from finetune.serve.subject import Subject


def load(
    subject: Subject, *, dtype: Literal["bfloat16", "float32"] | None = None, limits: Limits | None = None
) -> Service:
    """Load the base and its adapters, and make room for keys and values in what memory is then left.

    `dtype` None is the run's, or bfloat16.

    Raises:
        FinetuneError: a file is wrong, an adapter belongs to another base, or memory is too small.
    """
    limits = limits or Limits()
    encoder = HarmonyEncoder.from_dir(subject.base)
    computes_in = dtype or ("float32" if subject.computes_in == "float32" else "bfloat16")
    kind: torch.dtype = getattr(torch, computes_in)
    model = load_base(subject.base, dtype=kind)
    longest = int(model.config.max_position_embeddings)
    if limits.context is not None and limits.context > longest:
        raise FinetuneError(f"--context {limits.context} is more than the model's {longest} tokens")
    adapters = Adapters(model, subject.adapters, base=subject.base)
    context = limits.context or longest
    free = free_bytes(model.device) if limits.cache_gb is None else limits.cache_gb * 1e9
    size = plan_cache(
        model.config, context=context, sequences=limits.batch, free=free, itemsize=kind.itemsize
    )
    runner = Runner(model, adapters, KeyValueCache(model.config, size, kind, model.device))
    engine = Engine(runner, queue=limits.queue)
    return Service(engine, encoder, subject, Metrics(engine), context=min(context, size.tokens))
