"""The keys of a recipe: types, defaults and descriptions.

A recipe names a model, data, targets, a method and a training schedule. These classes are the single source of the YAML
keys, of the JSON Schema that `lily schema` prints, and of the checks of single keys. Checks across keys are in
`lily.recipes.checks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lily.recipes.spec import values
from lily.recipes.spec.locations import KeyLocations

if TYPE_CHECKING:
    from typing_extensions import Self

Task = Literal["text-classification", "text-regression", "sft", "image-classification"]
CLASSIFYING = ("text-classification", "image-classification")
MethodName = Literal["lily", "stock-lily", "lora", "rslora", "dora", "peft", "none"]
Baseline = Literal["majority", "tfidf", "frozen", "lora"]
Quantization = Literal["none", "nf4", "int8"]
Metric = Literal[
    "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss", "perplexity", "exact_match", "accuracy_norm"
]

Activation = Literal["none", "relu", "gelu", "silu"]
Distinct = Literal["none", "permute", "signs", "permute+signs"]
Gain = Literal["none", "ones", "signs", "half-signs"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Field(description="auto: bfloat16 autocast if the hardware supports it (CUDA, AVX512-BF16, AMX), else float32."),
]
BRatio = Annotated[
    float,
    Field(gt=0, description="LoRA+'s ratio: multiple of the learning rate for B, of Lily and of LoRA alike."),
]
RouterRatio = Annotated[
    float, Field(gt=0, description="Multiple of the learning rate for routers and static weights of Lily.")
]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Delimiter = Annotated[str, AfterValidator(values.delimiter)]
Encoding = Annotated[str, AfterValidator(values.encoding)]

MEAN = "mean"  # name of the mean over data.tests
SOURCES = ("path", "package", "hub")
STANDIN = "standin"


class Section(BaseModel):
    """Base of every section of a recipe: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic alone would take true for 1 and 010 for 10."""
        if wrong := values.misread(value, cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(wrong)
        return value


class RecipeBase(Section):
    """Base of recipes of every kind: they know where their keys were written."""

    _locations: KeyLocations = PrivateAttr(default_factory=KeyLocations)

    @property
    def locations(self) -> KeyLocations:
        """File and line of each key; empty for a recipe that was not read from a file."""
        return self._locations

    def written_at(self, locations: KeyLocations) -> Self:
        """The same recipe with these locations."""
        copy = self.model_copy()
        copy._locations = locations
        return copy


class Package(Section):
    """A file or folder inside a Python package, downloaded without dependencies, never imported or installed."""

    # Both are arguments of pip: a name such as `--requirement=...` could make pip build and run arbitrary code.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Distribution name on the package index.")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+_-]*$", description="Exact version.")
    member: str = Field(description="Path inside the wheel of the file or folder to unpack.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the wheel, checked before it is opened.")


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
            choices = f"{', '.join(self.kinds[:-1])} and {self.kinds[-1]}"
            raise ValueError(f"give exactly one of {choices}, got {' and '.join(present) or 'none'}")
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


class Model(Source):
    """The pretrained model to adapt: exactly one of `path`, `package`, `hub` and `standin`."""

    kinds: ClassVar[tuple[str, ...]] = (*SOURCES, STANDIN)

    standin: str | None = Field(
        None,
        description="A small model that is built and briefly trained on first use: mamba-lm, vim-small or "
        "vim-digits; see docs/standins.md.",
    )
    format: Literal["transformers", "gguf", "onnx-dinov2"] = Field(
        "transformers", description="gguf and onnx-dinov2 are converted once, in the cache."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="Data type of the frozen weights; auto keeps the file's."
    )
    quantization: Quantization = Field(
        "none",
        description="Quantization of the frozen linear layers by bitsandbytes: nf4 (4 bits, double quantization) or "
        "int8. Other layers are then float32; merging writes into the weights before quantization.",
    )
    trust_remote_code: bool = Field(False, description="Run code from the model's repository.")
    architecture: dict[str, Any] | None = Field(
        None,
        description="The sizes and the model_type of its config.json, so that `lily plan` downloads nothing and skips "
        "data and tokenizer. With `hub` or `path`; training reads config.json.",
    )

    @model_validator(mode="after")
    def _described(self) -> Model:
        located = self.hub is not None or self.path is not None
        if self.architecture is not None and not (located and isinstance(self.architecture.get("model_type"), str)):
            raise ValueError("architecture goes with hub or path, and needs a model_type such as roberta")
        for name, value in (self.architecture or {}).items():
            if wrong := values.untyped(value):
                raise ValueError(f"architecture.{name}: {wrong}")
        return self


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


class NullSpace(GeneralText):
    """Texts whose main directions no A reads, so that training changes less there; see `lily.null_space`."""

    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of the inputs' squared norm that these directions hold."
    )


class Settle(Section):
    """When a data-dependent routing becomes static, as fractions of training; see `lily.SettleCallback`."""

    start: Fraction = Field(0.6, description="Until here the routing does not change.")
    end: Fraction = Field(0.8, description="From here the routing is static, and training continues.")


class Group(Section):
    """Options for layers of one name; default: those of the section lily."""

    r: PositiveInt | None = None
    num_A: PositiveInt | None = None
    stride_A: PositiveInt | None = None
    num_B: PositiveInt | None = None
    scaling: Positive | None = None
    dropout: Fraction | None = None
    activation: Activation | None = None
    distinct: Distinct | None = None
    gain: Gain | None = None
    own_r: Count | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, without the rank, as `LilyConfig.group_options`."""
        return self.model_dump(exclude_none=True, exclude={"r"})


