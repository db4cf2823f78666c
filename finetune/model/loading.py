"""A checkpoint directory becomes a transformers model: memory-mapped, its experts still packed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from finetune.errors import FinetuneError
from finetune.model.attention import NAME as ATTENTION
from finetune.model.attention import use_packed_attention
from finetune.model.checkpoint import CheckpointInfo, inspect_checkpoint
from finetune.model.experts import DenseExperts, PackedExperts, Scratch
from finetune.model.kernels.stream import ExpertStream, require_host_memory
from finetune.model.lora import load_adapter
from finetune.model.places import resolve
from finetune.model.recompute import use_selective_recompute
from finetune.model.shrink import keep_embedding_on_host, quantise_attention


def load_model(
    where: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    nf4: bool = False,
    experts_on: Literal["device", "host"] = "device",
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer.

    `where` is a checkpoint directory, a hub id, a run directory (its base with its adapter) or `nano`;
    `adapter` a directory in PEFT's layout. `dtype` (bfloat16 by default) is that of attention, embeddings
    and the computation; expert blocks keep their bytes. `device` is the first GPU where there is one, else
    the CPU. For GPUs short of memory, `nf4` keeps attention in NF4 and the embedding on the host, and
    `experts_on="host"` keeps the expert blocks there.
    With an adapter the result is a `PeftModel` over the `GptOssForCausalLM`, ready for inference.
    Raises FinetuneError for anything wrong with the files.
    """
    place = resolve(where)
    adapter_path = Path(adapter) if adapter is not None else place.adapter
    dtype = dtype or torch.bfloat16
    model = load_base(place.base, dtype=dtype, device=device, nf4=nf4, experts_on=experts_on)
    tokenizer = load_tokenizer(place.base)
    if adapter_path is None:
        return model, tokenizer
    return load_adapter(model, adapter_path, base=place.base), tokenizer


def load_base(
    path: Path, *, dtype: torch.dtype, device: torch.device | str | None = None,
    nf4: bool = False, experts_on: Literal["device", "host"] = "device",
) -> GptOssForCausalLM:  # fmt: skip
    """The checkpoint's model in evaluation mode, all frozen, its tensors backed by the files' pages."""
    info = inspect_checkpoint(path)
    config = read_model_config(path, dtype)
    model = assemble(config, _map_tensors(info, dtype), packed=info.kind == "mxfp4")
    model.generation_config = _read_generation_config(path) or model.generation_config
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if nf4:
        quantise_attention(model, dtype)
        keep_embedding_on_host(model)
    if experts_on == "host" and device.type != "cpu":
        _keep_experts_on_host(model, info, device)
    return model.to(device).eval()


def assemble(config: GptOssConfig, tensors: dict[str, Tensor], *, packed: bool) -> GptOssForCausalLM:
    """The frozen model of these tensors, named as parameters are, on whatever device they are."""
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
        scratch = Scratch()
        for layer in model.model.layers:
            layer.mlp.experts = (PackedExperts if packed else DenseExperts)(config, scratch)
    model.load_state_dict(tensors, assign=True, strict=True)
    # Its frequencies are computed, not loaded, and came out on the meta device.
    model.model.rotary_emb = GptOssRotaryEmbedding(config=config)
    use_packed_attention(model)
    use_selective_recompute(model)
    model.lm_head.register_forward_pre_hook(_close_gaps)
    return model.requires_grad_(False)


def _close_gaps(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of several prompts generation asks the head for their last tokens, rows with gaps between: torch would
    copy the head's weights once for each prompt."""
    return tuple(rows.contiguous() for rows in inputs)


def _keep_experts_on_host(model: GptOssForCausalLM, info: CheckpointInfo, device: torch.device) -> None:
    if info.kind != "mxfp4":
        sentence = "model.experts_on: host needs experts in MXFP4; this checkpoint has them in bf16"
        raise FinetuneError(sentence, at=str(info.path))
    require_host_memory(sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8))
    stream = ExpertStream(device)
    for layer in model.model.layers:
        layer.mlp.experts.keep_on_host(stream)


def read_model_config(path: Path, dtype: torch.dtype) -> GptOssConfig:
    """The checkpoint's configuration as our model wants it."""
    try:
        config = GptOssConfig.from_pretrained(path)
        GptOssRotaryEmbedding(config=config)  # whose settings are looked at only when it is built
    except Exception as error:  # transformers raises whatever its code meets in a value it does not expect
        sentence = f"transformers cannot use this configuration ({_first_line(error)})"
        raise FinetuneError(sentence, at=str(path / "config.json")) from None
    return adapt_config(config, dtype)


def adapt_config(config: GptOssConfig, dtype: torch.dtype) -> GptOssConfig:
    """Ask for our attention, no quantizer and no router loss; changes and returns `config`."""
    # transformers would look for its own quantizer; the packed experts are ours.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config._attn_implementation = ATTENTION
    # The released 0.9 would swamp the loss; asking for router logits is what turns it on.
    config.output_router_logits = False
    return config


def _read_generation_config(path: Path) -> GenerationConfig | None:
    file = path / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FinetuneError(f"not a generation configuration ({_first_line(error)})", at=str(file)) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _map_tensors(info: CheckpointInfo, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors under our parameter names; those whose dtype already fits are views of the mapped file."""
    state: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in info.tensors.values()}):
        with safe_open(file, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                tensor = shard.get_tensor(name)
                # Scales keep their name beside the blocks', which take the weight's; the rest is as in ours.
                packed = tensor.dtype == torch.uint8
                state[name.removesuffix("_blocks")] = tensor if packed else tensor.to(dtype)
    return state


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory; raises FinetuneError where there is none that can be read."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FinetuneError("no tokenizer.json in the model directory", at=str(path))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise FinetuneError(f"not a readable tokenizer ({_first_line(error)})", at=str(file)) from None
    tokenizer.padding_side = "left"
    return tokenizer


def hash_frozen(model: nn.Module) -> str:
    """sha256 over name, shape and bytes of every parameter that is not trained; reads all of them."""
    digest = hashlib.sha256()
    frozen: list[tuple[str, Any]] = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    for name, parameter in sorted(frozen):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
