"""Which of the things that were tried is the best: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from lily.recipes.scoring import metrics as metric_tools
from lily.tune.study import Tried


def ranked(tried: Sequence[Tried], metric: str) -> list[Tried]:
    """The trials from best to worst: complete ones by their value, then those that were stopped.

    Of equal values the one comes first that forgets less, if that was measured, then the earlier one.
    """
    sign = 1.0 if metric in metric_tools.LOWER_IS_BETTER else -1.0

    def key(trial: Tried) -> tuple[bool, float, float, int]:
        value = float("inf") if trial.value is None else sign * trial.value
        return trial.state != "complete", value, trial.forgetting or 0.0, trial.number

    return sorted(tried, key=key)


def best(tried: Sequence[Tried], metric: str, max_forgetting: float | None = None) -> Tried | None:
    """The best complete trial, among those that forget no more than a limit.

    Returns:
        None if no trial is complete and within it.
    """
    complete = [trial for trial in ranked(tried, metric) if trial.state == "complete" and trial.value is not None]
    within = [
        trial
        for trial in complete
        if max_forgetting is None or (trial.forgetting is not None and trial.forgetting <= max_forgetting)
    ]
    return within[0] if within else None
