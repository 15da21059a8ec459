"""What a DreamBooth recipe is: every key, its type, its default and its meaning."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from lily.recipes.spec import lily_checks
from lily.recipes.spec.places import Key, Places
from lily.recipes.spec.schema import Lily, Lora, PositiveInt, Section

Positive = Annotated[float, Field(gt=0)]
PLACES = ("path", "hub", "standin")
PLACEHOLDERS = {"name", "method", "seed"}


class Pipeline(Section):
    """The pretrained pipeline to adapt: exactly one of `path`, `hub` and `standin`. No code of its own is ever run."""

    path: str | None = Field(None, description="A folder that diffusers' save_pretrained wrote. `~` and $VARIABLES are "
                             "expanded.")  # fmt: skip
    hub: str | None = Field(None, description="Hugging Face Hub id. The only thing in a recipe that uses the network.")
    standin: Literal["sdxl", "flow"] | None = Field(
        None, description="A small pipeline of this shape, built and trained on CIFAR-10 the first time it is used."
    )
    revision: str | None = Field(None, description="Branch, tag or commit; with `hub` only.")
    variant: str | None = Field(None, description="Which files to read where there are several, such as fp16.")
    architecture: Literal["sdxl"] | None = Field(
        None, description="What the pipeline is known to be, so that `lily plan` reads nothing from it."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Data type of the frozen weights; the adapter's are float32."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Tokens for a T5 text encoder. Default: the pipeline's own (256 in SD3, 512 in FLUX)."
    )

    @property
    def kind(self) -> str:
        """Which of the three keys is given."""
        return next(name for name in PLACES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _exactly_one(self) -> Pipeline:
        given = [name for name in PLACES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub and standin, got {' and '.join(given) or 'none'}")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub; remove it, or name a hub id")
        return self


class Prior(Section):
    """Prior preservation: images of the class, so that what the model knows of it is not overwritten."""

    prompt: str = Field(min_length=1, description="What the images show, without the subject: `a photo of a toy`.")
    images: str | None = Field(None, description="Folder of such images. Default: the pipeline draws them first.")
    count: PositiveInt = Field(100, description="How many to use, and to draw.")
    weight: Positive = Field(1.0, description="Of their loss.")


class Subject(Section):
    """What the model is to learn to draw."""

    images: str = Field(description="Folder of a few images of it. `~` and $VARIABLES are expanded.")
    prompt: str = Field(min_length=1, description="What they show: `a photo of sks toy`.")
    resolution: PositiveInt = Field(1024, description="Pixels; images are scaled to it and cropped in the middle.")
    prior: Prior | None = None


class Steps(Section):
    """The training schedule."""

    max_steps: PositiveInt = 500
    batch_size: PositiveInt = 1
    gradient_accumulation: PositiveInt = 4
    learning_rate: Positive = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="Steps.")
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    max_grad_norm: Positive = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 autocast where the hardware multiplies it (CUDA, AVX512-BF16, AMX), else float32.",
    )
    gradient_checkpointing: bool = False
    min_snr_gamma: Positive | None = Field(None, description="Noise prediction: weigh by min(SNR, gamma) / SNR.")
    weighting: Literal["logit_normal", "none", "mode", "cosmap", "sigma_sqrt"] = Field(
        "logit_normal", description="Flow matching: how timesteps are drawn and losses weighed, in diffusers' names."
    )
    logit_mean: float = Field(0.0, description="For logit_normal.")
    logit_std: Positive = Field(1.0, description="For logit_normal.")


class Validation(Section):
    """What is measured and drawn before, during and after training."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field([], description="Default: the subject's own prompt.")
    images: PositiveInt = Field(4, description="Drawn for each prompt, from the same noise every time.")
    every: PositiveInt = Field(100, description="Steps between two validations; also between two checkpoints.")
    times: PositiveInt = Field(16, description="Noise levels at which the fixed loss is taken of each image.")
    steps: PositiveInt = Field(30, description="Of the sampler.")
    guidance: Annotated[float, Field(ge=0)] = 5.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class DreamBooth(Section):
    """One subject, one pipeline, one adapter."""

    _places: Places = PrivateAttr(default_factory=Places)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    task: Literal["dreambooth"]
    model: Pipeline
    subject: Subject
    method: Literal["lily", "lora"] = "lily"
    targets: list[str] | str = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], description="Target modules, in PEFT's conventions."
    )
    target_parameters: list[str] | None = Field(None, description="Parameters to adapt too.")
    exclude: list[str] | None = Field(None, description="Modules to leave out.")
    lily: Lily = Lily()
    lora: Lora = Lora()
    train: Steps = Steps()
    validation: Validation = Validation()
    baselines: list[Literal["lora"]] = Field([], description="Also trained, on the same steps.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output: str = Field("runs/{name}-{method}-{seed}", description="Folder that is written.")

    @property
    def places(self) -> Places:
        """Where its keys were written; empty for a recipe that was not read from a file."""
        return self._places

    def written_at(self, places: Places) -> DreamBooth:
        """The same recipe, knowing where its keys were written."""
        copy = self.model_copy()
        copy._places = places
        return copy


def problems(recipe: DreamBooth) -> Iterator[tuple[Key, str]]:
    """Every combination that cannot work: (path of the key, what is wrong and how to fix it)."""
    yield from lily_checks.problems(recipe)
    if recipe.lily.settle is not None:
        yield ("lily", "settle"), "is for text; train with routing: static, or collapse the adapter afterwards"
    if isinstance(recipe.targets, list) and not recipe.targets:
        yield ("targets",), "is empty; name modules such as [to_q, to_k, to_v, to_out.0]"
    if recipe.train.warmup >= recipe.train.max_steps:
        yield ("train", "warmup"), f"{recipe.train.warmup} steps of {recipe.train.max_steps}; nothing is left to train"
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(recipe.output) if name is not None}
    except ValueError as error:
        yield ("output",), f"is not a name with placeholders ({error})"
        return
    if unknown := sorted(named - PLACEHOLDERS):
        yield ("output",), f"unknown placeholder {unknown[0]!r}; known: {{name}}, {{method}} and {{seed}}"
