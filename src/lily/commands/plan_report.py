"""What `lily plan` reports: a plan and its costs as plain values, made without reading a weight."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.budget import Choice, Estimate, choose, equal_lora_rank, estimate, lora_compute, lora_parameters, parse_count
from lily.config import LilyConfig
from lily.errors import LilyError
from lily.kinds import ModuleSpec
from lily.plan import SAVED_HEADS, Group, SharingPlan, build_plan, is_causal
from lily.targets import select_targets, whole_layers

if TYPE_CHECKING:
    from torch import nn

    from lily.recipes.dreambooth.schema import DreamBooth
    from lily.recipes.schema import Model, Recipe

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
RECIPE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Wish:
    """What the user asks of a plan; None leaves the choice to `lily.budget.choose`."""

    targets: list[str] | str = "all-linear"
    exclude: list[str] | str | None = None
    r: int | None = None
    num_A: int | None = None
    stride_A: int | None = None
    num_B: int | None = None
    parameters: int | None = None
    match_lora: int | None = None
    routing: str | None = None
    task: str | None = None
    batch: int = 8
    tokens: int = 512
    target_parameters: list[str] | None = None
    heads: list[str] | None = None


@dataclass(frozen=True)
class GroupReport:
    """One row of the sharing table. `blocks` are the names that share an A, `sharing` their layer numbers.

    `kind` and `shape`, of the base weights, are `lily.plan.Group`'s.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    layers: int
    sharing: tuple[str, ...]
    r: int
    num_B: int
    parameters: int
    blocks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LoraReport:
    """What LoRA would get on the same layers: the rank to be matched, else the largest with no more parameters."""

    r: int
    parameters: int
    share_of_compute: float
    checkpoint_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """What `lily plan` says: a value with numbers only, rendered by `render_plan` or as JSON by `to_dict`.

    Attributes:
        model: as the user named it.
        dtype: of the frozen weights.
        model_parameters: of the frozen model.
        routing: the adapter's routing.
        options: `LilyConfig` arguments that give this plan (r, num_A or stride_A, num_B).
        groups: the sharing.
        parameters: trainable parameters, by part (A, B, router) and in total.
        share_of_model: trainable over frozen parameters.
        batch: samples of a step, for the estimates.
        tokens: tokens of a sample, for the estimates.
        costs: multiply-adds, file size, training memory.
        lora: LoRA with the same budget.
        rank_advantage: Lily's rank over LoRA's.
        reason: why this shape.
    """

    model: str
    dtype: str
    model_parameters: int
    routing: str
    options: dict[str, int]
    groups: tuple[GroupReport, ...]
    parameters: dict[str, int]
    share_of_model: float
    batch: int
    tokens: int
    costs: Estimate
    lora: LoraReport
    rank_advantage: float
    reason: tuple[str, ...]

    @property
    def layers(self) -> int:
        """How many layers are adapted."""
        return sum(group.layers for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class RecipeReport:
    """The dry run of a recipe: the recipe as resolved, its plan, and its first example.

    Attributes:
        name: of the recipe.
        method: the recipe's; the plan is Lily's in any case.
        recipe: the resolved recipe as YAML.
        plan: for the recipe's model.
        preview: (text, trained) of the first training example: the loss counts where trained is True; empty where
            there is no text.
    """

    name: str
    method: str
    recipe: str
    plan: PlanReport
    preview: tuple[tuple[str, bool], ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        import yaml

        return {
            "name": self.name,
            "recipe": yaml.safe_load(self.recipe),
            "plan": self.plan.to_dict(),
            "preview": [{"text": text, "trained": trained} for text, trained in self.preview],
        }


# --- from a model to a report ---------------------------------------------------------------------------------------


def plan_for(
    model: nn.Module, wish: Wish, *, name: str, dtype: str = "float32", base_bytes: int | None = None
) -> PlanReport:
    """The report for a model, which may be on the meta device.

    Args:
        model: the base model.
        wish: what the user asks.
        name: how to call the model in the report.
        dtype: of the frozen weights, for the memory estimate.
        base_bytes: what the frozen weights take, where that does not follow from `dtype`.

    Raises:
        LilyError: if the targets match nothing, the budget is too small, or a value cannot work.
    """
    asked = LilyConfig(
        target_modules=wish.targets,
        target_parameters=wish.target_parameters,
        exclude_modules=wish.exclude,
        modules_to_save=SAVED_HEADS.get(wish.task or "") or wish.heads,
        routing=wish.routing,
        task_type=wish.task,
    )
    routing = asked.default_routing(True) if asked.routing_is_default and is_causal(model) else str(asked.routing)
    modules = select_targets(model, asked)  # replaces all-linear by the names it stands for
    choice = choose(
        modules,
        parameters=wish.parameters,
        match_lora=wish.match_lora,
        r=wish.r,
        num_A=wish.num_A,
        stride_A=wish.stride_A,
        num_B=wish.num_B,
        routing=routing,
        targets=asked.target_modules,
    )
    found: dict[str, Any] = {
        "target_modules": asked.target_modules,
        "target_parameters": asked.target_parameters,
    }
    plan = build_plan(modules, LilyConfig(routing=routing, **found, **choice.options))
    return _report(model, modules, plan, choice, wish, name=name, dtype=dtype, base_bytes=base_bytes)


def _report(
    model: nn.Module,
    modules: Sequence[ModuleSpec],
    plan: SharingPlan,
    choice: Choice,
    wish: Wish,
    *,
    name: str,
    dtype: str,
    base_bytes: int | None,
) -> PlanReport:
    size = sum(p.numel() for p in model.parameters())
    whole = whole_layers(model, modules, wish.exclude)
    costs = estimate(
        plan,
        modules,
        batch=wish.batch,
        tokens=wish.tokens,
        base_parameters=size,
        linear=list(_linear_layers(model)),
        weight_bytes=WEIGHT_BYTES.get(dtype, 4),
        base_bytes=base_bytes,
        whole=whole,
    )
    total = plan.parameters
    # Lily fills a budget up to the grain of its rank; LoRA of the rank to be matched must not lose it to that grain.
    budget = total.total if wish.match_lora is None else lora_parameters(whole, wish.match_lora)
    lora = _lora(whole, budget, wish.batch * wish.tokens)
    return PlanReport(
        model=name,
        dtype=dtype,
        model_parameters=size,
        routing=plan.routing,
        options=choice.options,
        groups=tuple(_group(g, plan.routers_of(g)) for g in plan.groups),
        parameters={"A": total.A, "B": total.B, "router": total.router, "total": total.total},
        share_of_model=total.total / size,
        batch=wish.batch,
        tokens=wish.tokens,
        costs=costs,
        lora=lora,
        rank_advantage=choice.r / lora.r,
        reason=choice.reason,
    )


def _group(group: Group, routers: int) -> GroupReport:
    numbers = iter(depth_numbers(group.members))
    sharing = tuple(compress([next(numbers) for _ in block]) for block in group.blocks)
    shared = len(group.blocks) * group.r * group.in_features + group.num_B * group.r * group.out_features
    return GroupReport(
        group.name,
        group.kind,
        group.shape,
        group.in_features,
        group.out_features,
        len(group.members),
        sharing,
        group.r,
        group.num_B,
        shared + routers,
        group.blocks,
    )


def _lora(modules: Sequence[ModuleSpec], budget: int, tokens: int) -> LoraReport:
    r = equal_lora_rank(modules, budget)
    size = lora_parameters(modules, r)
    return LoraReport(r, size, lora_compute(modules, r, tokens), 4 * size)


def _linear_layers(model: nn.Module) -> Iterator[ModuleSpec]:
    """Every nn.Linear and Conv1D (GPT-2's, which keeps its sizes as nx and nf) of the model, adapted or not."""
    for name, module in model.named_modules():
        if isinstance(out := getattr(module, "out_features", getattr(module, "nf", None)), int):
            yield ModuleSpec(name, int(getattr(module, "in_features", getattr(module, "nx", 0))), out)


def compress(numbers: Sequence[int]) -> str:
    """Layer numbers in runs: `[0, 1, 2, 5]` as `0-2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def depth_numbers(names: Sequence[str]) -> list[int]:
    """The layer number in each name (`model.layers.7.mlp.up_proj` is 7), or positions where that names no one layer."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))


# --- from a name to a model on the meta device ----------------------------------------------------------------------


def model_from(target: str, task: str | None = None) -> tuple[nn.Module, str]:
    """A model without weights, and the data type of its weights, from a folder, a config.json or a hub id.

    Args:
        target: only a hub id uses the network, and of that only config.json is read.
        task: a key of `TASKS`; default: the architecture that the configuration names.

    Raises:
        LilyError: if there is no such model, or transformers is missing or does not know it.
    """
    if task is not None and task not in TASKS:
        raise LilyError(f"task {task!r} is not known; choose one of {', '.join(TASKS)}")
    config = _read_config(target)
    return _without_weights(config, target, task), dtype_of(config)


def dtype_of(config: Any) -> str:
    """The data type that a model configuration states, float32 if it states none."""
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _read_config(target: str) -> Any:
    path = Path(target).expanduser()
    if (path / "adapter_config.json").is_file():
        raise LilyError(f"{target} is an adapter, not a model; `lily inspect {target}` shows it")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LilyError(f"{target} has no config.json; name a model folder as save_pretrained writes it")
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", target):
        raise LilyError(f"{target} does not exist; name a recipe, a model folder, a config.json or a hub id")
    try:
        from transformers import AutoConfig
    except ImportError:
        raise LilyError("lily plan needs transformers; pip install 'lily-peft[demo]'") from None
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else target, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        if path.exists():
            raise LilyError(f"cannot read the model configuration of {target}: {why}") from None
        raise LilyError(_nowhere(target, why)) from None


def _nowhere(target: str, why: str) -> str:
    names = _shipped()
    near = difflib.get_close_matches(target, names, n=1)
    hint = f"did you mean the recipe {near[0]}? " if near else ""
    return (
        f"{target} is no shipped recipe, file or folder, and cannot be read from the Hugging Face Hub ({why}); {hint}"
        "give a recipe, a model folder or a config.json, or go online for a hub id"
    )


def _without_weights(config: Any, target: str, task: str | None) -> nn.Module:
    import torch
    import transformers

    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    named = getattr(transformers, architecture, None) if architecture and task is None else None
    try:
        with torch.device("meta"):
            if named is not None:
                model: nn.Module = named(config)
            else:
                model = getattr(transformers, TASKS[task or "FEATURE_EXTRACTION"]).from_config(config)
    except Exception as error:  # a model's constructor may raise anything; none of it is ours to fix
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LilyError(f"cannot build {target} as {task or architecture or 'AutoModel'}: {why}") from error
    return model


# --- the dry run of a recipe ----------------------------------------------------------------------------------------


def is_recipe(target: str) -> bool:
    """Whether `target` names a recipe: a YAML file by its ending, or one that ships; `:` and a variant may follow."""
    known, head = _shipped(), target.rpartition(":")[0]
    if any(name.lower().endswith(RECIPE_ENDINGS) for name in (target, head)):
        return True
    return not Path(target).expanduser().exists() and (target in known or head in known)


def _shipped() -> list[str]:
    from lily.recipes import loader

    return list(loader.shipped())


def recipe_report(
    target: str, overrides: Sequence[str], *, batch: int | None = None, tokens: int | None = None
) -> RecipeReport:
    """The dry run of a recipe: all that `lily train` checks before it reads weights, and nothing that it writes.

    Of a recipe that describes its hub's model itself (`model.architecture`) the plan alone: nothing is downloaded.

    Args:
        target: path of a YAML file, or name of a recipe that ships.
        overrides: `key=value` each.
        batch: for the estimates; default: the recipe's.
        tokens: for the estimates; default: the recipe's.

    Raises:
        LilyError: for whatever is wrong with the recipe, its data or its model.
    """
    from lily.recipes import loader, methods, models, preflight, quantization, tasks
    from lily.recipes.places import located
    from lily.recipes.train import output_folder

    recipe = loader.load_any(target, list(overrides))
    preflight.check_output(recipe, output_folder(recipe))
    if recipe.task == "dreambooth":
        return _drawing_report(recipe, batch, tokens)
    segments: tuple[tuple[str, bool], ...] = ()
    if recipe.model.architecture is not None:
        with located(recipe, "model", "architecture"):
            model = models.described_model(recipe.model, recipe.task)
    else:
        prepared = preflight.prepare(recipe)
        model = prepared.meta
        segments = tuple(tasks.preview(recipe, prepared.processor, prepared.splits.train[0]).segments)
    wish = wish_of(recipe, model, batch=batch, tokens=tokens)
    dtype = dtype_of(model.config) if recipe.model.dtype == "auto" else recipe.model.dtype
    quantised = recipe.model.quantization
    size = None if quantised == "none" else quantization.frozen_bytes(model, recipe.task, quantised)
    decided = methods.decide(recipe, model)
    plan = _report(
        model,
        decided.modules,
        decided.plan,
        decided.choice,
        wish,
        name=_said(recipe.model),
        dtype=dtype if size is None else quantised,
        base_bytes=size,
    )
    return RecipeReport(recipe.name, recipe.method, loader.dump_recipe(recipe), plan, segments)


def _drawing_report(recipe: DreamBooth, batch: int | None, tokens: int | None) -> RecipeReport:
    """The dry run of subject-driven generation: its images are not looked at, and there is no text to preview."""
    from lily.recipes import loader, methods
    from lily.recipes.dreambooth.run import planned

    family, model, _ = planned(recipe)
    usual = (recipe.subject.resolution // 16) ** 2  # where attention begins: an eighth by the autoencoder, then half
    wish = wish_of(recipe, model, batch=batch, tokens=tokens or usual)
    name = f"{family.component} of {recipe.model.hub or recipe.model.path or recipe.model.standin}"
    found = methods.decide(recipe, model)
    dtype = recipe.model.dtype
    plan = _report(model, found.modules, found.plan, found.choice, wish, name=name, dtype=dtype, base_bytes=None)
    return RecipeReport(recipe.name, recipe.method, loader.dump_recipe(recipe), plan, ())


def _said(model: Model) -> str:
    """A model as the recipe says it, short enough for a title."""
    if model.package is not None:
        return f"{model.package.member} of {model.package.name} {model.package.version}"
    return model.hub or model.path or f"the stand-in {model.standin}"


def _tokens(recipe: Recipe | DreamBooth, model: nn.Module) -> int:
    """Tokens of a sample; of an image its patches, and one that stands for the whole."""
    from lily.recipes.models import image_size

    if recipe.task == "dreambooth":
        return 512
    if recipe.task != "image-classification":
        return recipe.data.max_length
    patch = getattr(model.config, "patch_size", 16)
    size = recipe.data.image.size or image_size(model.config)
    return (size // (patch if isinstance(patch, int) else patch[0])) ** 2 + 1


def wish_of(
    recipe: Recipe | DreamBooth, model: nn.Module, *, batch: int | None = None, tokens: int | None = None
) -> Wish:
    """What a recipe asks of a plan."""
    from lily.recipes.methods import saved_heads, task_type_of

    lily = recipe.lily
    return Wish(
        targets=recipe.targets,
        target_parameters=recipe.target_parameters,
        exclude=recipe.exclude,
        r=lily.r,
        num_A=lily.num_A,
        stride_A=lily.stride_A,
        num_B=lily.num_B,
        parameters=None if lily.params is None else parse_count(lily.params),
        routing=lily.routing,
        task=task_type_of(recipe),
        heads=saved_heads(recipe, model),
        batch=batch or recipe.train.batch_size,
        tokens=tokens or _tokens(recipe, model),
    )


# --- rendering ------------------------------------------------------------------------------------------------------
