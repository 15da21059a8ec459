"""How long a run takes on this machine: its linear layers, timed for a second, and multiplied."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lily.io.words import counted

if TYPE_CHECKING:
    import torch

SIDE = 4096  # larger matrices are timed as ones of this side, and the time scaled
WORK = 1e9  # multiply-adds of one measurement; of a longer batch a part is timed
TRIALS = 2  # of each shape, of which the faster counts


@dataclass(frozen=True)
class Work:
    """What a pass through a model computes.

    Attributes:
        shapes: (inputs, outputs) of each linear layer.
        rank: of the adapter; timed on every layer.
        tokens: of a row, with padding.
        attention: multiply-adds of attention scores and sums per token, which are no linear layers.
        precision: the data type of the products.
    """

    shapes: Sequence[tuple[int, int]]
    rank: int
    tokens: int
    attention: int
    precision: str


@dataclass(frozen=True)
class Pace:
    """Seconds per row, estimated.

    Attributes:
        device: what was timed.
        forward: a pass without gradients.
        step: forward and backward.
        free: bytes of memory that are free on the device.
    """

    device: str
    forward: float
    step: float
    free: int


def work_of(config: Any, shapes: Sequence[tuple[int, int]], rank: int, tokens: int, precision: str) -> Work | None:
    """The work of a model whose time is in its linear layers; None for any other (convolutions, state spaces).

    Args:
        config: of the model.
        shapes: (inputs, outputs) of its linear layers.
        rank: of the adapter.
        tokens: of a row.
        precision: data type of the products.
    """
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    depth = getattr(config, "num_hidden_layers", None)
    if not (shapes and isinstance(heads, int) and isinstance(hidden, int) and isinstance(depth, int)):
        return None
    return Work(shapes, rank, tokens, 2 * depth * hidden * tokens, precision)


def measure(work: Work, batch: int) -> Pace:
    """Time the linear layers of a batch on this machine's device, with random values and an adapter on each.

    Elementwise operations between them are not timed, so a run takes somewhat longer; kernels of the adapter may make
    it shorter.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forward = step = 0.0
    for (inputs, outputs), count in Counter(work.shapes).items():
        one, both = _timed(inputs, outputs, work, batch, device)
        forward += count * one
        step += count * both
    beside = 1 + work.attention / sum(inputs * outputs for inputs, outputs in work.shapes)
    name = torch.cuda.get_device_name() if device.type == "cuda" else _cpu(torch.get_num_threads())
    return Pace(name, beside * forward / batch, beside * step / batch, _free(device))


def _cpu(threads: int) -> str:
    return f"CPU, {counted(threads, 'thread')}"


def _timed(inputs: int, outputs: int, work: Work, batch: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a batch in one layer: forward, and forward with backward."""
    import torch

    small = min(inputs, SIDE), min(outputs, SIDE)
    rows = batch * work.tokens
    part = max(1, min(rows, int(WORK / (small[0] * small[1]))))
    kind = getattr(torch, work.precision)
    with torch.random.fork_rng(devices=[]):
        x, weight = torch.randn(part, small[0]), torch.randn(small[1], small[0])
        A, B = torch.randn(work.rank, small[0]), torch.randn(small[1], work.rank)
    x, weight, A, B = (tensor.to(device, kind) for tensor in (x, weight, A, B))
    for tensor in (x, A, B):
        tensor.requires_grad_()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best = [float("inf"), float("inf")]
    for _ in range(TRIALS + 1):  # the first also warms up
        wait()
        start = time.perf_counter()
        y = torch.nn.functional.gelu(x @ weight.T + (x @ A.T) @ B.T)
        wait()
        between = time.perf_counter()
        y.backward(y.detach())  # type: ignore[no-untyped-call]
        wait()
        end = time.perf_counter()
        best = [min(best[0], between - start), min(best[1], end - start)]
    scale = rows / part * (inputs * outputs) / (small[0] * small[1])
    return best[0] * scale, best[1] * scale


def _free(device: torch.device) -> int:
    import psutil  # type: ignore[import-untyped]
    import torch

    return int(torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available)
