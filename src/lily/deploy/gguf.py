"""An exported LoRA as one GGUF file, which llama.cpp loads beside a GGUF base model (`--lora FILE`).

Two things differ from PEFT's file: tensors have GGUF's names, and the rows of q and k are reordered for architectures
whose base models the GGUF conversion reorders, because llama.cpp rotates adjacent channels of a head (RoPE) and
transformers its two halves.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lily.deploy.card import HUB_ID
from lily.deploy.lora import LoraExport
from lily.deploy.lora_layer import Layer
from lily.errors import LilyError
from lily.io.atomic import new_file

PROVENANCE_KEY = "lily.provenance"
OTHERWISE = (
    "export --to merged instead, convert that folder with llama.cpp's convert_hf_to_gguf.py and use it without a LoRA"
)


@dataclass(frozen=True)
class Family:
    """A model family in GGUF."""

    architecture: str  # GGUF's name
    reorders: bool = False  # q and k rows are reordered


# transformers' model_type -> family, for models whose outputs were compared with llama.cpp's (tests/test_llama_cpp.py).
FAMILIES = {
    "llama": Family("llama", reorders=True),
    "mistral": Family("llama", reorders=True),
    "smollm3": Family("smollm3", reorders=True),
    "granite": Family("granite", reorders=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "phi3": Family("phi3"),
}


def write_gguf(
    export: LoraExport,
    base_config: Any,
    file: str | Path,
    *,
    overwrite: bool = False,
    name: str | None = None,
    license: str | None = None,
) -> None:
    """Write an exported LoRA as a GGUF file in float32.

    A layer with A (rank, in) and B (out, rank) becomes `blk.N.<name>.weight.lora_a` (rank, in) and `.lora_b` (out,
    rank).

    Args:
        export: from `as_lora(model, target="llama.cpp")`.
        base_config: configuration of the base model: a `PretrainedConfig`, a `config.json` or its folder.
        file: the file to write, atomically.
        overwrite: replace an existing file.
        name: of the adapter, stored in the file.
        license: of the adapter, stored in the file.

    Raises:
        LilyError: if gguf is not installed, llama.cpp cannot read such an adapter, the architecture is not supported,
            the configuration belongs to another model, or the file exists.
        OSError: if it cannot be written; nothing is left behind.
    """
    gguf = _gguf("writing")
    config = _config(base_config)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise LilyError(
            f"GGUF LoRAs can be written for model_type {', '.join(FAMILIES)}; the base model's is {kind!r}: {OTHERWISE}"
        )
    family = FAMILIES[kind]
    alpha = _alpha(export)
    names = _names(list(export.layers), config, family)
    tensors = {names[name]: _reordered(name, layer, config, family) for name, layer in export.layers.items()}
    with new_file(file, overwrite) as path:
        writer = gguf.GGUFWriter(path, family.architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _describe(writer, name, license, str(export.provenance.get("base_model") or ""))
            writer.add_string(PROVENANCE_KEY, json.dumps(export.provenance, ensure_ascii=False))
            for name, (A, B) in tensors.items():
                writer.add_tensor(f"{name}.weight.lora_a", A.float().contiguous().numpy())
                writer.add_tensor(f"{name}.weight.lora_b", B.float().contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _describe(writer: Any, name: str | None, license: str | None, base: str) -> None:
    """GGUF's own metadata about a model, as far as they are known."""
    if name is not None:
        writer.add_name(name)
    if license is not None:
        writer.add_license(license)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        if HUB_ID.match(base):
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def describe_gguf(file: Path) -> dict[str, Any]:
    """Describe a GGUF file for `lily inspect`: kind, config, tensors, and provenance if it has one.

    Raises:
        LilyError: if gguf is not installed, or the file cannot be read.
    """
    gguf = _gguf("reading")
    try:
        reader = gguf.GGUFReader(file)
        names = ("general.architecture", gguf.Keys.Adapter.LORA_ALPHA)
        config = {name: reader.fields[name].contents() for name in names if name in reader.fields}
        adapter = "general.type" in reader.fields and reader.fields["general.type"].contents() == gguf.GGUFType.ADAPTER
        origin = json.loads(reader.fields[PROVENANCE_KEY].contents()) if PROVENANCE_KEY in reader.fields else None
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise LilyError(f"{file}: not a readable GGUF file ({error})") from None
    sizes = {part: [math.prod(map(int, t.shape)) for t in reader.tensors if t.name.endswith(f".{part}")]
             for part in ("lora_a", "lora_b")}  # fmt: skip
    tensors = {part: {"count": len(s), "parameters": sum(s)} for part, s in sizes.items() if s}
    facts = {"kind": "GGUF LoRA" if adapter else "GGUF model", "config": config, "tensors": tensors}
    return facts if origin is None else {**facts, "provenance": origin}


