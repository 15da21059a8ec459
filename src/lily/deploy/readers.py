"""What reads an exported LoRA, what it asks for, and what it would leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lily.deploy.extra_tensors import PREFIX, saved_modules
from lily.errors import LilyError
from lily.layers.conv import Conv2d
from lily.plan.specs import CONV2D, EMBEDDING, EXPERTS, LINEAR, MATRIX, SLICE
from lily.plan.uncalled_layers import uncalled
from lily.tuner.adapter import Adapted

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Target:
    """What reads an exported LoRA, and what it asks for.

    Attributes:
        ranks: ranks it accepts; empty: any.
        uniform: all layers must have one rank and one alpha.
        modules_to_save: whether it reads modules saved whole.
        biases: whether it reads trained biases.
        blocks_only: whether it adapts the linear layers of the numbered blocks only, so no output layer.
        kinds: of what it adapts; see `lily.plan.specs`.
    """

    ranks: tuple[int, ...] = ()
    uniform: bool = False
    modules_to_save: bool = True
    biases: bool = True
    blocks_only: bool = False
    kinds: tuple[str, ...] = (LINEAR,)


TARGETS = {
    "peft": Target(kinds=(LINEAR, CONV2D, EMBEDDING, MATRIX, EXPERTS)),
    "vllm": Target(VLLM_RANKS, uniform=True, modules_to_save=False, biases=False, blocks_only=True),
    "llama.cpp": Target(uniform=True, modules_to_save=False, biases=False),
    "diffusers": Target(uniform=True, modules_to_save=False, biases=False, kinds=(LINEAR, CONV2D)),
}


def check_readable(target: str, wanted: Target, found: Adapted, other: Mapping[str, Tensor]) -> None:
    """Refuse what the reader would leave out without a word.

    Args:
        target: its name.
        wanted: what it asks for.
        found: the adapter.
        other: entries of its file besides the matrices.

    Raises:
        LilyError: naming the part that would be lost, and where to export to instead.
    """
    read = uncalled(dict(found.root.named_modules()))
    # PEFT's LoRA acts in calls, so never on dt_proj or timm's qkv, and refuses out_proj of state-space models.
    whole = {name: name.rpartition(".")[0] if _is_slice(found, name) else name for name in found.layers}
    lost = [
        name
        for name, layer in whole.items()
        if layer in read and (read[layer].remedy == "separated" or layer.endswith(("dt_proj", "out_proj")))
    ]
    if lost:
        why = read[whole[lost[0]]]
        raise LilyError(
            f"no reader of a LoRA applies one to {lost[0]}: {why.parent} reads its weight {why.why}; export --to "
            "merged instead, or train without it (exclude_modules)"
        )
    saved = saved_modules(found.config)
    if saved and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads no modules saved whole, but the adapter has {', '.join(sorted(saved))} "
            "(modules_to_save); export --to merged instead, or train without modules_to_save"
        )
    if found.config.bias != "none" and not wanted.biases:
        raise LilyError(f"{target} reads no trained biases (bias={found.config.bias!r}); export --to merged instead")
    for name, layer in found.layers.items():
        kind = found.plan.group_of(name).kind
        if kind not in wanted.kinds and not (kind == SLICE and LINEAR in wanted.kinds):
            raise LilyError(
                f"{target} reads LoRAs of {' and '.join(wanted.kinds)} layers, and {name} is of the kind {kind}; "
                "export --to merged instead, or a LoRA for PEFT"
            )
        if isinstance(layer, Conv2d) and (more := layer.beyond_lora()) is not None:
            raise LilyError(
                f"{target} reads a LoRA of a convolution as one without {more}, which {name} has; export --to merged "
                "instead, or train without it (exclude_modules)"
            )
    outside = [name for name in found.layers if not any(part.isdigit() for part in name.split("."))]
    if outside and wanted.blocks_only:
        raise LilyError(
            f"{target} adapts the layers of a model's blocks, and {', '.join(outside)} is in none; export --to merged "
            "instead, or train without it (exclude_modules)"
        )
    if other and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads nothing but A and B, but the adapter comes with {sorted(other)[0].removeprefix(PREFIX)} "
            "(an embedding whose vocabulary was changed?); export --to merged instead"
        )


def _is_slice(found: Adapted, name: str) -> bool:
    return found.plan.group_of(name).kind == SLICE


def padded_rank(rank: int, target: str, wanted: Target) -> int:
    """The smallest rank that the reader accepts and that `rank` fits into.

    Raises:
        LilyError: if there is none.
    """
    if not wanted.ranks:
        return rank
    fitting = [r for r in wanted.ranks if r >= rank]
    if not fitting:
        raise LilyError(
            f"{target} accepts ranks up to {wanted.ranks[-1]}, but the adapter has {rank}; cut it with rank"
        )
    return fitting[0]
