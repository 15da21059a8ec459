"""What a recipe's data are, in one look: rows, classes, lengths and repeats per part, and what surely nobody means."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lily.io.words import counted
from lily.recipes.data import labels
from lily.recipes.data.rows import Splits, drawn, input_key
from lily.recipes.data.sft import completion_of
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import (
    Encoded,
    Processor,
    conversation,
    encode_inputs,
    encode_turn,
    length,
    text_processor,
)
from lily.recipes.spec.base import CLASSIFYING
from lily.recipes.spec.schema import Recipe

RARE = 5  # training rows of a class; fewer are marked
SHOWN = 8  # classes in the table; of more, the rarest and the most frequent
CAP = 1000  # rows that are tokenized for their lengths alone
IMAGES = 5000  # images of a part whose bytes are compared
CUT = 0.1  # share of truncated rows that is told
UNKNOWN = 0.05  # share of unknown tokens that is told
LARGE = 10  # in a label of a regression: from 20 to 60, 140 steps at the usual rate learned next to nothing
TEXT = 50  # characters of a text in a message


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens before truncation."""

    median: int  # of all examples
    p95: int  # of 100 examples, 95 are at most this long
    longest: int  # of those that were measured
    truncated: float  # share of examples over `data.max_length`
    sample: int | None = None  # examples that were measured, if not all


@dataclass(frozen=True)
class Part:
    """The rows of one part.

    Attributes:
        rows: those that were read for the part.
        used: those that train or are judged.
        left_out: reason -> number of the others.
        classes: class -> number of used rows; None without classes.
        lengths: None for images, and where there is no tokenizer.
        repeated: used rows whose input is that of an earlier one, whatever its case and spaces.
        in_train: used rows whose input is also a training row's; None for the training rows themselves.
        compared: rows among which repeats were looked for, if not all.
    """

    name: str
    rows: int
    used: int
    left_out: Mapping[str, int]
    classes: Mapping[str, int] | None
    lengths: Lengths | None
    repeated: int
    in_train: int | None
    compared: int | None = None


