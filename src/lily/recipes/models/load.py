"""Pretrained models of recipes, and what prepares their inputs. Weights are read from safetensors only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lily.errors import LilyError
from lily.recipes.data.images import Preprocess
from lily.recipes.data.sources import fetch
from lily.recipes.models import convert, quantization
from lily.recipes.offline import standins
from lily.recipes.spec.schema import Model, Recipe, Task
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


HEADS = ("classifier", "score", "classification_head", "head")


def heads_of(model: nn.Module) -> list[str]:
    """The names of the modules that classify what the model has read."""
    timm = getattr(model, "timm_model", None)
    if timm is not None:
        classifier = timm.get_classifier()
        return [name for name, module in model.named_modules() if module is classifier]
    return [name for name in HEADS if hasattr(model, name)]


def local_model(model: Model) -> Path | str:
    """A folder that `from_pretrained` takes (fetched and converted if need be), or a hub id.

    Raises:
        LilyError: if it cannot be had.
    """
    if model.standin is not None:
        return standins.standin(model.standin)
    if model.hub is not None:
        return model.hub
    path = fetch(model)
    if model.format != "transformers":
        path = convert.converted(path, model.format)
    if not (path / "config.json").is_file():
        raise LilyError(f"model {path}: no config.json; name a transformers folder, or say format: gguf")
    return path


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        LilyError: if there is none.
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
    # Without files transformers 5 makes a tokenizer with an empty vocabulary, to which every text is unknown.
    needed = {*type(tokenizer).vocab_files_names.values(), "tokenizer.json"} if tokenizer.vocab_files_names else set()
    if isinstance(source, Path) and needed and not any((source / name).is_file() for name in needed):
        raise LilyError(f"tokenizer of {source}: none of {', '.join(sorted(needed))} is there; save the tokenizer too")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise LilyError(f"tokenizer of {source}: has no padding, end or unknown token; give it one and save it")
    return tokenizer


def load_processor(recipe: Recipe, config: PretrainedConfig) -> PreTrainedTokenizerBase | Preprocess:
    """What prepares the model's inputs: its tokenizer, or the recipe's `data.image`.

    Args:
        recipe: decides the task.
        config: the model's, for the size of its images.

    Raises:
        LilyError: if there is no tokenizer.
    """
    if recipe.task != "image-classification":
        return load_tokenizer(recipe.model)
    image = recipe.data.image
    return Preprocess(size=image.size or image_size(config), norm=image.norm, crop=image.crop)


def image_size(config: PretrainedConfig) -> int:
    """Height and width, in pixels, of the images that a model was made for; 224 if it does not say."""
    own = getattr(config, "image_size", None)
    if own is None:  # timm's say it there
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

    A quantised one is prepared for training: its function is the same then as where it is only used.

    Args:
        model: where it is.
        task: decides the head.
        labels: the classes, for classification.
        precision: in what the products with 4-bit weights are computed.
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
    misfits = sorted((name, tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"])
    if misfits:
        line = _new_head(misfits, loaded, task, source)
        if announce is not None:
            announce(line)
    if task != "image-classification" and getattr(loaded.config, "pad_token_id", None) is None:
        # The tokenizer's own: a classifier over a decoder reads the last token that is not this one.
        # What needs a tokenizer loads it itself, and says what is wrong with it.
        with contextlib.suppress(LilyError):
            loaded.config.pad_token_id = load_tokenizer(model).pad_token_id
    if options:
        loaded = quantization.prepared(loaded)
    call_uncalled.call_projections(loaded)
    return cast("PreTrainedModel", loaded.eval())


def meta_model(model: Model, task: Task, num_labels: int = 2) -> PreTrainedModel:
    """The same architecture on the meta device: names and shapes, no weights.

    Raises:
        LilyError: if its config cannot be had.
    """
    from transformers import AutoConfig

    _make_known(task)
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
    """The model on the meta device, built from the recipe's own description of it; nothing is read or downloaded.

    Raises:
        LilyError: if transformers has no such model.
    """
    from transformers import AutoConfig

    _make_known(task)
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
        made = loading("config", source, lambda: build(config, trust_remote_code=trust_remote_code))
    return cast("PreTrainedModel", made)


def _new_head(
    misfits: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    model: PreTrainedModel,
    task: Task,
    source: Path | str,
) -> str:
    """What to say of a new head in place of one of another size.

    Raises:
        LilyError: if a weight besides the head has another shape, which would start at random too.
    """
    inside, heads = f"{model.base_model_prefix}.", tuple(f"{name}." for name in heads_of(model))
    for name, there, here in misfits:
        if task == "sft" or (name.startswith(inside) and not name.startswith(heads)):
            raise LilyError(
                f"model of {source} could not be loaded: {name} has shape {there}, but config.json asks for {here}; "
                "give the folder the config.json of its weights"
            )
    name, there, here = misfits[-1]
    return f"{name} of {source} has {there[0]} outputs and this task {here[0]}: training starts with a new head"


def _make_known(task: Task) -> None:
    """Tell transformers' Auto classes of the models that are defined here."""
    if task == "image-classification":
        import lily.recipes.offline.vision_mamba  # noqa: F401


def _class(task: Task) -> Any:
    import transformers

    _make_known(task)

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
    """What `load` returns.

    Args:
        what: is loaded, for the message.
        source: where from.
        load: transformers' or diffusers' own loading.

    Raises:
        LilyError: in place of whatever it raises.
    """
    try:
        return load()
    except LilyError:
        raise
    except Exception as error:  # each format, config class and remote file has its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        raise LilyError(f"{what} of {source} could not be loaded: {reason}") from None
