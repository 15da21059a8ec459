"""What a run of `lily train` left in its folder, read back with care: the folder may be a stranger's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lily.errors import LilyError

METRICS = "metrics.json"


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run.

    Attributes:
        name: of the recipe.
        method: `lily`, `lora` or `none`.
        metric: the main metric.
        split: what `before`, `final` and `baselines` were measured on.
        seed: of the run.
        before: metrics of the untrained model.
        final: metrics of the best adapter.
        baselines: name -> metrics.
        evaluations: (step, main metric on the validation rows).
        losses: (step, training loss).
        parameters: by part.
        adapter_bytes: of the adapter's file.
        seconds: by part.
        rows: split -> how many.
    """

    name: str
    method: str
    metric: str
    split: str
    seed: int
    before: dict[str, float]
    final: dict[str, float]
    baselines: dict[str, dict[str, float]]
    evaluations: tuple[tuple[float, float], ...]
    losses: tuple[tuple[float, float], ...]
    parameters: dict[str, float]
    adapter_bytes: float
    seconds: dict[str, float]
    rows: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or whose best adapter it is; None: neither."""
    if (folder / METRICS).is_file():
        return folder
    parent = folder.resolve().parent
    return parent if folder.resolve().name == "best" and (parent / METRICS).is_file() else None


def run_figures(folder: Path) -> RunFigures:
    """The figures of a run's folder.

    Raises:
        LilyError: if its files are not what `lily train` writes.
    """
    found = json_object(folder / METRICS)
    try:
        metric = str(found["metric"])
        history = found.get("history") or []
        return RunFigures(
            name=str(found["name"]),
            method=str(found["method"]),
            metric=metric,
            split=str(found["split"]),
            seed=int(found["seed"]),
            before=_numbers(found["before"]),
            final=_numbers(found["final"]),
            baselines={str(name): _numbers(values) for name, values in found.get("baselines", {}).items()},
            evaluations=_curve(history, metric),
            losses=_losses(folder / "checkpoints"),
            parameters=_numbers(found.get("parameters", {})),
            adapter_bytes=float(found.get("adapter_bytes", 0)),
            seconds=_numbers(found.get("seconds", {})),
            rows=_numbers(found.get("rows", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LilyError(
            f"{folder / METRICS} is not what `lily train` writes ({type(error).__name__}: {error}); move it away to "
            "see the adapter without its figures"
        ) from None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the largest number inside a folder of checkpoints."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _losses(checkpoints: Path) -> tuple[tuple[float, float], ...]:
    newest = newest_checkpoint(checkpoints)
    if newest is None or not (newest / "trainer_state.json").is_file():
        return ()
    return _curve(json_object(newest / "trainer_state.json").get("log_history") or [], "loss")


def _curve(history: Any, name: str) -> tuple[tuple[float, float], ...]:
    """(step, value) wherever both are finite numbers."""
    points = [(_number(entry.get("step")), _number(entry.get(name))) for entry in history]
    return tuple((step, value) for step, value in points if step is not None and value is not None)


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    found = {str(name): _number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def json_object(file: Path) -> dict[str, Any]:
    """What a run's JSON file holds; a diverged run's may hold NaN.

    Raises:
        LilyError: if it is no JSON, or no object.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise LilyError(f"{file} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise LilyError(f"{file} holds a {type(found).__name__}, not an object")
    return found
