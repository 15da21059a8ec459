"""torchvision without CUDA: its compiled part does not load, and importing it fails for want of two operators.

Declared beforehand, all that timm and transformers use of it works; nobody calls these two.
"""

from __future__ import annotations

import importlib.util

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A library's declarations last as long as it does.
KEPT: list[torch.library.Library] = []


def declare() -> None:
    """Make torchvision importable where it is installed and CUDA is not there."""
    if KEPT or torch.cuda.is_available() or importlib.util.find_spec("torchvision") is None:
        return
    KEPT.append(torch.library.Library("torchvision", "DEF"))
    for schema in SCHEMAS:
        KEPT[0].define(schema)
