"""Adapters whose rank and routing are analysed."""

from __future__ import annotations

import torch
from helpers import TARGETS, build, randomise
from peft import LoraConfig, get_peft_model

import lily
from lily.tuner.adapter import find


def adapted(kind="bert", r=4, **options):
    config = lily.LilyConfig(
        **{"r": r, "num_A": 2, "num_B": 3, "scaling": 1.0, "target_modules": TARGETS[kind], **options}
    )
    return randomise(get_peft_model(build(kind), config)).eval()


def weights_of_tokens(model, name, batch):
    """The weights of every unmasked token, recomputed from the layer's own input."""
    found = find(model)
    layer, kept = found.layers[name], []

    def hook(module, args):
        A, _ = layer.tensors_of(found.name)
        p = torch.softmax((args[0] @ A.T @ layer.router_of(found.name).T).double(), -1)
        m = batch["attention_mask"].double()
        if layer.settings[found.name].routing == "sequence":
            p = ((p * m.unsqueeze(-1)).sum(1) / m.sum(1, keepdim=True)).unsqueeze(1).expand_as(p)
        kept.append(p[m.bool()])

    handle = layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return torch.cat(kept)


def lora(kind="bert", **options):
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **options})
    return get_peft_model(build(kind), config)
