"""Peak memory of a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Peak memory in bytes: of the GPU, as PyTorch counts it; without one, of the process.

    On Linux the process's peak is read from /proc, since `getrusage` includes that of the parent process.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if STATUS.is_file() and (match := re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text("ascii"), re.M)):
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
