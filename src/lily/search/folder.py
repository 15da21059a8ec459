"""The folder of a search or a comparison: used by one process at a time, and always with the same settings."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from lily.errors import LilyError
from lily.io.atomic import remove_folder, write_text
from lily.recipes.begun import as_begun
from lily.recipes.data.rows import load_splits
from lily.recipes.loader import without_placeholders
from lily.recipes.preflight import flat
from lily.recipes.results.run_files import changed_rows
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer.checkpoints import ROWS

SETTINGS, LOCK = "settings.json", ".lock"
# Keys that may change when a search is resumed, because no trial depends on them.
FREE = ("recipe.description", "recipe.chosen_by", "recipe.output", "recipe.baselines", "recipe.train.report_to")
WEIGHTS = ("checkpoints", "best", "last")
PATIENCE = 60.0  # seconds that the runs of a killed parent have to write their checkpoints


@contextlib.contextmanager
def opened(
    folder: Path, command: str, names: Sequence[str], overwrite: bool = False, settings: Mapping[str, Any] | None = None
) -> Iterator[IO[str]]:
    """Create or reopen a folder and lock it for this process; yields the lock, which the runs inherit.

    Args:
        folder: to work in.
        command: that writes the folder, such as `lily tune`, for messages.
        names: of the files and folders that the command writes there.
        overwrite: delete what is there first.
        settings: what all runs have in common, as plain values; None: nothing is recorded or compared.

    Raises:
        LilyError: if the folder holds anything else, another process uses it, or it was begun with other settings.
            Nothing is written then.
    """
    present = check(folder, command, names)
    if settings is not None and not overwrite and (folder / SETTINGS).is_file():
        _check_settings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a", encoding="utf-8") as lock:
        _hold(lock, folder)
        for name in present:
            path = folder / name
            if name != LOCK and (overwrite or _is_leftover(name, names)):
                remove_folder(path) if path.is_dir() else path.unlink()
        if settings is not None and not (folder / SETTINGS).is_file():
            write_text(folder / SETTINGS, json.dumps(settings, indent=2))
        yield lock


def check(folder: Path, command: str, names: Sequence[str]) -> list[str]:
    """The names of what is in a folder; empty if it does not exist.

    Raises:
        LilyError: if it is a file, or holds anything that the command does not write.
    """
    if folder.exists() and not folder.is_dir():
        raise LilyError(f"--output {folder} is a file; name a folder")
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = (*names, SETTINGS, LOCK)
    if foreign := [name for name in present if name not in own and not _is_leftover(name, own)]:
        raise LilyError(
            f"--output {folder} holds {foreign[0]}, which `{command}` does not write; move it away, or name another "
            "folder"
        )
    return present


def _is_leftover(name: str, names: Sequence[str]) -> bool:
    """Whether it is the temporary file of a write that was interrupted."""
    return any(name.startswith(f".{own}.") for own in names)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        recorded = json.loads((folder / SETTINGS).read_text("utf-8"))
    except ValueError as error:
        raise LilyError(f"{folder / SETTINGS} is not JSON ({error}); start over with --overwrite") from None
    with contextlib.suppress(ValidationError, KeyError, TypeError):  # keys that did not exist then have their defaults
        recipe = as_begun(Recipe.model_validate(recorded["recipe"]), folder)
        recorded = {**recorded, "recipe": recipe.model_dump(mode="json")}
    before, now = flat(recorded), flat(json.loads(json.dumps(settings)))
    changed = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in FREE)
    ]
    if changed:
        raise LilyError(
            f"--output {folder} was begun with other settings: {'; '.join(changed[:5])}. Repeat the earlier settings "
            "to continue, start over with --overwrite, or name another folder"
        )


def check_rows(folder: Path, recipe: Recipe) -> None:
    """Refuse to count or resume runs, anywhere in a folder, whose rows have changed since; their data are the recipe's.

    Raises:
        LilyError: names the first one. A run of an earlier version does not tell its rows.
    """
    begun = sorted(file.parent for file in folder.rglob(ROWS))
    splits = load_splits(recipe) if begun else None
    for run in begun:
        if splits is not None and (other := changed_rows(splits, run)):
            raise LilyError(
                f"{run} has other rows of {', '.join(other)} than the files have now; bring them back, name another "
                "folder with --output, or start over with --overwrite"
            )


def _hold(file: IO[str], folder: Path) -> None:
    """Lock an open file in a folder.

    `filelock` would not do: runs inherit the descriptor and so keep the lock while they outlive a killed parent (they
    stop within a step), and filelock opens files that children do not inherit.

    Raises:
        LilyError: if it stays locked for longer than `PATIENCE`.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > end:
                raise LilyError(f"another process is using {folder}; wait until it ends, or stop it") from None
            time.sleep(0.2)


def inside(recipe: Recipe, output: Path) -> Recipe:
    """The recipe with `output` set to a folder inside the search's, and without baselines."""
    overridden = replace(recipe.locations, overridden=recipe.locations.overridden | {("output",)})
    return recipe.model_copy(update={"output": without_placeholders(output), "baselines": []}).written_at(overridden)


def is_begun(run: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (run / "recipe.yaml").is_file()


def remove_weights(run: Path) -> None:
    """Delete the weights of a finished run; its figures stay."""
    for name in WEIGHTS:
        remove_folder(run / name)
