"""Checkpoints of a run: each is complete from the moment it has its name, and the one before lives until then.

A checkpoint is what transformers' Trainer resumes from, with the files of `state_files` in place of pickles, and beside
it the run's progress: the evaluations so far and the best adapter of that moment, so that a resumed run chooses among
its own evaluations and no others.
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

# What a run writes into its folder.
OWN = ("best", "last", "lora", "checkpoints", "metrics.json", "predictions.json", "progress.json", "recipe.yaml",
       "samples", "diffusers", "class-images")  # fmt: skip
# Inside a checkpoint, with the best adapter one folder deeper than where transformers looks for adapters to load.
MOMENT = "progress/moment.json"
BEST = "progress/best"


@dataclass
class Moment:
    """Where a run stood when a checkpoint was written, besides what the trainer knows.

    Attributes:
        history: the evaluations so far.
        owed: whether an evaluation was due that a signal cut short; a resumed run begins with it.
        seconds: spent in training.
        peak_bytes: the most memory that was held at once.
        router: what `lily.callbacks.router_watch` had seen.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    owed: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0
    router: dict[str, Any] = field(default_factory=dict)

    def write(self, checkpoint: Path, best: Path) -> None:
        """Put it, and the best adapter, into a checkpoint that is being written."""
        (checkpoint / MOMENT).parent.mkdir()
        if self.history:
            shutil.copytree(best, checkpoint / BEST)
        (checkpoint / MOMENT).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path | None) -> Moment:
        """What a checkpoint holds; that of a beginning, for none.

        Raises:
            LilyError: if it is not what `write` writes.
        """
        if checkpoint is None:
            return cls()
        file = checkpoint / MOMENT
        try:
            return cls(**json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise LilyError(
                f"{file} is no state of a training that can be resumed ({error}); start anew with --overwrite"
            ) from error


def last(output: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = {step: p for p in (output / "checkpoints").glob("*") if (step := _step(p)) and (p / MOMENT).is_file()}
    return found[max(found)] if found else None


def _step(path: Path) -> int:
    """The step in a checkpoint's name; 0 for another path."""
    named = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(named[1]) if named else 0


def is_leftover(name: str) -> bool:
    """Whether a killed run left a file or folder of this name: `.best.x7f`, `.metrics.json.x7f`."""
    return any(name.startswith(f".{own}.") for own in OWN)


@contextlib.contextmanager
def written(checkpoint: Path, main: bool, wait: Callable[[], object]) -> Iterator[Path]:
    """A folder of the same name in a hidden one, which becomes the checkpoint when the block ends well.

    Args:
        checkpoint: `.../checkpoint-STEP`.
        main: whether this process is the one that names and removes; all of them may write.
        wait: returns when every process has called it.

    Raises:
        OSError: naming the checkpoint, when the disk is full; older checkpoints are then as they were.
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
    """Put a run's folder back to the moment of a checkpoint, or of the beginning, and clear what a killed run left.

    Being killed here costs nothing: the next time does the same.
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
        _remove_others(checkpoint)  # those that a run killed right after it named this one had no time for
    if checkpoint is not None and moment.history:
        with new_folder(output / "best", overwrite=True) as new:
            shutil.copytree(checkpoint / BEST, new, dirs_exist_ok=True)
        write_text(output / "progress.json", json.dumps(moment.history))
    else:
        (output / "progress.json").unlink(missing_ok=True)


def clear(output: Path) -> None:
    """Delete a run, its checkpoints first, so that nothing goes on from one that is half deleted."""
    remove_folder(output / "checkpoints")
    shutil.rmtree(output, ignore_errors=True)
