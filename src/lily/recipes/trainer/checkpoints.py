"""Checkpoints of a run: one gets its name when it is complete, and the one before it is kept until then.

A checkpoint is what transformers' Trainer resumes from, with the files of `state_files` instead of pickles, and the
run's progress: the evaluations and the best adapter so far, so that a resumed run chooses among these.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.io.atomic import naming, new_folder, publish, remove_folder, write_text
from lily.recipes.trainer.state_files import SPOILED

ROWS = "rows.json"  # fingerprints of the rows of each part

# Names that a run writes into its folder.
OWN = ("best", "last", "lora", "checkpoints", "metrics.json", "predictions.json", "progress.json", "recipe.yaml", ROWS,
       "samples", "diffusers", "class-images", "train.log", "tensorboard")  # fmt: skip
# Inside a checkpoint; the best adapter is one folder deeper than where transformers looks for adapters to load.
MOMENT = "progress/moment.json"
BEST = "progress/best"


@dataclass
class Moment:
    """State of a run when a checkpoint was written, besides the trainer's.

    Attributes:
        history: the evaluations so far.
        owed: whether a signal interrupted an evaluation that was due; a resumed run begins with it.
        seconds: training time.
        peak_bytes: peak memory.
        router: state of `lily.callbacks.router_watch`.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    owed: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0
    router: dict[str, Any] = field(default_factory=dict)

    def write(self, checkpoint: Path, best: Path) -> None:
        """Write it, and the best adapter, into a checkpoint."""
        (checkpoint / MOMENT).parent.mkdir()
        if self.history:
            shutil.copytree(best, checkpoint / BEST)
        (checkpoint / MOMENT).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path | None) -> Moment:
        """The state in a checkpoint; without one, that of a new run.

        Raises:
            LilyError: if the checkpoint is not one of `write`.
        """
        if checkpoint is None:
            return cls()
        file = checkpoint / MOMENT
        try:
            return cls(**json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise LilyError(SPOILED.format(file=file, error=error)) from error


def last(output: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = {step: p for p in (output / "checkpoints").glob("*") if (step := _step(p)) and (p / MOMENT).is_file()}
    return found[max(found)] if found else None


def _step(path: Path) -> int:
    """The step in a checkpoint's name; 0: the path is not a checkpoint."""
    named = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(named[1]) if named else 0


def is_leftover(name: str) -> bool:
    """Whether the name is that of a temporary file or folder of a killed run: `.best.x7f`, `.metrics.json.x7f`."""
    return any(name.startswith(f".{own}.") for own in OWN)


@contextlib.contextmanager
def written(checkpoint: Path, main: bool, wait: Callable[[], object]) -> Iterator[Path]:
    """A hidden folder to write into, which becomes the checkpoint when the block ends without an error.

    Args:
        checkpoint: `.../checkpoint-STEP`.
        main: whether this process creates, renames and removes folders; all processes may write files.
        wait: returns when every process has called it.

    Raises:
        OSError: naming the checkpoint, when the disk is full; older checkpoints are unchanged.
    """
    hidden = checkpoint.with_name(f".{checkpoint.name}.new")
    new = hidden / checkpoint.name
    with naming(checkpoint):
        try:
            if main:
                shutil.rmtree(hidden, ignore_errors=True)
                new.mkdir(parents=True)
            wait()
            yield new
            wait()
            if main:
                publish(new, checkpoint)
        finally:
            if main:
                shutil.rmtree(hidden, ignore_errors=True)
    if main:
        _remove_others(checkpoint)
    wait()


def _remove_others(checkpoint: Path) -> None:
    for other in checkpoint.parent.glob("*"):
        if _step(other) and other != checkpoint:
            remove_folder(other)


def restore(output: Path, checkpoint: Path | None) -> None:
    """Reset a run's folder to a checkpoint (None: to an empty run) and remove temporary files of a killed run.

    It can be repeated after being killed at any point.
    """
    for leftover in [
        *(p for p in output.glob(".*") if is_leftover(p.name)),
        *(output / "checkpoints").glob(".checkpoint-*"),
    ]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    moment = Moment.read(checkpoint)
    if checkpoint is not None:
        _remove_others(checkpoint)  # a run killed right after it named this one did not remove them
    if checkpoint is not None and moment.history:
        with new_folder(output / "best", overwrite=True) as new:
            shutil.copytree(checkpoint / BEST, new, dirs_exist_ok=True)
        write_text(output / "progress.json", json.dumps(moment.history))
    else:
        (output / "progress.json").unlink(missing_ok=True)


def clear(output: Path) -> None:
    """Delete a run, its checkpoints first, so that a half deleted run is never resumed."""
    remove_folder(output / "checkpoints")
    shutil.rmtree(output, ignore_errors=True)
