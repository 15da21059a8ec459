"""The folder of a search or a sweep: one process at a time, and always the same settings."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lily.compare import runner
from lily.errors import LilyError
from lily.io.atomic import remove_folder, write_text
from lily.recipes import loader
from lily.recipes.preflight import flat
from lily.recipes.spec.locations import KeyLocations
from lily.recipes.spec.schema import Recipe

SETTINGS = "settings.json"
LOCK = ".lock"
# What may differ between the command that began and the one that goes on: it changes no trial.
FREE = ("recipe.description", "recipe.output", "recipe.baselines", "recipe.train.report_to")
HEAVY = ("checkpoints", "best", "last")


@contextlib.contextmanager
def opened(folder: Path, settings: Mapping[str, Any], own: Sequence[str], overwrite: bool = False) -> Iterator[Any]:
    """Within: the folder exists, is this process's alone, and holds what these settings began; gives its lock.

    Args:
        folder: to work in.
        settings: what all of its runs have in common, as plain values.
        own: names of what is written there, besides the settings.
        overwrite: begin anew.

    Raises:
        LilyError: if it is another's, in use, or was begun with other settings. Nothing is written then.
    """
    _check(folder, settings, own, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        if overwrite:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
        if not (folder / SETTINGS).is_file():
            write_text(folder / SETTINGS, json.dumps(settings, indent=2))
        yield lock


def _check(folder: Path, settings: Mapping[str, Any], own: Sequence[str], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LilyError(f"output {folder} is a file; name a folder")
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    names = (*own, SETTINGS, LOCK)
    foreign = [name for name in found if name not in names and not any(name.startswith(f".{n}.") for n in names)]
    if foreign:
        raise LilyError(
            f"output {folder} holds {foreign[0]}, which is not of this; move it away, or name another with --output"
        )
    if overwrite or not (folder / SETTINGS).is_file():
        return
    try:
        then = json.loads((folder / SETTINGS).read_text("utf-8"))
    except ValueError as error:
        raise LilyError(f"{folder / SETTINGS} is not JSON ({error}); start anew with --overwrite") from None
    before, now = flat(then), flat(json.loads(json.dumps(settings)))
    changed = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in FREE)
    ]
    if changed:
        raise LilyError(
            f"output {folder} was begun with other settings: {'; '.join(changed[:5])}. Give the same again to go on, "
            "start anew with --overwrite, or name another folder with --output"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[IO[str]]:
    with (folder / LOCK).open("a", encoding="utf-8") as file:
        runner.hold(file, folder)
        yield file


def placed(recipe: Recipe, output: Path) -> Recipe:
    """The recipe, writing to a folder inside one that the user named."""
    where = recipe.locations
    named = KeyLocations(where.written, where.overridden | {("output",)})
    return recipe.model_copy(update={"output": _literal(output), "baselines": []}).written_at(named)


def _literal(path: Path) -> str:
    """A path in which braces are no placeholders."""
    return str(path).replace("{", "{{").replace("}", "}}")


def begun(run: Path) -> bool:
    """Whether a run's folder holds the beginning of one."""
    return (run / "recipe.yaml").is_file()


def lighten(run: Path) -> None:
    """Keep a finished run's figures, and delete its weights."""
    for name in HEAVY:
        remove_folder(run / name)


def extending(
    source: str, overrides: Sequence[str], name: str, sections: Mapping[str, Any], why: str
) -> dict[str, Any]:
    """The values of a recipe that extends another one.

    Args:
        source: a shipped recipe's name, or a file.
        overrides: given beside it on the command line.
        name: of the new recipe.
        sections: section -> key -> value: what it changes.
        why: its description.
    """
    values = loader.overriding(overrides)
    for section, keys in sections.items():
        values[section] = {**(values.get(section) or {}), **keys}
    dropped = ("name", "description", "output")
    return {
        "extends": loader.from_anywhere(source),
        "name": name,
        "description": why,
        **{key: value for key, value in values.items() if key not in dropped},
        "output": "runs/{name}-{method}-{seed}",
    }
