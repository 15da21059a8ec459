"""Stacked experts as a LoRA whose outer matrices all experts share, the layout of SGLang and vLLM for mixtures.

    gate and up, `w1` and `w3`    lora_A (1, rank, in)          lora_B (experts, out, rank)
    down, `w2`                    lora_A (experts, rank, in)    lora_B (1, out, rank)

Source: `python/sglang/srt/lora/mem_pool.py` and `lora.py` of SGLang (`experts_shared_outer_loras`). vLLM's
`enable_moe_shared_loras` is for the same layout by its description; its code was not read.

What distinguishes an expert's A from the shared one multiplies its rank coordinates, so for gate and up it goes into
the expert's B, and the result is exact.
"""

from __future__ import annotations

from typing import cast

from lily.errors import LilyError
from lily.layers.merging import Factors
from lily.layers.parameter import Parameter
from lily.plan.sharing_plan import Group
from lily.plan.specs import EXPERTS
from lily.tuner.adapter import Adapted

IN_TWO, OUT = "gate_up_proj", "down_proj"
# What the configuration of such a LoRA calls them.
MODULES = ("gate_proj", "up_proj", "down_proj")


def shared_outer(
    adapted: Adapted, factors: dict[str, Factors], groups: dict[str, Group]
) -> tuple[dict[str, Factors], dict[str, Group]]:
    """Replace the update of each stacked parameter by those of its projections, with the outer matrix of each once.

    Args:
        adapted: the adapter.
        factors: layer -> its update; of stacked experts A (experts, r, in) and B (experts, r, out).
        groups: layer -> its group in the plan.

    Returns:
        Both, where `experts.gate_up_proj` has become `experts.w1` and `experts.w3`, with A (1, r, in), and
        `experts.down_proj` has become `experts.w2`, with B (1, r, out).

    Raises:
        LilyError: naming the setting that keeps experts from sharing, or a parameter that is no such projection.
    """
    if not any(group.kind == EXPERTS for group in groups.values()):
        raise LilyError("the adapter has no stacked experts (target_parameters); leave out experts='shared'")
    updates: dict[str, Factors] = {}
    kept: dict[str, Group] = {}
    for name, update in factors.items():
        group = groups[name]
        parts = {name: update}
        if group.kind == EXPERTS:
            module, _, projection = name.rpartition(".")
            layer = cast(Parameter, adapted.layers[name])
            if projection not in (IN_TWO, OUT) or not module.endswith("experts"):
                raise LilyError(
                    f"{name} is neither experts.{IN_TWO} nor experts.{OUT}, the two parameters of a mixture that "
                    "servers share; export without experts='shared', or --to merged"
                )
            split = _in_two if projection == IN_TWO else _out
            parts = {f"{module}.{part}": f for part, f in split(name, layer, adapted.name, update).items()}
        for part, f in parts.items():
            updates[part] = f
            kept[part] = group if part == name else Group(part, f.A.shape[-1], f.B.shape[-1], group.r, 1, ((part,),))
    return updates, kept


def _in_two(name: str, layer: Parameter, adapter: str, update: Factors) -> dict[str, Factors]:
    settings = layer.settings[adapter]
    if settings.own_r:
        raise _refusal(name, "A", f"own_r={settings.own_r} gives each its own", "own_r=0")
    if settings.stride < layer.experts:
        raise _refusal(name, "A", f"{settings.stride} experts in a row share one", "num_A=1")
    A, change = layer.shared_A(adapter)
    B = update.B if change is None else change.to(update.B).mT @ update.B
    # Two halves, or alternating, by the flag that transformers sets.
    halves = B.chunk(2, -1) if getattr(layer.base, "is_concatenated", True) else (B[..., ::2], B[..., 1::2])
    return {
        part: Factors(A.to(update.A).unsqueeze(0), half, update.scaling)
        for part, half in zip(("w1", "w3"), halves, strict=True)
    }


def _out(name: str, layer: Parameter, adapter: str, update: Factors) -> dict[str, Factors]:
    settings = layer.settings[adapter]
    if settings.own_r:
        raise _refusal(name, "B", f"own_r={settings.own_r} gives each its own", "own_r=0")
    if settings.num_B > 1 and adapter in layer.lily_logits:
        raise _refusal(name, "B", f"each mixes num_B={settings.num_B} of them", "num_B=1 or routing='uniform'")
    return {"w2": Factors(update.A, update.B[:1], update.scaling)}


def _refusal(name: str, part: str, why: str, remedy: str) -> LilyError:
    return LilyError(
        f"the experts of {name} do not share one {part}: {why}; train with {remedy}, or export without experts='shared'"
    )
