"""The keys of a recipe: types, defaults and descriptions.

A recipe names a model, data, targets, a method and a training schedule. The classes of this folder are the single
source of the YAML keys, of the JSON Schema that `lily schema` prints, and of the checks of single keys. Checks across
keys are in `lily.recipes.checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lily.recipes.spec import values
from lily.recipes.spec.base import (
    CHOSEN_BY,
    BRatio,
    Positive,
    PositiveInt,
    Precision,
    RecipeBase,
    RouterRatio,
    Section,
    Seed,
    Task,
)
from lily.recipes.spec.data import SOURCES, Data, Forgetting, Source
from lily.recipes.spec.methods import Lily, Lora, MethodName, Peft

Baseline = Literal["majority", "tfidf", "frozen", "lora"]
Quantization = Literal["none", "nf4", "int8"]
Metric = Literal[
    "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss", "perplexity", "exact_match", "accuracy_norm"
]
MEAN = "mean"  # name of the mean over data.tests
STANDIN = "standin"


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
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Where else losses and metrics go: tensorboard (the run's folder tensorboard), wandb, trackio."
    )


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
    license: str | None = Field(
        None, description="The adapter's license on its model card: apache-2.0. Default: the base model's, if known."
    )
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
    chosen_by: str = CHOSEN_BY
    baselines: list[Baseline] = Field([], description="Baselines to report on the same held-out rows.")
    seed: Seed = 0
    output: str = Field("runs/{name}-{method}-{seed}", description="Output folder.")
