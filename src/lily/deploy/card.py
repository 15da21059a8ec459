"""What stands beside the tensors of an export: the classes, and a model card with the Hub's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lily.checkpoint.heads import LABELS
from lily.plan.wrappers import innermost

CARD = "README.md"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# What a model's class ends with -> what it does on the Hub.
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
}
LIBRARIES = {"lora": "peft", "stock": "peft", "merged": "transformers", "gguf": "gguf", "diffusers": "diffusers"}
NAMES = {
    "lora": "A LoRA",
    "stock": "A Lily adapter for PEFT without further packages",
    "merged": "A merged model",
    "gguf": "A LoRA for llama.cpp",
    "diffusers": "A LoRA for diffusers",
}


def front_matter(values: Mapping[str, Any]) -> str:
    """The Hub's metadata at the top of a model card; values that are None or empty are left out.

    Args:
        values: keyword arguments of `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    given = {name: value for name, value in values.items() if value not in (None, [], "")}
    return f"---\n{ModelCardData(**given).to_yaml()}\n---"


def task_of(model: nn.Module) -> str | None:
    """The Hub's name of what a model does, by its class."""
    name = type(_base(model)).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)


def labels_of(model: nn.Module) -> list[str] | None:
    """The classes of a classifier, as its configuration names them; None: it is none."""
    names = getattr(getattr(_base(model), "config", None), "id2label", None)
    if not (task_of(model) or "").endswith("-classification") or not isinstance(names, Mapping) or len(names) < 2:
        return None
    return [str(names[i]) for i in sorted(names, key=int)]


def _base(model: nn.Module) -> Any:
    inner: Any = innermost(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def beside(
    kind: str, facts: Mapping[str, Any], task: str | None, labels: Sequence[str] | None, given: Mapping[str, str] | None
) -> dict[str, str]:
    """The text files of an export by name: `given` ones, and otherwise a short card and the classes."""
    files = {} if labels is None else {LABELS: json.dumps(list(labels), ensure_ascii=False)}
    return {**files, CARD: short_card(kind, facts, task, labels), **(given or {})}


def short_card(kind: str, facts: Mapping[str, Any], task: str | None, labels: Sequence[str] | None) -> str:
    """The card of an export of which only the model and the adapter are known."""
    base = str(facts.get("base_model") or "")
    head = front_matter(
        {
            "base_model": base if HUB_ID.match(base) else None,
            "library_name": LIBRARIES[kind],
            "pipeline_tag": task,
            "license": "unknown",
            "tags": ["lily", *(["lora"] if kind != "merged" else [])],
        }
    )
    named = f" for the base model `{base}`" if base else ""
    classes = (
        [f"Classes, in the order of the outputs: {', '.join(f'`{name}`' for name in labels)}.", ""] if labels else []
    )
    return "\n".join([head, "", f"{NAMES[kind]}{named}, made of a Lily adapter.", "", *classes])
