"""`lily new`: a short recipe for somebody's own data."""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from lily.io.words import counted, some
from lily.recipes.by_task import BASES
from lily.recipes.data.guess import HELD_OUT, Guess
from lily.recipes.data.sniff import READ

STEPS = 300  # fewer leave a small data set unlearned
CHAT_STEPS = 60  # a causal model needs fewer, and repeats answers that it has seen often
BATCHES = {320: 8, 1280: 16}  # fewer training rows than this -> batch; of more, the base's
BATCH, CHAT_BATCH = 32, 16  # of the base recipes
MOST_EPOCHS, MOST_CHAT_EPOCHS, LEAST_EPOCHS = 20, 10, 3
CHARACTERS = 3  # in a token, at least; more in most languages with spaces
SHOWN = 4  # classes and columns in a comment
READ_AS = {"header": "no line of names was found", "encoding": "not UTF-8: look at the accents in lily plan"}


def name_for(path: Path) -> str:
    """A recipe's name from a file's: lower case, with dashes."""
    stem = path.name.partition(".")[0] or path.resolve().name
    stem = path.resolve().parent.name if stem.lower() == "train" else stem
    plain = unicodedata.normalize("NFKD", stem.lower()).encode("ascii", "ignore").decode() if stem.strip() else ""
    return re.sub(r"[^a-z0-9._-]+", "-", plain).strip("-._") or "mine"


def recipe_text(found: Guess, name: str) -> str:
    """The YAML of a recipe for what was found, with comments that say why."""
    notes = [note for key, note in READ_AS.items() if key in found.how]
    source = _flow({"path": str(found.path)} | found.how).replace("delimiter: ;", "delimiter: ';'")
    data = [f"  train: {source}" + (f"  # {'; '.join(notes)}" if notes else "")]
    data += [f"  {part}: {_flow({'path': str(file)})}" for part, file in found.others.items()]
    if found.columns:
        unused = f"  # not used: {some(found.unused, SHOWN)}" if found.unused else ""
        data.append(f"  columns: {_flow(found.columns)}{unused}")
    if shares := _shares(found):
        data.append(f"  split: {_flow(shares)}  # taken from the training file; the same rows each time")
    if (length := _tokens(found.longest)) > (usual := 1024 if found.task == "sft" else 256):
        data.append(f"  max_length: {usual}  # tokens; the longest text may have about {length}, and is cut")
    lines = [
        f"# {_what(found)}",
        *(f"# {sentence}" for sentence in found.told),
        f"extends: {BASES[found.task]}  # model, method and schedule; any of its keys can be set here too",
        f"name: {name}",
        *([f"task: {found.task}"] if found.task == "text-regression" else []),
        "data:",
        *data,
    ]
    if found.task == "sft":
        lines.append(f"generation: {{max_new_tokens: {_answer_tokens(found.answer)}}}  # the longest answer, with room")
    if found.rows is not None:
        lines.append(_schedule(_trained(found), found.task == "sft"))
    return "\n".join(lines) + "\n"


def _schedule(rows: int, chat: bool) -> str:
    """The section `train` for a number of training rows: smaller batches and more epochs where there are few."""
    usual = CHAT_BATCH if chat else BATCH
    batch = min(usual, next((size for most, size in BATCHES.items() if rows < most), usual))
    per_epoch = math.ceil(rows / batch)
    steps, most = (CHAT_STEPS, MOST_CHAT_EPOCHS) if chat else (STEPS, MOST_EPOCHS)
    epochs = min(max(math.ceil(steps / per_epoch), LEAST_EPOCHS), most)
    section = {"epochs": epochs} | ({"batch_size": batch} if batch != usual else {})
    return f"train: {_flow(section)}  # about {epochs * per_epoch} steps of {batch} rows"


def _what(found: Guess) -> str:
    images = found.task == "image-classification"
    rows = f"the first {READ:,} rows" if found.rows is None else counted(found.rows, "image" if images else "row")
    rows = "not counted" if found.rows is None and not found.classes and images else rows
    if found.classes:
        shown = [f"{label!r} {n:,}" for label, n in found.classes.items()]
        return f"{found.path}: {rows}, {len(found.classes)} classes ({some(shown, SHOWN)})."
    chats = "chats" if "messages" in found.columns else "prompts and answers"
    kind = {"sft": chats, "text-regression": "texts with numbers"}.get(found.task, "images")
    return f"{found.path}: {kind}, {rows}."


def _shares(found: Guess) -> dict[str, float]:
    """Shares of the training file that are held out: for the parts that have no file of their own."""
    return {part: HELD_OUT for part in ("validation", "test") if part not in found.others}


def _trained(found: Guess) -> int:
    return max(1, round((found.rows or 0) * (1 - sum(_shares(found).values()))))


def _tokens(characters: int) -> int:
    return math.ceil(characters / CHARACTERS)


def _answer_tokens(characters: int) -> int:
    """A round number of tokens that the longest answer fits into."""
    return min(1024, max(16, 1 << math.ceil(math.log2(_tokens(characters) + 8))))


def _flow(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000).strip()
