"""Matrix products of the fast path, by oneDNN or PyTorch, whichever is faster.

For float32 on CPUs PyTorch calls MKL, which uses only AVX2 on CPUs not made by Intel. oneDNN, which is part of PyTorch
too, uses AVX-512 there: half the time on an AMD EPYC (docs/performance.md). Other dtypes and devices use PyTorch's
products.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

# Fewer multiplications than this take less time than the overhead of a oneDNN call (about 10 us).
LEAST_WORK = 2**21


def onednn_is_faster() -> bool:
    """Whether oneDNN is available and faster on this CPU. A fixed rule, not a measurement, so runs repeat exactly."""
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and _cpu_maker() not in ("GenuineIntel", "")


def _cpu_maker() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""
    with cpuinfo.open("r", encoding="utf-8", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("vendor_id")), "")


# Benchmarks switch it off for comparison.
ONEDNN = onednn_is_faster()


def _on_onednn(x: Tensor, w: Tensor) -> bool:
    return ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and _is_large(x, w)


def mm(x: Tensor, w: Tensor) -> Tensor:
    """`x` (n, k) @ `w` (k, m)."""
    if not _on_onednn(x, w):
        return torch.mm(x, w)
    return torch.ops.lily.mm(x, w) if torch.compiler.is_compiling() else _mm(x, w)


def plus_mm(y: Tensor, x: Tensor, w: Tensor, spare: bool = False) -> Tensor:
    """`y` (n, m) + `x` (n, k) @ `w` (k, m); with `spare`, the result may be written into `y`."""
    if not _on_onednn(x, w):
        return y.addmm_(x, w) if spare else torch.addmm(y, x, w)
    return torch.ops.lily.plus_mm(y, x, w) if torch.compiler.is_compiling() else _plus_mm(y, x, w)


def bmm(x: Tensor, w: Tensor) -> Tensor:
    """`x` (b, n, k) @ `w` (b, k, m)."""
    if x.shape[0] == 1:
        return mm(x[0], w[0]).unsqueeze(0)
    if not torch.compiler.is_compiling() and _on_onednn(x[0], w[0]):
        return torch.stack([_mm(a, b) for a, b in zip(x, w, strict=True)])
    return torch.bmm(x, w)


def _is_large(x: Tensor, w: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True  # decided at run time: a size may be symbolic here
    return x.shape[0] * x.shape[1] * w.shape[1] >= LEAST_WORK


def _mm(x: Tensor, w: Tensor) -> Tensor:
    if not _is_large(x, w):
        return torch.mm(x, w)
    return torch.ops.mkldnn._linear_pointwise(x, w.t(), None, "none", [], "")  # type: ignore[no-any-return]


def _plus_mm(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    if not _is_large(x, w):
        return torch.addmm(y, x, w)
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, w.t(), None, "add")  # type: ignore[no-any-return]


# Opaque to the compiler, which makes assumptions about oneDNN's operators that do not hold here.
torch.library.define("lily::mm", "(Tensor x, Tensor w) -> Tensor")
torch.library.define("lily::plus_mm", "(Tensor y, Tensor x, Tensor w) -> Tensor")
torch.library.impl("lily::mm", "cpu", _mm)
torch.library.impl("lily::plus_mm", "cpu", _plus_mm)
torch.library.register_fake("lily::mm", lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
torch.library.register_fake("lily::plus_mm", lambda y, x, w: torch.empty_like(y))
