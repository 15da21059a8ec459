"""Pretrained models and tokenizers of recipes. Weights are read from safetensors only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.recipes import convert
from lily.recipes.schema import Model, Task
from lily.recipes.sources import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def local_model(model: Model) -> Path | str:
    """A folder that `from_pretrained` takes (fetched and converted if need be), or a hub id.

    Raises:
        LilyError: if it cannot be had.
    """
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
    tokenizer = _loaded(
        "tokenizer",
        source,
        lambda: AutoTokenizer.from_pretrained(
            source, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        ),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(model: Model, task: Task, labels: Sequence[str] | None = None) -> PreTrainedModel:
    """The pretrained model with the task's head, in eval mode.

    Args:
        model: where it is.
        task: decides the head.
        labels: the classes, for text-classification.

    Raises:
        LilyError: if it cannot be loaded.
    """
    import torch

    source = local_model(model)
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    loaded = _loaded(
        "model",
        source,
        lambda: _class(task).from_pretrained(
            source,
            revision=model.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            **_head(task, labels),
        ),
    )
    _pad(loaded.config)
    return loaded.eval()


def meta_model(model: Model, task: Task, num_labels: int = 2) -> PreTrainedModel:
    """The same architecture on the meta device: names and shapes, no weights.

    Raises:
        LilyError: if its config cannot be had.
    """
    import torch
    from transformers import AutoConfig

    source = local_model(model)
    labels = [str(i) for i in range(num_labels)]
    config = _loaded(
        "config",
        source,
        lambda: AutoConfig.from_pretrained(
            source,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **_head(task, labels),
        ),
    )
    with torch.device("meta"):
        return _class(task).from_config(config, trust_remote_code=model.trust_remote_code)


def _class(task: Task) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task == "sft" else AutoModelForSequenceClassification


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


def _pad(config: Any) -> None:
    if getattr(config, "pad_token_id", None) is None and getattr(config, "eos_token_id", None) is not None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos


def _loaded(what: str, source: Path | str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LilyError(f"{what} of {source} could not be loaded: {reason}") from None