def _gguf(what: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise LilyError(f'{what} GGUF needs gguf; pip install "lily-peft[sft]", or pip install gguf') from None
    return gguf


def _config(base_config: Any) -> Any:
    """The configuration, read by transformers, since a file omits default values."""
    if not isinstance(base_config, (str, Path)):
        return base_config
    from transformers import AutoConfig

    path = Path(base_config).expanduser()
    if not (path if path.suffix == ".json" else path / "config.json").is_file():
        raise LilyError(f"{path}: no config.json; name the base model's folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise LilyError(f"{path}: not the config.json of a known model: {error}") from None


def _alpha(export: LoraExport) -> float:
    """The one alpha of the file, which llama.cpp divides by each layer's rank."""
    if export.other:
        raise LilyError(
            f"llama.cpp reads only A and B, and the export also holds {sorted(export.other)[0]}; "
            'use as_lora(model, target="llama.cpp")'
        )
    alphas = {layer.scale * layer.A.shape[0] for layer in export.layers.values()}
    if len(alphas) != 1:
        raise LilyError(
            "a GGUF LoRA has one alpha for all layers, and this export has "
            f'{", ".join(f"{a:g}" for a in sorted(alphas))}; use as_lora(model, target="llama.cpp")'
        )
    return float(alphas.pop())


def _names(layers: list[str], config: Any, family: Family) -> dict[str, str]:
    """Layer -> its name in GGUF, such as `blk.0.attn_q`."""
    import gguf

    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.architecture)
    known = gguf.get_tensor_name_map(architecture, int(config.num_hidden_layers))
    names = {layer: known.get_name(layer) for layer in layers}
    if "output" in names.values() and getattr(config, "tie_word_embeddings", False):
        raise LilyError(
            "llama.cpp cannot adapt an output layer that is also the embedding (tie_word_embeddings): train without "
            f"lm_head, or {OTHERWISE}"
        )
    missing = [layer for layer, name in names.items() if name is None]
    if missing:
        raise LilyError(
            f"llama.cpp's {family.architecture} has no layer for {missing[0]} ({len(missing)} of {len(layers)} layers "
            f"are missing); {OTHERWISE}"
        )
    return names


def _reordered(name: str, layer: Layer, config: Any, family: Family) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), with rows in llama.cpp's order."""
    if not name.endswith((".q_proj", ".k_proj")):
        return layer.A, layer.B
    heads = int(config.num_attention_heads)
    if name.endswith(".k_proj"):
        heads = int(getattr(config, "num_key_value_heads", None) or heads)
    out = layer.B.shape[0]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if out != heads * size:
        raise LilyError(
            f"{name} has {out} outputs, but the configuration has {heads} heads of size {size}; give the "
            "configuration of the model that the adapter was trained on"
        )
    return layer.A, halves_to_pairs(layer.B, heads) if family.reorders else layer.B


def halves_to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Interleave rows (heads * size, rank): row `i` of each head's first half, then row `i` of its second half.

    transformers rotates channel `i` of a head with channel `i + size / 2`; GGUF's llama rotates `2 i` with `2 i + 1`.
    """
    first, second = rows.view(heads, 2, -1, rows.shape[1]).unbind(1)  # (heads, size / 2, rank) each
    return torch.stack([first, second], dim=2).reshape(rows.shape)
