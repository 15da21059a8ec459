"""Checks across a recipe's keys, as pure functions of the recipe."""

from __future__ import annotations

import string
from collections.abc import Iterator

from lily.errors import LilyError
from lily.recipes.offline import standins
from lily.recipes.scoring import answers
from lily.recipes.spec import lily_checks
from lily.recipes.spec.base import CLASSIFYING
from lily.recipes.spec.data import File
from lily.recipes.spec.schema import MEAN, STANDIN, Pattern, Recipe

Problem = tuple[tuple[str, ...], str]

CLASSIFICATION = ("accuracy", "f1", "matthews", "loss")
MULTIPLE_CHOICE = ("accuracy", "accuracy_norm")
REGRESSION = ("pearson", "spearman", "mse", "loss")
SFT = ("loss", "perplexity", "exact_match", *MULTIPLE_CHOICE)
METRICS = {
    "text-classification": CLASSIFICATION,
    "image-classification": CLASSIFICATION,
    "text-regression": REGRESSION,
    "sft": SFT,
}


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every invalid combination: (path of the key, what is wrong and how to fix it)."""
    yield from _columns(recipe)
    yield from _metrics(recipe)
    yield from _answers(recipe)
    yield from _split(recipe)
    yield from _hub(recipe)
    yield from lily_checks.problems(recipe.lily, recipe.targets or recipe.target_parameters)
    yield from _method(recipe)
    yield from _schedule(recipe)
    yield from _output(recipe)
    yield from _forgetting(recipe)
    yield from _null_space(recipe)
    for key, file in recipe.data.files.items():
        yield from _file(("data", *key), file)


def _columns(recipe: Recipe) -> Iterator[Problem]:
    c, at = recipe.data.columns, ("data", "columns")
    named: dict[str, str] = {}
    for role, column in c.model_dump(exclude_none=True).items():
        if (first := named.setdefault(column, role)) != role:
            yield (*at, role), f"{column!r} is {first} too; name the column that holds the {role}"
    if recipe.task == "sft":
        if c.messages is None and (c.prompt is None or c.completion is None):
            yield at, "sft needs prompt and completion, or messages"
        if c.messages is not None and (c.prompt is not None or c.completion is not None):
            yield at, "give either messages, or prompt and completion"
        if c.input is not None and c.prompt is None:
            yield (*at, "input"), "is appended to the prompt, so it goes with prompt and completion; remove it"
        for name in ("text", "text_pair", "image", "label"):
            if getattr(c, name) is not None:
                yield (*at, name), "is for classification and regression; sft has prompt, completion and messages"
        return
    for name in ("prompt", "input", "completion", "messages", "tools", "system"):
        if getattr(c, name) is not None:
            yield (*at, name), f"is for sft; {recipe.task} has {_inputs(recipe)} and label"
    if recipe.task == "image-classification":
        for name in ("text", "text_pair"):
            if getattr(c, name) is not None:
                yield (*at, name), "is for texts; image-classification has image and label"
        return
    for name in ("text", "label"):
        if getattr(c, name) is None:
            yield at, f"{recipe.task} needs {name}: the column that holds it"
    if c.image is not None:
        yield (*at, "image"), f"is for image-classification; {recipe.task} has text, text_pair and label"


def _inputs(recipe: Recipe) -> str:
    return "image" if recipe.task == "image-classification" else "text, text_pair"


def _metrics(recipe: Recipe) -> Iterator[Problem]:
    allowed = METRICS[recipe.task]
    for metric in recipe.metrics:
        if metric not in allowed:
            yield ("metrics",), f"{metric} is not a metric of {recipe.task}; choose from {', '.join(allowed)}"


def _answers(recipe: Recipe) -> Iterator[Problem]:
    template, answer = recipe.data.template, recipe.generation.answer
    if template is not None:
        at = ("data", "template")
        if recipe.task != "sft" or recipe.data.columns.messages is not None:
            yield at, "is for sft with prompt and completion; remove it"
        elif recipe.data.chat:
            yield at, "replaces the tokenizer's chat template; set data.chat to false"
        if template.count("{prompt}") != 1:
            yield at, f"must contain {{prompt}} once, not {template.count('{prompt}')} times"
    if recipe.data.choices is not None and (recipe.task != "sft" or recipe.data.columns.messages is not None):
        yield ("data", "choices"), "are for sft with prompt and completion; remove them"
    if recipe.task == "sft" and recipe.data.choices is None:
        for metric in recipe.metrics:
            if metric in MULTIPLE_CHOICE:
                yield ("metrics",), f"{metric} of sft needs data.choices: the texts to choose from"
    if answer != "whole" and recipe.task != "sft":
        yield ("generation", "answer"), "is for sft only"
    if isinstance(answer, Pattern):
        wrong = answers.problem_of(answer)
        if wrong is not None:
            yield ("generation", "answer", "pattern"), wrong


def _split(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    carved = (0.0 if data.validation else data.split.validation) + (0.0 if data.test else data.split.test)
    if carved >= 1:
        yield ("data", "split"), f"validation and test take {carved:.2f} of the rows; leave some for training"
    if MEAN in (data.tests or ()):
        yield ("data", "tests", MEAN), "is the name of the mean over the sets; choose another name"
    if data.classes is not None and recipe.task not in CLASSIFYING:
        yield ("data", "classes"), f"is for classification; {recipe.task} has none; remove it"
    if data.classes is not None and len(set(data.classes)) < 2:
        yield ("data", "classes"), "names fewer than two classes; name at least two"
    if data.validation is None and data.split.validation == 0:
        yield ("data", "split"), "no validation rows: give data.validation, or a share in data.split.validation"


def _hub(recipe: Recipe) -> Iterator[Problem]:
    for key, file in recipe.data.files.items():
        if key[0] not in ("train", "mix") and file.hub is not None and file.split is None:
            yield ("data", *key), f"needs split: which split of {file.hub} to use (the default is train)"
    if recipe.model.kind in ("hub", STANDIN) and recipe.model.format != "transformers":
        yield ("model", "format"), f"{recipe.model.format} goes with path or package; remove it"
    if recipe.model.standin is not None:
        try:
            standins.check_name(recipe.model.standin)
        except LilyError as error:
            yield ("model", STANDIN), str(error)


def _method(recipe: Recipe) -> Iterator[Problem]:
    settle = recipe.lily.settle
    if settle is not None and settle.start >= settle.end:
        yield ("lily", "settle"), f"start {settle.start:g} must come before end {settle.end:g}"
    groups = (recipe.lily.groups or {}).values()
    one_B = recipe.lily.num_B == 1 and not any((group.num_B or 1) > 1 for group in groups)
    if settle is not None and (recipe.lily.routing in ("static", "uniform") or one_B):
        what = "num_B=1 has no router" if one_B else f"routing {recipe.lily.routing} is static"
        yield ("lily", "settle"), f"{what}, so there is nothing to settle; remove one of them"
    activations = [recipe.lily.activation, *(group.activation for group in groups)]
    if settle is not None and set(activations) - {"none", None}:
        yield (
            ("lily", "settle"),
            "an adapter with an activation is not linear, so it cannot be merged; remove one of them",
        )
    if settle is not None and recipe.lily.parallel:
        yield ("lily", "settle"), "an adapter parallel to a module (lily.parallel) is never merged; remove one of them"
    if settle is not None and recipe.lily.shared_router:
        yield ("lily", "settle"), "gives each layer separate weights; remove it, or shared_router"
    if recipe.method == "peft" and recipe.peft.peft_type is None:
        yield ("peft",), "method: peft needs peft_type: the name of a PEFT method, such as VERA, LOHA or IA3"
    if recipe.task == "sft":
        for baseline in recipe.baselines:
            if baseline != "lora":
                yield ("baselines",), f"{baseline} is for classification and regression; sft has lora"
    if recipe.task == "image-classification" and "tfidf" in recipe.baselines:
        yield ("baselines",), "tfidf is for texts; images have majority, frozen and lora"
    if recipe.train.packing and recipe.task != "sft":
        yield ("train", "packing"), "is for sft only"
    if recipe.train.packing and recipe.data.columns.messages is not None:
        yield ("train", "packing"), "does not support messages; use prompt and completion"
    if recipe.train.head_learning_rate is not None and recipe.task == "sft":
        yield ("train", "head_learning_rate"), "sft has no new head; use learning_rate"


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    least, at = recipe.train.min_learning_rate, ("train", "min_learning_rate")
    if least is None:
        return
    if recipe.train.schedule != "cosine":
        yield at, f"is the end of a cosine, but schedule is {recipe.train.schedule}; remove it, or set schedule: cosine"
    for section in ("train", "lily", "lora"):
        start = getattr(recipe, section).learning_rate
        if start is not None and least >= start:
            yield at, f"{least:g} is not below {section}.learning_rate, {start:g}, where the cosine starts; lower it"


def _forgetting(recipe: Recipe) -> Iterator[Problem]:
    if recipe.forgetting is None:
        return
    if recipe.task != "sft":
        yield (
            ("forgetting",),
            f"needs the loss of a language model, which {recipe.task} does not have; remove it",
        )
    yield from _file(("forgetting", "file"), recipe.forgetting.file)


def _null_space(recipe: Recipe) -> Iterator[Problem]:
    if recipe.lily.null_space is None:
        return
    if recipe.task == "image-classification":
        yield ("lily", "null_space"), "needs a model of texts; for images call lily.null_space in Python, or remove it"
    yield from _file(("lily", "null_space", "file"), recipe.lily.null_space.file)


def _output(recipe: Recipe) -> Iterator[Problem]:
    problems = list(lily_checks.output_problems(recipe.output))
    yield from problems
    formatted = not problems and any(spec or how for _, _, spec, how in string.Formatter().parse(recipe.output))
    if formatted or not recipe.output.isprintable():
        yield ("output",), "is not a plain path with {name}, {method} and {seed}"


def _file(at: tuple[str, ...], file: File) -> Iterator[Problem]:
    for name in ("split", "config"):
        if getattr(file, name) is not None and file.hub is None:
            yield (*at, name), "goes with hub; remove it, or name a hub id"
    if file.header is not None and file.format in ("json", "jsonl", "parquet"):
        yield (*at, "header"), f"is for csv and tsv; {file.format} contains its column names; remove it"
    for name in ("delimiter", "encoding"):
        if getattr(file, name) is not None and (file.hub is not None or file.format == "parquet"):
            yield (*at, name), "is for files of text; remove it"
