"""Completions by the transformers model: in batches for measuring, token by token for talking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from finetune.model.cache import GrowingCache
from finetune.model.cpu_settings import fast_float32
from finetune.model.kept import keep_decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.chat.encode import HarmonyEncoder


def generate(
    model: PreTrainedModel,
    encoder: HarmonyEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Complete every prompt (token ids); the answers come in the order of the prompts.

    An answer ends with the stop token that the model wrote (`encoder.stop_ids`), or without one where
    `max_new_tokens` cut it off. `temperature` 0 is greedy. The same seed and batch size give the same
    answers. `on_done` is told how many prompts each finished batch held.
    """
    # Longest first: like lengths waste little padding, and a batch that does not fit memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    config = _config(encoder, max_new_tokens, temperature, top_p)
    with _inference(model):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = [prompts[i] for i in members]
            for i, answer in zip(members, _complete(model, batch, config, seed + start), strict=True):
                answers[i] = answer
            if on_done:
                on_done(len(members))
    return answers


def generate_streaming(
    model: PreTrainedModel,
    encoder: HarmonyEncoder,
    prompt: Sequence[int],
    *,
    on_token: Callable[[int], None],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Complete one prompt, handing every token to `on_token` as it is made; what that raises ends it."""
    config = _config(encoder, max_new_tokens, temperature, top_p)
    with _inference(model):
        return _complete(model, [prompt], config, seed, streamer=_TokenStreamer(on_token))[0]


class _TokenStreamer(BaseStreamer):  # type: ignore[misc]  # transformers is untyped here
    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self.seen_prompt:
            self.on_token(int(value.item()))
        self.seen_prompt = True

    def end(self) -> None:
        pass


def _config(
    encoder: HarmonyEncoder, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(encoder.stop_ids),
        "pad_token_id": encoder.pad_id,
        "use_cache": True,
    }
    if temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    # transformers fills an absent top_k with 50, which would cut the distribution that was asked for.
    return GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, **common)


def _complete(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seed: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """One batch: prompts padded on the left, each answer cut after its first stop token."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), int(config.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            past_key_values=GrowingCache(model.config),
            generation_config=config,
            streamer=streamer,
        )
    return [_until_stop(row, config.eos_token_id) for row in written[:, width:].tolist()]


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, decoded experts kept; eval mode, as checkpointing switches off the cache in training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), fast_float32(), keep_decoded(model):
            yield
    finally:
        model.train(training)