@dataclass(frozen=True)
class Summary:
    """The data of a recipe, as printed by `lily plan` and kept in `metrics.json`."""

    parts: tuple[Part, ...]
    contradictions: int  # inputs that have several labels, or several completions, in all parts
    prompts: bool  # inputs are prompts, which may have several answers
    numbers: tuple[float, float, float] | None  # smallest, median and largest label of a regression's training rows
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def facts(self) -> list[str]:
        """Sentences beside the tables."""
        said = [
            f"Left out of {part.name}: {', '.join(f'{count:,} {reason}' for reason, count in part.left_out.items())}."
            for part in self.parts
            if part.left_out
        ]
        if self.numbers is not None:
            said.append("Labels from {:g} to {:g}, median {:g}.".format(*(self.numbers[i] for i in (0, 2, 1))))
        if self.contradictions and self.prompts:
            said.append(f"{self.contradictions:,} prompts have more than one answer.")
        for part in self.parts:
            if part.lengths is not None and part.lengths.sample is not None:
                said.append(f"Lengths of {part.name}: of a sample of {part.lengths.sample:,}.")
            if part.compared is not None:
                said.append(f"Repeats in {part.name}: among a sample of {part.compared:,}.")
        return said

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table of the parts: header and lines."""
        measured = any(part.lengths for part in self.parts)
        tokens = ["tokens: median", "95%", "longest", "truncated"] if measured else []
        lines = [
            [
                part.name,
                f"{part.rows:,}",
                f"{part.used:,}",
                *(_lengths(part.lengths) if measured else ()),
                f"{part.repeated:,}",
                "" if part.in_train is None else f"{part.in_train:,}",
            ]
            for part in self.parts
        ]
        return ["", "rows", "used", *tokens, "repeated", "also in train"], lines

    def classes(self) -> tuple[list[str], list[list[str]]] | None:
        """The table of the classes: header and lines; None without classes."""
        counted = [part for part in self.parts if part.classes is not None]
        if not counted:
            return None
        train = counted[0].classes or {}
        names = list(dict.fromkeys(name for part in counted for name in part.classes or ()))
        lines = [
            [
                name,
                *(f"{(part.classes or {}).get(name, 0):,}" for part in counted),
                "missing in train" if not train.get(name) else "rare" if train[name] < RARE else "",
            ]
            for name in names
        ]
        if len(lines) > SHOWN:
            lines.sort(key=lambda line: train.get(line[0], 0))
            middle = ["...", *("" for _ in counted), f"{len(lines) - SHOWN + 1} more"]
            lines = [*lines[: SHOWN // 2], middle, *lines[-(SHOWN // 2 - 1) :]]
        return [f"{len(names)} classes", *(part.name for part in counted), ""], lines


def summarize(
    recipe: Recipe, splits: Splits, encoded: Mapping[str, Encoded], processor: Processor | None = None
) -> Summary:
    """Look at a recipe's data.

    Args:
        recipe: its task and maximum length.
        splits: its rows.
        encoded: part -> its rows as they were encoded for the run; of the others' lengths a sample is tokenized.
        processor: None: lengths are not measured.
    """
    targets: dict[int, dict[str, Row]] = {}
    trained: set[int] = set()
    parts, warnings = [], list(splits.notes)
    for name, rows in splits.parts.items():
        if not rows:
            continue
        compared = drawn(rows, IMAGES) if recipe.task == "image-classification" else rows
        keys = [hash(input_key(row)) for row in compared]
        for key, row in zip(keys, compared, strict=True):
            targets.setdefault(key, {}).setdefault(_target(row), row)
        if name == "train":
            trained = set(keys)
        dropped = _dropped(rows, encoded.get(name))
        left_out = {**splits.left_out.get(name, {}), **({"no loss within data.max_length": dropped} if dropped else {})}
        part = Part(
            name,
            len(rows) + sum(splits.left_out.get(name, {}).values()),
            len(rows) - dropped,
            left_out,
            _classes(rows, splits, recipe),
            _measured(rows, encoded.get(name), recipe, processor),
            len(keys) - len(set(keys)),
            None if name == "train" else sum(key in trained for key in keys),
            len(compared) if len(compared) < len(rows) else None,
        )
        parts.append(part)
        warnings += _about(part, rows, encoded.get(name), recipe)
    warnings += [*_across(parts, encoded, recipe), *_unknown(splits.train, encoded.get("train"), processor)]
    several = [rows_of for rows_of in targets.values() if len(rows_of) > 1]
    prompts = recipe.task == "sft" and recipe.data.choices is None
    if several and not prompts:
        warnings.append(_contradiction(several))
    numbers = None
    if recipe.task == "text-regression":
        ordered = sorted(float(row["label"]) for row in splits.train)
        numbers = ordered[0], ordered[len(ordered) // 2], ordered[-1]
        if ordered[0] == ordered[-1]:
            warnings.append(f"all training rows have the label {ordered[0]:g}, so there is nothing to learn")
        elif max(abs(ordered[0]), abs(ordered[-1])) > LARGE:
            mean, deviation = statistics.fmean(ordered), statistics.pstdev(ordered)
            warnings.append(
                f"labels from {ordered[0]:g} to {ordered[-1]:g} are far from 0, where a new head begins, and may not "
                f"be reached; write each as (label - {mean:.4g}) / {deviation:.4g}"
            )
    return Summary(tuple(parts), len(several), prompts, numbers, tuple(warnings))


def _target(row: Row) -> str:
    """What a row's input should give."""
    return str(row["label"]) if "label" in row else completion_of(row)


def _classes(rows: Sequence[Row], splits: Splits, recipe: Recipe) -> dict[str, int] | None:
    """Rows by class, or by answer where there are as few answers as classes."""
    if splits.labels is not None:
        counts = Counter(row["label"] for row in rows)
        return {name: counts[name] for name in splits.labels}
    if recipe.data.choices is None:
        return None
    answers = Counter(str(row["completion"]).strip() for row in rows)
    return dict(answers) if len(answers) <= SHOWN else None


def _dropped(rows: Sequence[Row], found: Encoded | None) -> int:
    """Rows of sft without any example that has a loss."""
    return 0 if found is None else len(rows) - len(set(found.rows))


