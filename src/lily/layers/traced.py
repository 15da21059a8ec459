"""Is the model being traced into a program for processes that have neither this package nor its operators?

Such a program holds PyTorch's own operators alone and serves inputs of other sizes than the example's. So while one is
traced, layers compute by `lily.functional`, in the forms that look at no size. `torch.compile` makes no such program.
"""

from __future__ import annotations

import torch

# Versions of torch before 2.13 may answer yes while they compile, too; 2.6 does not have the function.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def exporting() -> bool:
    """Whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` is running the model."""
    return bool(_is_exporting() or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
