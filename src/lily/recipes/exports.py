"""What `lily export` writes beside tensors: a model card, the classes, and for llama.cpp a Modelfile and the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lily.checkpoint.heads import LABELS
from lily.deploy.card import CARD, beside
from lily.deploy.gguf import write_gguf
from lily.deploy.lora import LoraExport
from lily.deploy.ollama import modelfile
from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.recipes.data.sources import fetch
from lily.recipes.results.adapter_folder import AdapterFolder
from lily.recipes.results.model_card import described, export_card, export_lines, metadata, use_gguf
from lily.recipes.spec.schema import Recipe

MODELFILE = "Modelfile"
ADAPTER = "adapter.gguf"  # in a folder
BASE = "base.gguf"  # the base model's file, where its name is not known


def files_beside(location: AdapterFolder, kind: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """The card and the classes of an export; nothing where there is no recipe, so that the export's own are written.

    Args:
        location: of the adapter.
        kind: of `lily.deploy.card.NAMES`.
        facts: the export's provenance.
    """
    recipe, labels = location.recipe, location.labels()
    if not isinstance(recipe, Recipe):
        return {}
    lines = [] if kind == "diffusers" else export_lines(kind, recipe, labels)
    files = {CARD: export_card(kind, recipe, labels, location.path, facts, lines)}
    return files if labels is None else {**files, LABELS: json.dumps(list(labels), ensure_ascii=False)}


def base_file(location: AdapterFolder) -> Path | None:
    """The base model's GGUF file; None: it is in another format."""
    recipe = location.recipe
    return fetch(recipe.model) if isinstance(recipe, Recipe) and recipe.model.format == "gguf" else None


def check_free(out: str, overwrite: bool) -> None:
    """Refuse to replace a Modelfile beside a file that is to be written.

    Raises:
        LilyError: if there is one, without `overwrite`.
    """
    file = Path(out).parent / MODELFILE
    if Path(out).suffix == ".gguf" and file.exists() and not overwrite:
        raise LilyError(f"{file} exists, and --to gguf writes one; name another folder in --out, or give --overwrite")


def write_for_llama_cpp(
    lora: LoraExport,
    model: Any,
    location: AdapterFolder,
    out: str,
    *,
    tokenizer: Any,
    overwrite: bool = False,
    with_base: bool = False,
) -> list[str]:
    """Write a LoRA for llama.cpp, a card and a Modelfile for Ollama: a folder, or a file `*.gguf` and these beside it.

    Args:
        lora: of target llama.cpp.
        model: the model with the adapter.
        location: of the adapter.
        out: the folder, or the file.
        tokenizer: the base model's; None: it has none.
        overwrite: replace what is there. A README.md beside a file is never replaced.
        with_base: copy the base model's GGUF file too.

    Returns:
        What there is to say about it, in lines.

    Raises:
        LilyError: if there is no GGUF file of the base model to copy, and as `write_gguf`.
    """
    base = base_file(location)
    if with_base and base is None:
        raise LilyError(
            f"{location.path} is not for a base model in GGUF, so there is no file to copy; convert the base with "
            "llama.cpp's convert_hf_to_gguf.py, and drop --with-base"
        )
    path = Path(out)
    if path.suffix != ".gguf":
        with new_folder(path, overwrite) as new:
            return _write(lora, model, location, new / ADAPTER, tokenizer, base, with_base, overwrite=True)
    check_free(out, overwrite)
    return _write(lora, model, location, path, tokenizer, base, with_base, overwrite)


def _write(
    lora: LoraExport,
    model: Any,
    location: AdapterFolder,
    file: Path,
    tokenizer: Any,
    base: Path | None,
    with_base: bool,
    overwrite: bool,
) -> list[str]:
    recipe = location.recipe if isinstance(location.recipe, Recipe) else None
    facts, said = lora.provenance, []
    about = str(facts.get("base_model") or "") if recipe is None else described(recipe.model).replace("`", "")
    values = {} if recipe is None else metadata(recipe)
    write_gguf(
        lora,
        model.get_base_model().config,
        file,
        overwrite=overwrite,
        name=values.get("model_name"),
        license=values.get("license"),
    )
    named = base.name if base is not None else BASE
    text, missing = modelfile(
        named,
        file.name,
        tokenizer=tokenizer,
        prompt=None if recipe is None else recipe.data.template,
        chat=recipe is None or recipe.data.chat,
        about=about,
    )
    write_text(file.parent / MODELFILE, text)
    said.append(f"Modelfile: ollama create NAME -f {MODELFILE}, beside {named}")
    if missing is not None:
        said.append(f"warning: the Modelfile has no TEMPLATE, since {missing}; Ollama takes the one in {named}")
    if recipe is None:
        card = beside("gguf", facts, lora.task, None, None)[CARD]
    else:
        card = export_card("gguf", recipe, None, location.path, facts, use_gguf(named, file.name))
    if (file.parent / CARD).exists():
        said.append(f"{file.parent / CARD} exists and was kept, so the card was not written")
    else:
        write_text(file.parent / CARD, card)
    if with_base and base is not None:
        shutil.copyfile(base, file.parent / base.name)
    elif base is not None:
        said.append(f"base model for llama.cpp: {base} (--with-base copies it)")
    return said
