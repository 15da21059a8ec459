"""Tiny models with a Lily adapter, and the bits of their base weights."""

from __future__ import annotations

import torch
from helpers import TARGETS, TASKS, build, randomise
from peft import get_peft_model

from lily import LilyConfig
from lily.layers.layer import LilyLayer


def config_for(kind, **options):
    values = {"r": 4, "stride_A": 2, "num_B": 3, "scaling": 1.0, "target_modules": TARGETS[kind], **options}
    return LilyConfig(**{"task_type": TASKS[kind], **values})


def adapted(kind, trained=True, **options):
    model = get_peft_model(build(kind), config_for(kind, **options)).eval()
    return randomise(model) if trained else model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LilyLayer)}


def base_bits(model):
    return {n: m.get_base_layer().weight.detach().clone() for n, m in layers(model).items()}


def same_bits(model, before):
    return all(torch.equal(m.get_base_layer().weight, before[n]) for n, m in layers(model).items())
