"""The libraries that read an exported LoRA: what each requires and does not support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lily.checkpoint.format import PREFIX
from lily.deploy.extra_tensors import saved_modules
from lily.errors import LilyError
from lily.layers.conv import Conv
from lily.plan.attention import has_in_projection
from lily.plan.specs import CONV2D, CONVOLUTIONS, EMBEDDING, EXPERTS, LINEAR, MATRIX, PARAMETERS, SLICE
from lily.plan.uncalled_layers import uncalled
from lily.tuner.adapter import Adapted

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Target:
    """A library that reads an exported LoRA, and what it requires."""

    ranks: tuple[int, ...] = ()  # accepted ranks; empty: any
    uniform: bool = False  # all layers must have one rank and one alpha
    modules_to_save: bool = True  # reads modules saved whole, and rows of embeddings
    biases: bool = True  # reads trained biases
    numbered_only: bool = False  # adapts only layers inside numbered modules, so no output layer
    attention: bool = False  # reads LoRAs of nn.MultiheadAttention
    conv_groups: bool = False  # reads B of convolutions with groups
    kinds: tuple[str, ...] = (LINEAR,)  # kinds of layers and parameters that it adapts; see `lily.plan.specs`


TARGETS = {
    "peft": Target(kinds=(LINEAR, *CONVOLUTIONS, EMBEDDING, MATRIX, EXPERTS), attention=True, conv_groups=True),
    "vllm": Target(VLLM_RANKS, uniform=True, modules_to_save=False, biases=False, numbered_only=True),
    "llama.cpp": Target(uniform=True, modules_to_save=False, biases=False),
    "diffusers": Target(uniform=True, modules_to_save=False, biases=False, kinds=(LINEAR, CONV2D)),
}


def server_of_experts(target: str, wanted: Target) -> Target:
    """What a server requires that reads stacked experts with shared outer matrices.

    Raises:
        LilyError: if `target` is no such server.
    """
    if target not in ("peft", "vllm"):
        raise LilyError(f"{target} reads no stacked experts; leave out experts='shared'")
    return replace(TARGETS["vllm"], ranks=wanted.ranks, kinds=(LINEAR, EXPERTS))


def check_readable(target: str, wanted: Target, adapted: Adapted, other: Mapping[str, Tensor]) -> None:
    """Refuse an adapter with parts that the reader would silently ignore; `other`: its entries besides the matrices.

    Raises:
        LilyError: naming the part that would be lost, and the export to use instead.
    """
    read = uncalled(dict(adapted.root.named_modules()))
    # PEFT's LoRA acts when a layer is called, so not on dt_proj or timm's qkv; it refuses out_proj of Mamba.
    kinds = {name: adapted.plan.group_of(name).kind for name in adapted.layers}
    whole = {name: name.rpartition(".")[0] if kind == SLICE else name for name, kind in kinds.items()}
    lost = [
        name
        for name, layer in whole.items()
        if layer in read
        and read[layer].remedy != "called"
        and (read[layer].remedy == "separated" or layer.endswith(("dt_proj", "out_proj")))
    ]
    if lost:
        why = read[whole[lost[0]]]
        raise LilyError(
            f"no reader of a LoRA applies one to {lost[0]}: {why.parent} reads its weight {why.why}; export --to "
            "merged instead, or train without it (exclude_modules)"
        )
    attentions = [name for name in whole.values() if name in read and read[name].remedy == "called"]
    for name in attentions:
        path, _, short = name.rpartition(".")
        attention = adapted.root.get_submodule(path)
        assert isinstance(attention, nn.MultiheadAttention)
        which = (
            " that is the model itself" if not path else "" if has_in_projection(attention) else " with kdim or vdim"
        )
        if which or not wanted.attention:
            raise LilyError(
                f"{target} reads no LoRA of an nn.MultiheadAttention{which}, whose {short} is adapted ({name}); export "
                "--to merged instead, or train without it (exclude_modules)"
            )
    saved = saved_modules(adapted.config)
    if saved and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads no modules saved whole, but the adapter has {', '.join(sorted(saved))} "
            "(modules_to_save); export --to merged instead, or train without modules_to_save"
        )
    if adapted.config.trainable_token_indices and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads no trained rows of an embedding, which the adapter has (trainable_token_indices); export "
            "--to merged instead"
        )
    if adapted.config.bias != "none" and not wanted.biases:
        raise LilyError(f"{target} reads no trained biases (bias={adapted.config.bias!r}); export --to merged instead")
    for name, layer in adapted.layers.items():
        kind = kinds[name]
        if (LINEAR if kind == SLICE else kind) not in wanted.kinds:
            raise LilyError(
                f"{target} reads LoRAs of {' and '.join(wanted.kinds)} layers, and {name} is of the kind {kind}; "
                "export --to merged instead, or a LoRA for PEFT"
            )
        if isinstance(layer, Conv) and (more := layer.beyond_lora()) is not None:
            raise LilyError(
                f"{target} ignores {more} of a convolution, which {name} has; export --to merged "
                "instead, or train without it (exclude_modules)"
            )
        if layer.conv_groups > 1 and not wanted.conv_groups:
            raise LilyError(
                f"{target} reads no LoRA of a convolution with groups, which {name} is; export --to merged instead, "
                "or a LoRA for PEFT"
            )
    # PEFT keeps fan_in_fan_out of the last linear layer that it replaces, and its LoRA of parameters refuses True.
    linear = {whole[name]: layer for name, layer in adapted.layers.items() if kinds[name] in (LINEAR, SLICE)}
    last = next((name for name, _ in reversed(list(adapted.root.named_modules())) if name in linear), None)
    parameter = next((name for name, kind in kinds.items() if kind in PARAMETERS), None)
    if parameter is not None and last is not None and linear[last].transposed:
        raise LilyError(
            f"{target} loads no LoRA of Conv1D ({last}) together with one of parameters ({parameter}), which refuses "
            "the fan_in_fan_out that Conv1D needs; export --to merged instead, or train them as two adapters"
        )
    outside = [name for name in adapted.layers if not any(part.isdigit() for part in name.split("."))]
    if outside and wanted.numbered_only:
        raise LilyError(
            f"{target} adapts only numbered layers, and {', '.join(outside)} is outside; export --to merged "
            "instead, or train without it (exclude_modules)"
        )
    if other and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads only A and B, but the adapter also has {sorted(other)[0].removeprefix(PREFIX)} "
            "(an embedding whose vocabulary was changed?); export --to merged instead"
        )


def padded_rank(rank: int, target: str, wanted: Target) -> int:
    """The smallest rank of at least `rank` that the reader accepts.

    Raises:
        LilyError: if there is none.
    """
    fitting = next((r for r in wanted.ranks or (rank,) if r >= rank), None)
    if fitting is None:
        raise LilyError(
            f"{target} accepts ranks up to {wanted.ranks[-1]}, but the adapter has {rank}; reduce it with rank"
        )
    return fitting
