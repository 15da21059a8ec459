"""Convert model files of other formats into transformers folders in the cache."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.recipes.data.sources import building, cache_folder


def converted(path: Path, format: str) -> Path:
    """The transformers folder of a `gguf` (a causal language model) or `onnx-dinov2` file, converted on first use.

    Raises:
        LilyError: if the file is not of this format, or a required package is missing.
    """
    if not path.is_file():
        raise LilyError(f"model {path}: format: {format} needs a file, not a folder")
    key = hashlib.sha256(f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / "converted" / f"{path.stem}-{key}"
    if not (target / "config.json").is_file():
        with building(target) as temporary:
            temporary.mkdir()
            try:
                {"gguf": _gguf, "onnx-dinov2": _dinov2}[format](path, temporary)
            except LilyError:
                raise
            except OSError as error:
                raise LilyError(f"{path}: could not be converted into {target.parent}: {error}") from None
            except Exception as error:
                reason = str(error) or type(error).__name__
                raise LilyError(f"{path}: not a supported {format} model: {reason}") from None
    return target


def _gguf(path: Path, out: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LilyError(f'{path.name}: reading GGUF needs gguf; pip install "lily-peft[sft]"') from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    bar = vars(modeling_gguf_pytorch_utils)["tqdm"]  # tqdm's own, which transformers' switch for bars does not reach
    try:
        modeling_gguf_pytorch_utils.tqdm = partial(bar, disable=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        read = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:
        raise LilyError(f"{path}: not a GGUF model that transformers reads: {error}") from None
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
    # The weights are dequantized now; saving fails if the config still has the quantization.
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    plain = type(read)(type(read.config).from_dict(values))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _dinov2(path: Path, out: Path) -> None:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise LilyError(f"{path.name}: reading ONNX needs onnx; pip install onnx") from None
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    graph = onnx.load(str(path)).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    state = {k.removeprefix("backbone."): torch.tensor(v) for k, v in arrays.items() if k.startswith("backbone.")}
    if not state:
        raise LilyError(f"{path}: has no weights named backbone.*; only DINOv2 exports with this prefix are supported")
    state.update(_matmul_weights(graph, arrays))
    size = next(iter(state[k] for k in state if k.endswith("norm1.weight"))).shape[0]
    one = next(torch.tensor(v) for k, v in arrays.items() if k.startswith("onnx::") and v.shape == (1, 1, size))
    grid = next(torch.tensor(v) for k, v in arrays.items() if v.ndim == 3 and v.shape[0] == 1 and v.shape[1] > 1)
    state["embeddings.position_embeddings"] = torch.cat([one, grid], 1)
    state["embeddings.mask_token"] = torch.zeros(1, size)
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))
    side, patch = int(grid.shape[1] ** 0.5), state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=size // 64,
        image_size=side * patch,
        patch_size=patch,
        mlp_ratio=4,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(out)
    tensors = {k: v.contiguous() for k, v in state.items()}
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})


def _matmul_weights(graph: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """The matrix weights, whose names ONNX export drops, named after the bias that is added to their product."""
    import torch

    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            for user in users.get(node.output[0], []):
                for name in user.input:
                    if user.op_type == "Add" and name.startswith("backbone."):
                        key = name.removeprefix("backbone.").replace(".bias", ".weight")
                        weights[key] = torch.tensor(arrays[node.input[1]].T.copy())
    return weights
