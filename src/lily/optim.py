"""Optimizer groups: learning rates of B and of routers as multiples of A's.

transformers' Trainer and TRL take `optimizers=(create_optimizer(...), None)`, and a training loop calls it directly.
Schedules that multiply the rate of each group, as those of transformers do, keep the ratios.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from lily.errors import LilyError
from lily.plan.wrappers import plain_name

# The parts of what is trained, in the order of the groups; loggers show the rate of the first group.
A, B, ROUTER, LOGITS, GAIN, REST = PARTS = ("A", "B", "router", "logits", "gain", "rest")
NO_DECAY = "_no_decay"

# A and B of LoRA too, so that a baseline is trained alike.
_NAMED = re.compile(r"(?:^|\.)(?:lily|lora)_(?:own_|embedding_)?(A|B|R|router|logits|gain)(?:\.|$)")
_FLAT = "_flat_param"
# What transformers' Trainer does not decay: `Trainer.get_decay_parameter_names`.
_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def parameter_groups(
    model: nn.Module,
    lr: float | Tensor,
    *,
    B_lr_ratio: float = 1.0,
    router_lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: every parameter of `model` that requires a gradient, exactly once.

    The group's `name` is its part: `A` and `B` (also a layer's own, with `own_r`), `router` (of a layer or a group),
    `logits` (static weights), `gain`, and `rest`: modules to save, biases, trained rows of embeddings. Parts without
    parameters have no group. As in transformers' Trainer, weight decay leaves out biases and norms, whose groups are
    named with `_no_decay`; here also logits and gains, since decay would make experts equal and remove ranks.

    Args:
        model: a `PeftModel` or a model with an adapter injected, of Lily or LoRA; wrapped or not.
        lr: learning rate of A and of everything that has no ratio.
        B_lr_ratio: LoRA+'s ratio, the multiple of `lr` for B.
        router_lr_ratio: the multiple of `lr` for routers and static logits.
        weight_decay: of the groups that decay.

    Returns:
        Dictionaries with `name`, `params`, `lr` and `weight_decay`.

    Raises:
        LilyError: if a ratio is not finite and positive, or nothing is trained, or an engine has joined the parameters.
    """
    multiple = multiples_of(B_lr_ratio, router_lr_ratio)
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, part, p in trained_parts(model, B_lr_ratio, router_lr_ratio):
        groups.setdefault((part, name in decayed and part not in (LOGITS, GAIN)), []).append(p)
    if not groups:
        raise LilyError(
            f"no parameter of this {type(model).__name__} requires a gradient; add an adapter with get_peft_model, or "
            "load it with is_trainable=True"
        )
    return [
        {
            "name": part if decays or part in (LOGITS, GAIN) else part + NO_DECAY,
            "params": groups[part, decays],
            "lr": lr * multiple[part],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for part in PARTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def create_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float | Tensor,
    B_lr_ratio: float = 1.0,
    router_lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer on `parameter_groups`, as PEFT's `create_loraplus_optimizer` makes one for LoRA::

        optimizer = create_optimizer(model, torch.optim.AdamW, lr=1e-3, B_lr_ratio=4.0, router_lr_ratio=2.0)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))

    `lr` replaces the `learning_rate` of the Trainer's arguments, whose schedule and warm-up apply.

    Args:
        model: see `parameter_groups`.
        optimizer_cls: such as `torch.optim.AdamW`.
        lr: see `parameter_groups`.
        B_lr_ratio: see `parameter_groups`.
        router_lr_ratio: see `parameter_groups`.
        weight_decay: see `parameter_groups`.
        kwargs: further arguments of the class, such as `betas`.

    Raises:
        LilyError: see `parameter_groups`.
    """
    groups = parameter_groups(
        model, lr, B_lr_ratio=B_lr_ratio, router_lr_ratio=router_lr_ratio, weight_decay=weight_decay
    )
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    if optimizer_cls.__name__ in _EIGHT_BIT:  # as Trainer and PEFT do: embeddings are unstable in 8 bits
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def multiples_of(B_lr_ratio: float = 1.0, router_lr_ratio: float = 1.0) -> dict[str, float]:
    """The multiple of the learning rate of each part.

    Raises:
        LilyError: if one is not finite and positive.
    """
    for name, value in (("B_lr_ratio", B_lr_ratio), ("router_lr_ratio", router_lr_ratio)):
        if not (math.isfinite(value) and value > 0):
            raise LilyError(f"{name}={value} is not a finite number above 0; it multiplies lr, and 1 changes nothing")
    return {A: 1.0, B: B_lr_ratio, ROUTER: router_lr_ratio, LOGITS: router_lr_ratio, GAIN: 1.0, REST: 1.0}


def trained_parts(
    model: nn.Module, B_lr_ratio: float = 1.0, router_lr_ratio: float = 1.0
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(name, part, parameter) of everything that is trained; a parameter with several names once.

    Warns at the end of a ratio that no parameter has.

    Raises:
        LilyError: with a ratio, if FSDP1 has joined tensors of several parts into one parameter.
    """
    plain, found = plain_name(model), set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.endswith(_FLAT) and (B_lr_ratio, router_lr_ratio) != (1, 1):
            raise LilyError(
                f"FSDP has joined A, B and routers into {name}, which has one learning rate; set use_orig_params=True "
                "(fsdp_use_orig_params in accelerate's configuration), or both ratios to 1"
            )
        match = _NAMED.search(plain(name))
        part = REST if match is None else ROUTER if match[1] == "R" else match[1]
        found.add(part)
        yield name, part, p
    if B_lr_ratio != 1 and B not in found:
        warnings.warn(f"B_lr_ratio={B_lr_ratio:g} has no effect: no B is trained", stacklevel=3)
    if router_lr_ratio != 1 and not {ROUTER, LOGITS} & found:
        warnings.warn(
            f"router_lr_ratio={router_lr_ratio:g} has no effect: no router and no static logits are trained "
            "(there are none with num_B=1 or routing='uniform')",
            stacklevel=3,
        )