def _about(part: Part, rows: Sequence[Row], found: Encoded | None, recipe: Recipe) -> list[str]:
    """What surely nobody means in the rows of a part."""
    name, said = part.name, list[str]()
    if found is not None and found.empty:
        said.append(
            f"{name}: {counted(len(found.empty), 'answer is', 'answers are')} empty but for special tokens such as the "
            f"end token, which have all of the loss (the first answers {_short(rows[found.empty[0]])}); fill or remove "
            "them"
        )
    if name == "train" and part.lengths is not None and part.lengths.truncated >= CUT:
        said.append(
            f"{name}: {part.lengths.truncated:.0%} of the examples are cut at data.max_length="
            f"{recipe.data.max_length}; the longest has {part.lengths.longest:,} tokens"
        )
    if recipe.task in CLASSIFYING and part.classes is not None and name == "train":
        rare = {label: count for label, count in part.classes.items() if 0 < count < RARE}
        if rare:
            shown = ", ".join(f"{label!r} {count}" for label, count in sorted(rare.items(), key=lambda i: i[1])[:3])
            more = ", ..." if len(rare) > 3 else ""
            said.append(
                f"train: {len(rare)} of {len(part.classes)} classes have fewer than {RARE} rows ({shown}{more}); add "
                "rows, correct the labels, or choose the classes with data.classes"
            )
        for family in (
            labels.families(part.classes, labels.nearly_alike)[:3] if recipe.data.similar_labels != "keep" else ()
        ):
            said.append(
                f"classes differ only in punctuation or zeros: {labels.named(family, part.classes)}; write them "
                "alike in the file if they are one, otherwise set data.similar_labels: keep"
            )
        for label in filter(labels.looks_missing, part.classes):
            said.append(f"a class is named {label!r}, as missing values are; remove these rows if they have no label")
    echoes = [row for row in rows if _repeats_prompt(row)] if recipe.task == "sft" else []
    if echoes:
        same = counted(len(echoes), "answer is the same text as its", "answers are the same text as their")
        said.append(f"{name}: {same} prompt ({_short(echoes[0])}); correct data.columns or these rows")
    damaged = [row for row in rows if _damaged(str(row.get("text", row.get("prompt", ""))))]
    if damaged:
        said.append(
            f"{name}: {len(damaged):,} texts were once decoded wrongly ({_short(damaged[0])}); read the file that they "
            "come from with the right encoding"
        )
    return said


def _across(parts: Sequence[Part], encoded: Mapping[str, Encoded], recipe: Recipe) -> list[str]:
    """What surely nobody means and is told for all parts at once."""
    said = []
    dropped = {part.name: encoded[part.name] for part in parts if part.name in encoded and encoded[part.name].left_out}
    if dropped:
        shown = ", ".join(f"{len(found.left_out):,} of {name}" for name, found in dropped.items())
        said.append(
            f"answers are left out, because their prompt fills data.max_length={recipe.data.max_length}: {shown}; "
            f"raise it to {max(found.fits for found in dropped.values())} or more"
        )
    alone: dict[str, list[str]] = {}
    for part in parts if recipe.task in CLASSIFYING else ():
        present = [label for label, count in (part.classes or {}).items() if count]
        if len(present) == 1 and part.name != "train":
            alone.setdefault(present[0], []).append(part.name)
    for label, names in alone.items():
        said.append(
            f"{' and '.join(names)}: all rows are of the class {label!r}, so results say nothing of the others; add "
            "rows of these"
        )
    leaking = [part for part in parts if part.in_train]
    if leaking:
        shown = " and ".join(f"{counted(part.in_train or 0, 'input')} of {part.name}" for part in leaking)
        carved = not recipe.data.deduplicate and any(getattr(recipe.data, part.name, "") is None for part in leaking)
        fix = "set data.deduplicate: true" if carved else "remove them from one of the files"
        verb = "is" if sum(part.in_train or 0 for part in leaking) == 1 else "are"
        said.append(f"{shown} {verb} in train too, so results flatter; {fix}")
    return said


