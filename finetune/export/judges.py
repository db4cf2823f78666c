"""Programs that did not write the exports, to be asked: transformers with PEFT, OpenAI's code, llama.cpp.

Each is a function from token ids to logits `[tokens, vocabulary]` in float32, computed in float32 where the
program can, so that what is left of a difference is the export's.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from finetune.errors import FinetuneError
from finetune.export import gguf as gguf_export
from finetune.export import gguf_lora, openai
from finetune.export.peft_files import Adapter
from finetune.export.subject import Base, Subject
from finetune.model import inspect_checkpoint

Logits = Callable[[Sequence[int]], Tensor]
TRANSFORMERS, OPENAI, LLAMA = "transformers", "OpenAI's gpt_oss.torch", "llama.cpp"
JUDGE_OF = {
    "adapter": TRANSFORMERS,
    "bf16": TRANSFORMERS,
    "mxfp4": TRANSFORMERS,
    "sglang-lora": TRANSFORMERS,
    "openai": OPENAI,
    "gguf": LLAMA,
    "gguf-lora": LLAMA,
}
_PACKAGES = {OPENAI: "gpt_oss", LLAMA: "llama_cpp"}
# llama.cpp's number for a key-value cache in float32.
F32 = 0


def why_not(judge: str, bytes_needed: int) -> str | None:
    """Why a judge cannot be asked; None when it can. `bytes_needed`: the model's size in float32."""
    package = _PACKAGES.get(judge)
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    free = free_memory()
    if free is not None and bytes_needed > free:
        return f"it needs {bytes_needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    return None


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


@contextmanager
def asked(export_format: str, folder: Path, subject: Subject, longest: int) -> Iterator[Logits]:
    """The judge of a format, with the export in `folder` loaded, for rows of up to `longest` tokens.

    Raises:
        FinetuneError: the judge does not load the export.
    """
    try:
        if export_format == "openai":
            yield _openai(folder / openai.FOLDER)
        elif export_format in ("gguf", "gguf-lora"):
            with TemporaryDirectory(prefix="finetune-verify-") as scratch:
                yield _llama(export_format, folder, subject, Path(scratch), longest)
        else:
            yield _transformers(export_format, folder, subject.base)
    except FinetuneError:
        raise
    except (ValueError, RuntimeError, OSError, KeyError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = JUDGE_OF[export_format]
        raise FinetuneError(f"{name} does not load this export ({reason})", at=str(folder)) from error


def transformers_logits(model: Any) -> Logits:
    """Of a model with transformers' signature."""

    def logits(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
        return out.float().cpu()

    return logits


def stock_model(path: Path, dtype: torch.dtype) -> Any:
    """transformers' own model; experts in MXFP4 are decoded."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    packed = inspect_checkpoint(path).kind == "mxfp4"
    found, report = GptOssForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        output_loading_info=True,
        # By itself it decodes only where it has no kernels for them.
        **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
    )
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])
    if wrong:
        raise FinetuneError(f"transformers does not find its tensors here, first {wrong[0]}", at=str(path))
    return found.eval()


def _transformers(export_format: str, folder: Path, base: Base) -> Logits:
    if export_format in ("bf16", "mxfp4"):
        return transformers_logits(stock_model(folder, torch.float32))
    model = stock_model(base.path, torch.float32)
    if export_format == "sglang-lora":
        add_per_expert(model, Adapter.read(folder))
        return transformers_logits(model)
    from peft import PeftModel

    return transformers_logits(PeftModel.from_pretrained(model, str(folder)).eval())


def add_per_expert(model: Any, adapter: Adapter) -> None:
    """Add an adapter of SGLang's layout to a stock model, as SGLang says it reads one.

    Written apart from the export, tensor by tensor: gate's rows are the even ones of gate_up, up's the odd.
    """
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    for key, a in adapter.tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        delta = scale * adapter.tensors[key.replace("lora_A", "lora_B")] @ a
        words = key.removeprefix("base_model.model.").split(".")
        layer, projection = model.model.layers[int(words[2])], words[-3]
        with torch.no_grad():
            if projection == "down_proj":
                layer.mlp.experts.down_proj[int(words[5])] += delta.T
            elif projection in ("gate_proj", "up_proj"):
                start = 0 if projection == "gate_proj" else 1
                layer.mlp.experts.gate_up_proj[int(words[5]), :, start::2] += delta.T
            else:
                getattr(layer.self_attn, projection).weight += delta


def _openai(folder: Path) -> Logits:
    from gpt_oss.torch.model import Transformer

    model = Transformer.from_checkpoint(str(folder), device=torch.device("cpu")).float().eval()

    def logits(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(torch.tensor(list(ids), dtype=torch.int32))
        return out.float()

    return logits


def _llama(export_format: str, folder: Path, subject: Subject, scratch: Path, longest: int) -> Logits:
    """llama.cpp rounds the activations that meet MXFP4 to 8 bits, so the file is first decoded to float32."""
    lora = None
    model = folder / gguf_export.FILE
    if export_format == "gguf-lora":
        lora, model = str(folder / gguf_lora.FILE), scratch / "base.gguf"
        bare = Subject(subject.base, subject.fingerprint, None, None)
        gguf_export.write_gguf(bare, scratch)
        (scratch / gguf_export.FILE).rename(model)
    decoded = scratch / "float32.gguf"
    decode_gguf(model, decoded)
    return _llama_logits(decoded, longest, lora_path=lora, type_k=F32, type_v=F32)


def llama_as_it_is(folder: Path, longest: int) -> Logits:
    """llama.cpp with the file as users load it: its own kernels, activations in 8 bits, a cache in f16."""
    return _llama_logits(folder / gguf_export.FILE, longest)


def _llama_logits(file: Path, longest: int, **options: Any) -> Logits:
    from llama_cpp import Llama

    llama = Llama(
        str(file),
        n_ctx=longest,
        n_batch=longest,
        n_threads=max(1, (os.cpu_count() or 1) // 2),
        logits_all=True,
        verbose=False,
        **options,
    )

    def logits(ids: Sequence[int]) -> Tensor:
        llama.reset()
        llama.eval(list(ids))
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    return logits


def decode_gguf(source: Path, out: Path) -> None:
    """Write the same model with every tensor in float32, by the gguf package alone."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
