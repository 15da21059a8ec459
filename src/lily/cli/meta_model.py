"""A model on the meta device, from its configuration and without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError

if TYPE_CHECKING:
    from torch import nn

DATA = (".csv", ".tsv", ".jsonl", ".parquet", ".gz")  # not .json, as config.json is
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def model_from(target: str, task: str | None = None) -> tuple[nn.Module, str]:
    """Build a model without weights.

    Args:
        target: a folder, a config.json or a hub id; only for a hub id the network is used, to read its config.json.
        task: a key of `TASKS`; default: the architecture that the configuration names.

    Returns:
        The model on the meta device, and the data type of its weights.

    Raises:
        LilyError: if there is no such model, or transformers is missing or does not support it.
    """
    if task is not None and task not in TASKS:
        raise LilyError(f"task {task!r} is not supported; choose one of {', '.join(TASKS)}")
    from lily.plan.report import dtype_of

    config = _read_config(target)
    return _without_weights(config, target, task), dtype_of(config)


def _read_config(target: str) -> Any:
    path = Path(target).expanduser()
    if (path / "adapter_config.json").is_file():
        raise LilyError(f"{target} is an adapter, not a model; `lily inspect {target}` shows it")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LilyError(f"{target} has no config.json; name a model folder that save_pretrained wrote")
    if path.is_file() and path.suffix.lower() in DATA:
        raise LilyError(f"{target} is data, not a model or a recipe; `lily new {target}` writes a recipe for it")
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
        raise LilyError(_not_found(target, why)) from None


def _not_found(target: str, why: str) -> str:
    from lily.recipes import loader

    near = loader.near_recipes(target)
    hint = f"did you mean the recipe {near[0]}? " if near else ""
    return (
        f"{target} is not a shipped recipe, file or folder, nor readable from the Hugging Face Hub ({why}); {hint}"
        "name a recipe, a model folder or a config.json, or connect to the network for a hub id"
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
    except Exception as error:  # a model's constructor may raise anything
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LilyError(f"cannot build {target} as {task or architecture or 'AutoModel'}: {why}") from error
    return model