def _unknown(rows: Sequence[Row], found: Encoded | None, processor: Processor | None) -> list[str]:
    """Texts that the model cannot read, since its vocabulary lacks their script."""
    unknown = getattr(processor, "unk_token_id", None)
    if found is None or unknown is None or unknown == getattr(processor, "eos_token_id", None):
        return []
    counts = Counter[bool]()
    for i, example in zip(found.rows, found.examples, strict=True):
        foreign = not str(rows[i]).isascii()  # of others, single characters at most are unknown
        counts.update(foreign and int(token) == unknown for token in example.get("input_ids", ()))
    share = counts[True] / max(1, counts.total())
    if share < UNKNOWN:
        return []
    return [
        f"train: {share:.0%} of the tokens are unknown to the model, which reads {getattr(processor, 'unk_token', '')} "
        "in place of the text; set model to one that was trained on this language"
    ]


def _repeats_prompt(row: Row) -> bool:
    if "messages" not in row:
        return bool(row["prompt"].strip() == completion_of(row))
    texts = [message["content"].strip() for message in row["messages"]]
    return len(texts) > 1 and bool(texts[-1]) and texts[-1] == texts[-2] and row["messages"][-2]["role"] == "user"


def _damaged(text: str) -> bool:
    """Whether a text has the mark of a lost character, or is UTF-8 that was read as cp1252."""
    if text.isascii():
        return False
    try:
        text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return "\ufffd" in text
    return True


def _contradiction(several: Sequence[Mapping[str, Row]]) -> str:
    first = several[0]
    row, targets = next(iter(first.values())), list(first)
    return (
        f"{counted(len(several), 'input has', 'inputs have')} different labels ({_short(row)}: "
        f"{' and '.join(map(repr, targets[:3]))}); correct them, or remove all but one"
    )


def _short(row: Row) -> str:
    value = row.get("text", row.get("prompt", row.get("image")))
    if value is None and row.get("messages"):
        value = row["messages"][-1].get("content") if len(row["messages"]) == 1 else row["messages"][-2].get("content")
    text = str(value)
    return repr(text if len(text) <= TEXT else f"{text[:TEXT]}...")


def _measured(
    rows: Sequence[Row], found: Encoded | None, recipe: Recipe, processor: Processor | None
) -> Lengths | None:
    """Lengths before truncation: only examples as long as `data.max_length` are tokenized once more."""
    if processor is None or recipe.task == "image-classification":
        return None
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 1 << 30})})
    most = recipe.data.max_length
    if found is None:
        again = drawn(list(rows), CAP)
        known, asked, measured = [], len(rows), [size for row in again for size in _sizes(row, whole, processor)]
    else:
        known = [size for size in map(length, found.examples) if size < most]
        at_limit = {i for i, example in zip(found.rows, found.examples, strict=True) if length(example) >= most}
        asked = len(at_limit | {*found.left_out})
        again = [rows[i] for i in drawn(sorted(at_limit | {*found.left_out}), CAP)]
        measured = [size for row in again for size in _sizes(row, whole, processor) if size >= most]
        measured *= round(asked / max(len(again), 1))
    sizes, sample = [*known, *measured], len(again) if len(again) < asked else None
    sizes.sort()
    last, over = len(sizes) - 1, sum(size > most for size in sizes)
    return Lengths(sizes[last // 2], sizes[round(0.95 * last)], sizes[-1], over / len(sizes), sample)


def _sizes(row: Row, recipe: Recipe, processor: Processor) -> list[int]:
    if recipe.task != "sft":
        return [len(encode_inputs(row, recipe, processor)["input_ids"])]
    tokenizer = text_processor(processor)
    return [len(encode_turn(*turn, recipe, tokenizer)["input_ids"]) for turn in conversation(row, recipe, tokenizer)]


def _lengths(lengths: Lengths | None) -> list[str]:
    if lengths is None:
        return ["", "", "", ""]
    cut = f"{lengths.truncated:.0%}" if lengths.truncated == 0 or lengths.truncated >= 0.01 else "<1%"
    numbers = [f"{lengths.median:,}", f"{lengths.p95:,}", f"{lengths.longest:,}"]
    return [*numbers, cut]
