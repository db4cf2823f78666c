"""Less GPU memory for the weights that are not experts: attention in NF4, the embedding on the host.

NF4 keeps a weight in 4 bits on a grid made for normally distributed values, with a scale for every 64, itself
in 8 bits (Dettmers et al. 2023, "QLoRA", section 3): 4.13 bits a weight. bitsandbytes brings it. Attention's
four projections are 1.27 GB of gpt-oss-20b in bfloat16, 0.33 GB so; the embedding is 1.16 GB, of which a step
reads a row a token. The output head stays as it is: the loss multiplies with slices of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from finetune.errors import FinetuneError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class HostEmbedding(nn.Embedding):
    """Stays in host memory wherever the model moves; the rows that are looked up go where the ids are."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input.to(self.weight.device), self.weight).to(input.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostEmbedding:
        return self


def quantise_attention(model: GptOssForCausalLM, dtype: torch.dtype) -> None:
    """Have attention's weights turned to NF4 when the model moves to its device; products are in `dtype`."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        sentence = "model.dense: nf4 needs the package bitsandbytes, which does not load here"
        raise FinetuneError(f"{sentence}: {error}") from None
    for layer in model.model.layers:
        for name in PROJECTIONS:
            dense: nn.Linear = getattr(layer.self_attn, name)
            packed = Linear4bit(
                dense.in_features, dense.out_features, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            packed.weight = Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
            packed.bias = dense.bias
            # On some CPUs evaluation would re-pack the weight into a layout that cannot be trained through.
            packed.support_avx512bf16_for_cpu = False
            setattr(layer.self_attn, name, packed)


def keep_embedding_on_host(model: GptOssForCausalLM) -> None:
    """Exchange the embedding for one that does not move."""
    table = model.get_input_embeddings().weight
    on_host = HostEmbedding(table.shape[0], table.shape[1], device="meta")
    on_host.weight = table
    model.set_input_embeddings(on_host)


@contextmanager
def known_as_quantised(model: GptOssForCausalLM) -> Iterator[None]:
    """While PEFT puts LoRA on: it looks for NF4 only in a model that says so.

    Later the mark would have TRL cast the adapter to bfloat16, in which small updates are lost.
    """
    quantised = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if quantised:
        model.is_loaded_in_4bit = True
    try:
        yield
    finally:
        if quantised:
            del model.is_loaded_in_4bit
