"""Pretrained models of recipes and their tokenizers. Weights are read from safetensors only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lily.checkpoint.heads import HEADS
from lily.errors import LilyError
from lily.plan.vocabulary import FOLDER
from lily.recipes.data.images import Preprocess
from lily.recipes.data.sources import fetch
from lily.recipes.models import convert, quantization
from lily.recipes.models.reference import reference, shown
from lily.recipes.offline import standins
from lily.recipes.spec.base import Task
from lily.recipes.spec.schema import Model, Recipe
from lily.tuner import call_uncalled

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


AUTO_CLASSES: dict[Task, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "sft": "AutoModelForCausalLM",
}


def heads_of(model: nn.Module) -> list[str]:
    """Names of the model's classification heads."""
    timm = getattr(model, "timm_model", None)
    if timm is not None:
        classifier = timm.get_classifier()
        return [name for name, module in model.named_modules() if module is classifier]
    return [name for name in HEADS if hasattr(model, name)]


def local_model(model: Model) -> Path | str:
    """A folder for `from_pretrained`, downloaded and converted if necessary, or a hub id.

    Raises:
        LilyError: if it does not exist or cannot be downloaded or converted.
    """
    if model.standin is not None:
        return standins.standin(model.standin)
    if model.hub is not None:
        return model.hub
    path = fetch(model)
    if model.format != "transformers":
        path = convert.converted(path, model.format)
    if not (path / "config.json").is_file():
        raise LilyError(f"model {path}: no config.json; name a transformers folder, or set format: gguf")
    return path


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        LilyError: if there is none, or it has no token for padding.
    """
    from transformers import AutoTokenizer

    source = local_model(model)
    tokenizer = loading(
        "tokenizer",
        source,
        lambda: AutoTokenizer.from_pretrained(
            source, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        ),
    )
    # Without files, transformers 5 creates a tokenizer with an empty vocabulary.
    needed = {*type(tokenizer).vocab_files_names.values(), "tokenizer.json"} if tokenizer.vocab_files_names else set()
    if isinstance(source, Path) and needed and not any((source / name).is_file() for name in needed):
        raise LilyError(
            f"tokenizer of {source}: found none of {', '.join(sorted(needed))}; save the tokenizer in this folder"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise LilyError(f"tokenizer of {source}: has no padding, end or unknown token; add one and save it")
    return tokenizer


def load_processor(recipe: Recipe, config: PretrainedConfig) -> PreTrainedTokenizerBase | Preprocess:
    """The model's tokenizer, or the image preprocessing of the recipe's `data.image`.

    Raises:
        LilyError: if there is no tokenizer.
    """
    if recipe.task != "image-classification":
        return load_tokenizer(recipe.model)
    image = recipe.data.image
    return Preprocess(size=image.size or image_size(config), norm=image.norm, crop=image.crop)


def image_size(config: PretrainedConfig) -> int:
    """Image size of a model in pixels; 224 if its configuration has none."""
    own = getattr(config, "image_size", None)
    if own is None:  # timm models
        own = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", 224)
    return int(own if isinstance(own, int) else own[-1])


def load_model(
    model: Model,
    task: Task,
    labels: Sequence[str] | None = None,
    *,
    precision: str = "float32",
    announce: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """The pretrained model with the task's head, in eval mode. A head of another size is replaced by a new one.

    A quantized model is prepared for training, also for inference, so that both compute the same.

    Args:
        model: source and data type.
        task: decides the head.
        labels: the classes, for classification.
        precision: data type of products with 4-bit weights.
        announce: called with one line if a head is replaced.

    Raises:
        LilyError: if it cannot be loaded.
    """
    import torch

    source = local_model(model)
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    options: dict[str, Any] = {}
    if model.quantization != "none":
        meta = meta_model(model, task, len(labels or ()) or 2)
        options = quantization.loading_options(model.quantization, meta, task, getattr(torch, precision))
    loaded, info = loading(
        "model",
        source,
        lambda: _class(task).from_pretrained(
            source,
            revision=model.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **_head(task, labels),
        ),
    )
    mismatched = sorted((name, tuple(saved), tuple(wanted)) for name, saved, wanted in info["mismatched_keys"])
    if mismatched:
        line = _new_head(mismatched, loaded, task, source, shown(model))
        if announce is not None:
            announce(line)
    if task != "image-classification" and getattr(loaded.config, "pad_token_id", None) is None:
        # A classifier on a decoder reads the last token that is not padding. A missing tokenizer is reported
        # where it is needed.
        with contextlib.suppress(LilyError):
            loaded.config.pad_token_id = load_tokenizer(model).pad_token_id
    if options:
        loaded = quantization.prepared(loaded)
    name, _ = reference(model)
    loaded.name_or_path = loaded.config.name_or_path = name  # PEFT writes it into the adapter's files
    if name != str(source):
        setattr(loaded, FOLDER, str(source))
    call_uncalled.call_projections(loaded)
    return cast("PreTrainedModel", loaded.eval())


def meta_model(model: Model, task: Task, num_labels: int = 2) -> PreTrainedModel:
    """The same architecture on the meta device: names and shapes, no weights.

    Raises:
        LilyError: if its config cannot be read.
    """
    from transformers import AutoConfig

    _register_models(task)
    source = local_model(model)
    labels = [str(i) for i in range(num_labels)]
    config = loading(
        "config",
        source,
        lambda: AutoConfig.from_pretrained(
            source,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **_head(task, labels),
        ),
    )
    return _without_weights(config, task, source, model.trust_remote_code)


def described_model(model: Model, task: Task) -> PreTrainedModel:
    """The model on the meta device, built from `model.architecture`; nothing is downloaded.

    Raises:
        LilyError: if transformers has no such model.
    """
    from transformers import AutoConfig

    _register_models(task)
    values = dict(model.architecture or {})
    kind = values.pop("model_type")
    source = f"model.architecture ({kind})"
    labels = ["0", "1"]
    config = loading("config", source, lambda: AutoConfig.for_model(kind, **values, **_head(task, labels)))
    return _without_weights(config, task, source)


def _without_weights(config: Any, task: Task, source: Path | str, trust_remote_code: bool = False) -> PreTrainedModel:
    import torch

    with torch.device("meta"):
        build = _class(task).from_config
        model = loading("config", source, lambda: build(config, trust_remote_code=trust_remote_code))
    return cast("PreTrainedModel", model)


def _new_head(
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    model: PreTrainedModel,
    task: Task,
    source: Path | str,
    named: str,
) -> str:
    """The message about a new head that replaces one of another size.

    Raises:
        LilyError: if a weight outside of the head has another shape, since it would be initialized at random.
    """
    inside, heads = f"{model.base_model_prefix}.", tuple(f"{name}." for name in heads_of(model))
    for name, saved, wanted in mismatched:
        if task == "sft" or (name.startswith(inside) and not name.startswith(heads)):
            raise LilyError(
                f"model of {source} could not be loaded: {name} has shape {saved}, but config.json implies {wanted}; "
                "use the config.json that belongs to the weights"
            )
    name, saved, wanted = mismatched[-1]
    return f"{name} of {named} has {saved[0]} outputs and this task {wanted[0]}: training starts with a new head"


def _register_models(task: Task) -> None:
    """Register the models of this package with transformers' Auto classes."""
    if task == "image-classification":
        import lily.recipes.offline.vision_mamba  # noqa: F401


def _class(task: Task) -> Any:
    import transformers

    _register_models(task)
    return getattr(transformers, AUTO_CLASSES[task])


def _head(task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
    if task == "sft":
        return {}
    if task == "text-regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = list(labels or ())
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def loading(what: str, source: Path | str, load: Callable[[], Any]) -> Any:
    """The result of `load`, which calls transformers or diffusers.

    Raises:
        LilyError: for every exception of `load`; names `what` was loaded, and its source.
    """
    try:
        return load()
    except LilyError:
        raise
    except Exception as error:  # formats, config classes and remote files raise errors of many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        raise LilyError(f"{what} of {source} could not be loaded: {reason}") from None
