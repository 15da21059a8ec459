"""Read the files of a run of `lily train`, which may be untrusted."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.io.words import some

if TYPE_CHECKING:
    from lily.recipes.data.rows import Splits
    from lily.recipes.scoring.review import Review

METRICS = "metrics.json"
SHOWN = 2  # runs in a message


def within_run(path: Path) -> Path:
    """The adapter of a run's folder, `best` or else `last` (DreamBooth has no `best`); any other folder itself."""
    return next((path / name for name in ("best", "last") if (path / name).is_dir()), path)


def adapter_path(folder: str) -> Path:
    """The folder of the adapter: `folder` itself, or the one in a run's folder.

    Raises:
        LilyError: if it holds no adapter.
    """
    path = within_run(Path(folder).expanduser())
    if not (path / "adapter_config.json").is_file():
        if begun := unfinished(path):
            raise LilyError(f"{folder} {begun}")
        if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
            raise LilyError(f"{folder} is a recipe, not an adapter; name the folder of its run, below runs/ by default")
        inside = [p for p in sorted(path.iterdir()) if within_run(p) != p] if path.is_dir() else []
        if inside:
            shown = some(map(str, inside), SHOWN)
            raise LilyError(f"{folder} holds runs, and is none; name one of them: {shown}")
        beside = Path(folder).expanduser().parent
        names = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
        near = difflib.get_close_matches(Path(folder).name, [n for n in names if n != Path(folder).name], n=2)
        hint = (
            f"did you mean {' or '.join(str(beside / name) for name in near)}?"
            if near
            else "name a run's folder or its best/"
        )
        raise LilyError(f"{folder} holds no adapter (adapter_config.json); {hint}")
    return path


def unfinished(folder: Path) -> str | None:
    """What to say of the folder of a run that was interrupted before its first evaluation; None: it is none."""
    if (folder / "checkpoints").is_dir() and (folder / "recipe.yaml").is_file() and within_run(folder) == folder:
        return "is a run without an adapter yet; the command that began it continues it with --resume"
    return None


def kept_recipe(path: Path) -> Path | None:
    """The recipe's file beside an adapter, if there is one."""
    return next((p for p in (path / "recipe.yaml", path.parent / "recipe.yaml") if p.is_file()), None)


@dataclass(frozen=True)
class RunFigures:
    """The figures of one run: those of `lily.recipes.results.result.Result`, checked, and two curves.

    Attributes:
        evaluations: (step, main metric on the validation rows).
        losses: (step, training loss).
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
    samples: tuple[dict[str, Any], ...] = ()
    review: Review | None = None  # None: an earlier version wrote none

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def changed_rows(splits: Splits, run: Path) -> list[str]:
    """The parts whose rows are not those with which a run began; none if its folder does not tell."""
    from lily.recipes.data.rows import fingerprints
    from lily.recipes.trainer.checkpoints import ROWS

    if not (run / ROWS).is_file():
        return []
    then, now = json_object(run / ROWS), fingerprints(splits)
    return [f"data.{name}" for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]


def run_of(folder: Path) -> Path | None:
    """The run's folder, if `folder` is one or the `best` inside one; else None."""
    if (folder / METRICS).is_file():
        return folder
    parent = folder.resolve().parent
    return parent if folder.resolve().name == "best" and (parent / METRICS).is_file() else None


def run_figures(folder: Path) -> RunFigures:
    """Read the figures of a run.

    Raises:
        LilyError: if its files are not in the format that `lily train` writes.
    """
    from lily.recipes.scoring.review import Review

    values = json_object(folder / METRICS)
    try:
        metric = str(values["metric"])
        history = values.get("history") or []
        return RunFigures(
            name=str(values["name"]),
            method=str(values["method"]),
            metric=metric,
            split=str(values["split"]),
            seed=int(values["seed"]),
            before=_numbers(values["before"]),
            final=_numbers(values["final"]),
            baselines={str(name): _numbers(v) for name, v in values.get("baselines", {}).items()},
            evaluations=_curve(history, metric),
            losses=_losses(folder / "checkpoints"),
            parameters=_numbers(values.get("parameters", {})),
            adapter_bytes=float(values.get("adapter_bytes", 0)),
            seconds=_numbers(values.get("seconds", {})),
            rows=_numbers(values.get("rows", {})),
            samples=_samples(values.get("samples") or []),
            review=Review.from_dict(values.get("review")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LilyError(
            f"{folder / METRICS} is not in the format of `lily train` ({type(error).__name__}: {error}); move it away "
            "to inspect the adapter without its figures"
        ) from None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the largest number inside a folder of checkpoints."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return max(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _losses(checkpoints: Path) -> tuple[tuple[float, float], ...]:
    newest = newest_checkpoint(checkpoints)
    if newest is None or not (newest / "trainer_state.json").is_file():
        return ()
    return _curve(json_object(newest / "trainer_state.json").get("log_history") or [], "loss")


def _curve(history: Any, name: str) -> tuple[tuple[float, float], ...]:
    """(step, value) of the entries where both are finite numbers."""
    points = [(_number(entry.get("step")), _number(entry.get(name))) for entry in history]
    return tuple((step, value) for step, value in points if step is not None and value is not None)


def _samples(values: Any) -> tuple[dict[str, Any], ...]:
    """Prompts with their answers as texts, and the names of the answers that were cut; images have no expected one."""
    texts = ("prompt", "expected", "before", "after")
    return tuple(
        {**{name: str(entry[name]) for name in texts if name in entry}, "cut": list(map(str, entry.get("cut", ())))}
        for entry in values
        if "expected" in entry
    )


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    numbers = {str(name): _number(value) for name, value in values.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _number(value: Any) -> float | None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; NaN is allowed, since a diverged run writes it.

    Raises:
        LilyError: if the file is not a JSON object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise LilyError(f"{file} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise LilyError(f"{file} holds a {type(value).__name__}, not an object")
    return value
