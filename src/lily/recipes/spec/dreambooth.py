"""The keys of a DreamBooth recipe: types, defaults and descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lily.recipes.spec import lily_checks
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
)
from lily.recipes.spec.data import OneSource
from lily.recipes.spec.locations import Key
from lily.recipes.spec.methods import Lily, Lora


class Pipeline(OneSource):
    """The pretrained pipeline to adapt: exactly one of `path`, `hub` and `standin`. Its code is never run."""

    kinds: ClassVar[tuple[str, ...]] = ("path", "hub", "standin")

    path: str | None = Field(None, description="A folder that diffusers' save_pretrained wrote. `~` and $VARIABLES are "
                             "expanded.")  # fmt: skip
    hub: str | None = Field(None, description="Hugging Face Hub id. Only this uses the network.")
    standin: Literal["sdxl", "flow"] | None = Field(
        None, description="Small pipeline, trained on CIFAR-10 on first use."
    )
    revision: str | None = Field(None, description="Branch, tag or commit; with `hub` only.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")
    architecture: Literal["sdxl"] | None = Field(None, description="Lets `lily plan` read none of its files.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Data type of the frozen weights; the adapter is float32."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Maximum tokens for T5. Default: the pipeline's (256 in SD3, 512 in FLUX)."
    )


class Prior(Section):
    """Prior preservation: images of the class, so that the model does not forget it."""

    prompt: str = Field(min_length=1, description="Prompt of the class without the subject: `a photo of a toy`.")
    images: str | None = Field(None, description="Folder of such images. Default: the pipeline generates them first.")
    count: PositiveInt = Field(100, description="Number of images to use or to generate.")
    weight: Positive = Field(1.0, description="Weight of their loss.")


class Subject(Section):
    """The subject that the model learns to generate."""

    images: str = Field(description="Folder of a few images of the subject. `~` and $VARIABLES are expanded.")
    prompt: str = Field(min_length=1, description="Prompt of these images: `a photo of sks toy`.")
    resolution: PositiveInt = Field(1024, description="Pixels; images are resized to it and center-cropped.")
    prior: Prior | None = None


class Steps(Section):
    """The training schedule."""

    max_steps: PositiveInt = 500
    batch_size: PositiveInt = 1
    gradient_accumulation: PositiveInt = 4
    learning_rate: Positive = 1e-4
    B_lr_ratio: BRatio = 1.0
    router_lr_ratio: RouterRatio = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="Number of warm-up steps.")
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    max_grad_norm: Positive = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    min_snr_gamma: Positive | None = Field(None, description="Noise prediction: loss weight min(SNR, gamma) / SNR.")
    weighting: Literal["logit_normal", "none", "mode", "cosmap", "sigma_sqrt"] = Field(
        "logit_normal", description="Flow matching: sampling of timesteps and weights of losses, with diffusers' names."
    )
    logit_mean: float = Field(0.0, description="Parameter of logit_normal.")
    logit_std: Positive = Field(1.0, description="Parameter of logit_normal.")


class Validation(Section):
    """Validation losses and sample images before, during and after training."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field([], description="Default: the subject's prompt.")
    images: PositiveInt = Field(4, description="Images per prompt, from the same noise every time.")
    every: PositiveInt = Field(100, description="Steps between validations, and between checkpoints.")
    times: PositiveInt = Field(16, description="Noise levels per image at which the validation loss is computed.")
    steps: PositiveInt = Field(30, description="Sampling steps.")
    guidance: Annotated[float, Field(ge=0)] = 5.0
    seed: Seed = 0


class DreamBooth(RecipeBase):
    """One subject, one pipeline, one adapter."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    task: Literal["dreambooth"]
    model: Pipeline
    subject: Subject
    method: Literal["lily", "lora"] = "lily"
    targets: list[str] | str = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], description="Target modules, in PEFT's conventions."
    )
    target_parameters: list[str] | None = Field(None, description="Parameters to adapt as well.")
    exclude: list[str] | None = Field(None, description="Modules to leave out.")
    lily: Lily = Lily()
    lora: Lora = Lora()
    train: Steps = Steps()
    validation: Validation = Validation()
    chosen_by: str = CHOSEN_BY
    baselines: list[Literal["lora"]] = Field([], description="Baselines to train with the same schedule.")
    seed: Seed = 0
    output: str = Field("runs/{name}-{method}-{seed}", description="Output folder.")


def problems(recipe: DreamBooth) -> Iterator[tuple[Key, str]]:
    """Every invalid combination: (path of the key, what is wrong and how to fix it)."""
    yield from lily_checks.problems(recipe.lily, recipe.targets or recipe.target_parameters)
    if recipe.lily.settle is not None:
        yield (
            ("lily", "settle"),
            "is not supported for dreambooth; train with routing: static, or collapse the adapter afterwards",
        )
    if recipe.lily.init_weights == "data":
        yield ("lily", "init_weights"), "data is not supported for dreambooth; use true or orthonormal"
    if recipe.lily.null_space is not None:
        yield ("lily", "null_space"), "is not supported for dreambooth; call lily.null_space in Python, or remove it"
    if isinstance(recipe.targets, list) and not recipe.targets:
        yield ("targets",), "is empty; name modules such as [to_q, to_k, to_v, to_out.0]"
    if recipe.train.warmup >= recipe.train.max_steps:
        yield (
            ("train", "warmup"),
            f"{recipe.train.warmup} warm-up steps of {recipe.train.max_steps} leave none to train; lower it",
        )
    yield from lily_checks.output_problems(recipe.output)
