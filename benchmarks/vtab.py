"""The VTAB-1K protocol on any images: 800 for training, 200 for validation, everything else for the test.

    python benchmarks/vtab.py SOURCE OUT [--test IMAGES] [--train 800] [--validation 200] [--seed 0]

SOURCE is a folder with one folder per class, an archive of one, or a list of files; OUT is created,
in the public VTAB-1K layout: `images/` and the lists `train800.txt`, `val200.txt`,
`train800val200.txt` and `test.txt`, with a file and its class number in each line. Each class keeps its
share, with at least one training image. The same images and seed give the same selection.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.errors import LilyError
from lily.io.atomic import new_folder
from lily.recipes.data.images import read_images
from lily.recipes.data.sources import local_path

TRAIN, VALIDATION = 800, 200


@dataclass(frozen=True)
class Chosen:
    """The three parts of a data set, each image as (file, class name)."""

    train: tuple[tuple[str, str], ...]
    validation: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


def choose(
    images: Sequence[tuple[str, str]], train: int = TRAIN, validation: int = VALIDATION, seed: int = 0
) -> Chosen:
    """Select at random, each class in proportion to its size and with at least one training image.

    The order of `images` does not matter.

    Args:
        images: (file, class name).
        train: number of training images.
        validation: number of validation images.
        seed: random seed of the selection.

    Raises:
        LilyError: if there are fewer images, or more classes than training images.
    """
    classes: dict[str, list[str]] = {}
    for file, label in sorted(images):
        classes.setdefault(label, []).append(file)
    if len(images) < train + validation:
        raise LilyError(
            f"{len(images)} images are too few for {train} to train and {validation} to validate on; "
            "lower --train or --validation"
        )
    if len(classes) > train:
        raise LilyError(f"{len(classes)} classes, but only {train} images to train on; raise --train")
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
    """Divide `count` in proportion to sizes, by largest remainders; no share exceeds its size.

    Args:
        sizes: of the classes.
        count: at most the sum of the sizes.
        least: minimum of each share; at most the smallest size.
    """
    total = max(1, sum(sizes.values()))
    exact = {name: size * count / total for name, size in sizes.items()}
    shares = {name: max(least, int(share)) for name, share in exact.items()}
    while (
        left := count - sum(shares.values())
    ) != 0:  # add to the share farthest below, or take from the one farthest above
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
        source: images for `lily.recipes.data.images.read_images`.
        out: the folder to create.
        test: test images, in the same forms as `source`; default: the remaining images of `source`.
        train: number of training images.
        validation: number of validation images.
        seed: random seed of the selection.

    Raises:
        LilyError: if there are too few images, a test class has no training image, or `out` exists.
    """
    pool = [(row["image"], row["label"]) for row in read_images(source)]
    chosen = choose(pool, train, validation, seed)
    if test is not None:
        held_out = tuple((row["image"], row["label"]) for row in read_images(test))
        chosen = Chosen(chosen.train, chosen.validation, held_out)
    labels = sorted({label for _, label in pool}, key=_by_number)
    if unknown := {label for _, label in chosen.test} - set(labels):
        raise LilyError(f"{test} has the class {min(unknown)!r}, but {source} has not; remove its images")
    numbers = {label: i for i, label in enumerate(labels)}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as folder:
        copies: dict[str, tuple[tuple[str, str], ...]] = {}
        for part in ("train", "validation", "test"):
            target = folder / "images" / part
            target.mkdir(parents=True)
            copied = []
            for i, (file, label) in enumerate(getattr(chosen, part)):
                name = f"{i:06d}{Path(file).suffix.lower()}"
                shutil.copyfile(file, target / name)
                copied.append((f"images/{part}/{name}", label))
            copies[part] = tuple(copied)
        for name, images in lists_of(Chosen(**copies)).items():
            (folder / name).write_text("".join(f"{file} {numbers[label]}\n" for file, label in images), "utf-8")
        (folder / "classes.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    return chosen


def _by_number(label: str) -> tuple[int, str]:
    return (int(label) if label.isascii() and label.isdigit() else 0, label)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the folder and print its lists."""
    parser = argparse.ArgumentParser(description="Select few images of a data set as VTAB-1K does.")
    parser.add_argument("source", help="images: a folder with one folder per class, an archive of one, or a list")
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("--test", help="test images; default: the remaining images of SOURCE")
    parser.add_argument("--train", type=int, default=TRAIN, help="number of training images")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the selection")
    options = parser.parse_args(arguments)
    if options.train < 1 or options.validation < 0:
        parser.error("--train must be at least 1, and --validation at least 0")
    chosen = build(
        local_path(options.source),
        options.out.expanduser(),
        test=None if options.test is None else local_path(options.test),
        train=options.train,
        validation=options.validation,
        seed=options.seed,
    )
    lists, console = lists_of(chosen), Console()
    table = Table("list", "images", "classes", title=escape(str(options.out)), title_justify="left")
    for name, images in lists.items():
        table.add_row(escape(name), f"{len(images):,}", str(len({label for _, label in images})))
    console.print(table)
    console.print("classes.txt names the classes by their numbers. In a recipe: data.train.path=", end="")
    console.print(f"{options.out}/{next(iter(lists))}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    try:
        main()
    except LilyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
