"""The head of a classifier in an adapter's file: its classes, and whether the model has as many outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lily.checkpoint.format import PREFIX
from lily.errors import LilyError
from lily.io.untrusted import blame, check_inside, read_json
from lily.io.words import counted, some
from lily.plan.sharing_plan import SAVED_HEADS

LABELS = "labels.json"
HEADS = ("classifier", "score", "classification_head", "head")
SHOWN = 20  # classes in a message


def labels_beside(folder: Path) -> tuple[str, ...] | None:
    """The classes kept beside an adapter; None: it has no labels.json.

    Raises:
        LilyError: if the file is no list of names.
    """
    file = folder / LABELS
    if not file.is_file():
        return None
    check_inside(file)
    labels = read_json(file)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise blame(file, "expected a list of the classes' names")
    return tuple(labels)


def outputs_of(names: Mapping[str, Sequence[int]], heads: Iterable[str] | None) -> int | None:
    """The number of outputs of the saved head among the shapes of a file's tensors, by name; None: there is none."""
    for module in heads or ():
        inside = [n for n in names if f".{module}." in f".{n}" and ".lily_" not in n and ".lora_" not in n]
        rows = [names[n][0] for n in inside if n.endswith("weight") and names[n]]
        if rows and module.rpartition(".")[2] in HEADS:
            return rows[-1]
    return None


def wrong_head(name: str, saved: Sequence[int], here: Sequence[int], labels: Sequence[str] | None) -> LilyError | None:
    """The error for a head's tensor with another number of classes than the model's; None: it is something else."""
    parts = name.removeprefix(PREFIX).split(".")
    is_head = any(part in (*HEADS, *SAVED_HEADS["SEQ_CLS"]) for part in parts[:-1])
    if not is_head or not saved or len(saved) != len(here) or tuple(saved[1:]) != tuple(here[1:]):
        return None
    count = saved[0]
    classes = ""
    if labels is not None and len(labels) == count:
        classes = f" ({some(labels, SHOWN)})"
    return LilyError(
        f"the adapter's head has {counted(count, 'class', 'classes')}{classes}, and the model's has {here[0]}: "
        f"{name!r} has shape {tuple(saved)}, and the model's {tuple(here)}; load the base model with num_labels={count}"
    )