class Lily(Section):
    """Options of Lily, most with the names of `lily.LilyConfig`. `params` replaces r, num_A and num_B."""

    preset: Literal["paper"] | None = Field(
        None, description="`paper`: the method as published, where nothing else is given; see `LilyConfig.paper`."
    )
    params: str | int | None = Field(None, description="Parameter budget such as 1.2M; sets r, num_A and num_B.")
    r: PositiveInt | None = None
    num_A: PositiveInt | None = None
    stride_A: PositiveInt | None = None
    num_B: PositiveInt | None = None
    scaling: Positive | None = Field(None, description="Default: by the rank; see `lily.functional.default_scaling`.")
    routing: Literal["batch", "sequence", "token", "static", "uniform"] | None = Field(
        None, description="Default: token for causal models, sequence otherwise."
    )
    batch_scope: Literal["local", "global"] = Field(
        "local",
        description="For batch routing on several processes: average over the rows of each process, or over all.",
    )
    dropout: Fraction = 0.0
    activation: Activation = "none"
    slices: dict[str, list[str] | dict[str, list[int]]] | None = Field(
        None,
        description="Parts of a fused projection: `{qkv: [k, v]}`; if the layout is not built in, start and stop of "
        "the outputs (and the period if they repeat): `{qkv: {v: [1536, 2304]}}`.",
    )
    parallel: list[str] | None = Field(None, description="Modules with an adapter in parallel, such as [mlp].")
    groups: dict[str, Group] | None = Field(
        None, description="Options by layer name: `{mlp: {r: 64, activation: relu}}`."
    )
    shared_router: bool = Field(False, description="One router for all layers of a group, instead of one per layer.")
    distinct: Distinct = Field(
        "none", description="A fixed permutation and signs of the rank coordinates of each layer, without parameters."
    )
    distinct_seed: Count = Field(0, description="Which permutations and signs.")
    gain: Gain = Field("none", description="A learned gain on each rank of each layer, and where it starts.")
    own_r: Count = Field(0, description="Rank of an A and B of each layer's own, beside the shared ones.")
    init_weights: bool | Literal["orthonormal", "data"] = Field(
        True,
        description="How A starts: Kaiming-uniform (true), with orthogonal rows, or with the main directions of its "
        "layers' inputs on the first training batches (data). false starts B at random too.",
    )
    null_space: NullSpace | None = Field(None, description="Keep A out of what general text uses, against forgetting.")
    settle: Settle | None = Field(None, description="Make the routing static during training, to merge exactly.")
    learning_rate: Positive | None = Field(None, description="Replaces train.learning_rate.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "paper":
            return values
        from lily.plan.options import PAPER  # imports PEFT

        return {**PAPER, **values}

    @model_validator(mode="after")
    def _budget_or_shape(self) -> Lily:
        if self.params is not None and any(v is not None for v in (self.r, self.num_A, self.stride_A, self.num_B)):
            raise ValueError(
                "params chooses r, num_A and num_B; give either params or those (`r: null` drops an inherited one)"
            )
        return self


class Lora(Section):
    """PEFT's LoRA, also for the methods `rslora` and `dora`."""

    r: PositiveInt | Literal["equal"] = Field(
        "equal", description="Rank, or `equal`: the largest rank with no more parameters than the section lily."
    )
    alpha: Positive | None = Field(
        None, description="Default: 2 * r, so the scale is 2; for rslora, whose scale is alpha / sqrt(r), 16."
    )
    dropout: Fraction = 0.0
    learning_rate: Positive | None = Field(None, description="Replaces train.learning_rate.")


class Peft(Section):
    """Any method of PEFT (`method: peft`): its type, and the options of its configuration class."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: str | None = Field(None, description="PEFT's name of the method, such as VERA, LOHA or IA3.")
    r: PositiveInt | Literal["equal"] | None = Field(
        None, description="Rank, or `equal`: the largest with no more parameters than the section lily. Default: "
        "equal if the method's size grows with its rank, else PEFT's default.",
    )  # fmt: skip
    learning_rate: Positive | None = Field(None, description="Replaces train.learning_rate.")

    @property
    def options(self) -> dict[str, Any]:
        """All other keys, which PEFT's class validates."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _plain_options(self) -> Peft:
        for name, value in self.options.items():
            if wrong := values.untyped(value):
                raise ValueError(f"{name}: {wrong}")
        return self


class Train(Section):
    """The training schedule, run by transformers' Trainer (or TRL's SFTTrainer)."""

    epochs: Positive = 3.0
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps instead.")
    batch_size: PositiveInt = 32
    eval_batch_size: PositiveInt = 64
    gradient_accumulation: PositiveInt = 1
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = Field(None, description="For a new head. Default: learning_rate.")
    B_lr_ratio: BRatio = 1.0
    router_lr_ratio: RouterRatio = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0)] = Field(0.06, description="Below 1: share of steps; else steps.")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    min_learning_rate: Positive | None = Field(
        None, description="Final learning rate of the cosine; a head's is scaled alike."
    )
    max_grad_norm: Positive = 1.0
    evaluate_every: PositiveInt | Literal["epoch"] = Field("epoch", description="Number of steps, or `epoch`.")
    save_every: PositiveInt | Literal["epoch"] | None = Field(
        None, description="Steps, or `epoch`, between checkpoints. Default: evaluate_every."
    )
    early_stopping: PositiveInt | None = Field(None, description="Evaluations without improvement to stop after.")
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    packing: bool = Field(False, description="sft: pack several examples into one row.")
    report_to: list[Literal["tensorboard", "wandb"]] = []


