"""The VTAB-1K protocol: 800 training and 200 validation images, everything else for the test.

Writes the public VTAB-1K layout: `images/` and the lists `train800.txt`, `val200.txt`, `train800val200.txt` and
`test.txt`, with a file and its class number in each line.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lily.errors import LilyError
from lily.io.atomic import new_folder
from lily.recipes.data.images import read_images

TRAIN, VALIDATION = 800, 200


@dataclass(frozen=True)
class Chosen:
    """Images of a data set by their part, each with its class.

    Attributes:
        train: (file, class name).
        validation: likewise.
        test: likewise.
    """

    train: tuple[tuple[str, str], ...]
    validation: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


def choose(
    images: Sequence[tuple[str, str]], train: int = TRAIN, validation: int = VALIDATION, seed: int = 0
) -> Chosen:
    """Choose at random, each class in its own proportion and at least once to train on.

    The same for the same images in any order.

    Args:
        images: (file, class name).
        train: how many to train on.
        validation: how many to validate on.
        seed: of the choice.

    Raises:
        LilyError: if there are fewer images, or more classes than training images.
    """
    classes: dict[str, list[str]] = {}
    for file, label in sorted(images):
        classes.setdefault(label, []).append(file)
    if len(images) < train + validation:
        raise LilyError(f"{len(images)} images are too few for {train} to train and {validation} to validate on")
    if len(classes) > train:
        raise LilyError(f"{len(classes)} classes, but only {train} images to train on; raise it")
    generator = random.Random(seed)
    for label in sorted(classes):
        generator.shuffle(classes[label])
    parts: list[tuple[tuple[str, str], ...]] = []
    for count, least in ((train, 1), (validation, 0)):
        shares = proportional({label: len(files) for label, files in classes.items()}, count, least)
        parts.append(tuple((file, label) for label in sorted(classes) for file in classes[label][: shares[label]]))
        classes = {label: files[shares[label] :] for label, files in classes.items()}
    rest = tuple((file, label) for label in sorted(classes) for file in classes[label])
    return Chosen(parts[0], parts[1], rest)


def lists_of(chosen: Chosen) -> dict[str, tuple[tuple[str, str], ...]]:
    """The lists of the public layout by their names, each image with its class."""
    train, validation = len(chosen.train), len(chosen.validation)
    return {
        f"train{train}.txt": chosen.train,
        f"val{validation}.txt": chosen.validation,
        f"train{train}val{validation}.txt": chosen.train + chosen.validation,
        "test.txt": chosen.test,
    }


def proportional(sizes: Mapping[str, int], count: int, least: int = 0) -> dict[str, int]:
    """Shares of `count` in proportion to sizes, by largest remainders; no share exceeds its size.

    Args:
        sizes: of the classes.
        count: what is shared out; at most all.
        least: what each gets at any rate; at most its size.
    """
    total = max(1, sum(sizes.values()))
    exact = {name: size * count / total for name, size in sizes.items()}
    shares = {name: max(least, int(share)) for name, share in exact.items()}
    while (left := count - sum(shares.values())) != 0:  # the farthest below its due gets one, the farthest above gives
        step = 1 if left > 0 else -1
        able = [n for n in sorted(sizes) if (shares[n] < sizes[n] if step > 0 else shares[n] > least)]
        shares[max(able, key=lambda name: step * (exact[name] - shares[name]))] += step
    return shares


def build(
    source: Path,
    out: Path,
    *,
    test: Path | None = None,
    train: int = TRAIN,
    validation: int = VALIDATION,
    seed: int = 0,
) -> Chosen:
    """Write a VTAB-1K folder from images by class.

    Args:
        source: what `lily.recipes.data.images.read_images` reads.
        out: the folder that is written; must not exist.
        test: images to test on, likewise; default: what is left of `source`.
        train: how many to train on.
        validation: how many to validate on.
        seed: of the choice.

    Raises:
        LilyError: if there are too few images, a test class was never trained on, or `out` exists.
    """
    pool = [(row["image"], row["label"]) for row in read_images(source)]
    chosen = choose(pool, train, validation, seed)
    if test is not None:
        held_out = tuple((row["image"], row["label"]) for row in read_images(test))
        chosen = Chosen(chosen.train, chosen.validation, held_out)
    labels = sorted({label for _, label in pool}, key=_by_number)
    if unknown := {label for _, label in chosen.test} - set(labels):
        raise LilyError(f"{test} has the class {min(unknown)!r}, which {source} has not")
    numbers = {label: i for i, label in enumerate(labels)}
    with new_folder(out) as folder:
        copies: dict[str, tuple[tuple[str, str], ...]] = {}
        for part in ("train", "validation", "test"):
            place = folder / "images" / part
            place.mkdir(parents=True)
            copied = []
            for i, (file, label) in enumerate(getattr(chosen, part)):
                name = f"{i:06d}{Path(file).suffix.lower()}"
                shutil.copyfile(file, place / name)
                copied.append((f"images/{part}/{name}", label))
            copies[part] = tuple(copied)
        for name, images in lists_of(Chosen(**copies)).items():
            (folder / name).write_text("".join(f"{file} {numbers[label]}\n" for file, label in images), "utf-8")
        (folder / "classes.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    return chosen


def _by_number(label: str) -> tuple[int, str]:
    return (int(label) if label.isascii() and label.isdigit() else 0, label)
