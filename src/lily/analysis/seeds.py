"""Statistics over the seeds of an experiment."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values, or where one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