class Pattern(Section):
    """The answer is the first match of a regular expression, or its first group if there are groups."""

    pattern: str = Field(min_length=1, description="Syntax of Python's re, such as true|false.")


class Generation(Section):
    """sft: generation for exact_match and for the samples before and after training."""

    max_new_tokens: PositiveInt = 64
    samples: Annotated[int, Field(ge=0)] = 3
    answer: Literal["whole", "number"] | Pattern = Field(
        "whole",
        description="What exact_match compares in generated text and completion. whole: all text; number: the number "
        "after ####, else the last number (GSM8K); or {pattern: ...}.",
    )


class Recipe(RecipeBase):
    """One experiment: model, data, method, training and evaluation."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    task: Task
    model: Model
    data: Data
    method: MethodName = "lily"
    targets: list[str] | str = Field("all-linear", description="Target modules, in PEFT's conventions.")
    exclude: list[str] | None = Field(None, description="Modules to leave out.")
    target_parameters: list[str] | None = Field(
        None, description="Parameters to adapt as well, such as [experts.gate_up_proj]; `targets: []` for only these."
    )
    lily: Lily = Lily()
    lora: Lora = Lora()
    peft: Peft = Peft()
    train: Train = Train()
    generation: Generation = Generation()
    forgetting: Forgetting | None = Field(None, description="Also measure the loss on general text.")
    metrics: list[Metric] = Field([], description="The first selects the best checkpoint. Default: by task.")
    baselines: list[Baseline] = Field([], description="Baselines to report on the same held-out rows.")
    seed: Seed = 0
    output: str = Field("runs/{name}-{method}-{seed}", description="Output folder.")
