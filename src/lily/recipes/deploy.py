"""Making an adapter static and taking it elsewhere: what `lily collapse` and `lily export` do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel

from lily.deploy.gguf import describe_gguf
from lily.deploy.provenance import provenance
from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.io.untrusted import read_header, read_json, read_tensors
from lily.plan.config import LilyConfig
from lily.recipes import data, loader, models
from lily.recipes.data.tables import Row
from lily.recipes.results.adapter import Adapter, adapter_path, batches, elsewhere, kept_labels, kept_recipe, recipe_of
from lily.recipes.results.card import LABELS
from lily.recipes.scoring.evaluate import Judge
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import File, Model

if TYPE_CHECKING:
    from lily.deploy.collapse import CollapseReport

REPORT = "collapse.json"
KEPT = ("recipe.yaml", LABELS, "README.md")


def collapse_adapter(
    folder: str,
    output: str,
    *,
    recipe: str | None = None,
    calibration: str | None = None,
    held_out: str | None = None,
    rows: int = 256,
    refit_steps: int = 0,
    overwrite: bool = False,
) -> CollapseReport:
    """Collapse a trained adapter and write the static one.

    Args:
        folder: a run's folder, or an adapter folder inside it.
        output: the folder to write.
        recipe: default: the one kept beside the adapter.
        calibration: a file with the recipe's columns, of which the label is not needed; default: training rows.
        held_out: the same with labels, for the drift and the metrics; default: the rows that the run reported on.
        rows: at most so many rows for calibration, and for the drift.
        refit_steps: see `lily.collapse`.
        overwrite: replace the output folder.

    Returns:
        The report, also written as `collapse.json` beside the adapter.

    Raises:
        LilyError: for anything wrong with the adapter, the data or the output folder.
    """
    from lily.deploy.collapse import collapse

    drawing = drawing_recipe(adapter_path(folder), recipe)
    if drawing is not None:
        from lily.recipes.dreambooth import deploy as dreambooth

        if calibration is not None or held_out is not None:
            raise LilyError("--data and --held-out are for text; the recipe's own images calibrate this adapter")
        path = adapter_path(folder)
        return dreambooth.collapse_adapter(path, output, drawing, refit_steps=refit_steps, overwrite=overwrite)
    with new_folder(output, overwrite) as new:  # first, so that hours of work do not end at a folder that exists
        used = Adapter(folder, recipe)
        if used.recipe.method != "lily":
            raise LilyError(f"{folder} is a {used.recipe.method} adapter; only Lily adapters are collapsed")
        known = used.splits.train if calibration is None else _rows(calibration, used, labelled=False)
        judged = used.splits.held_out if held_out is None else _rows(held_out, used)
        if used.labels is not None:
            data.check_labels(judged, used.labels, held_out or "the held-out split")
        device = next(used.model.parameters()).device
        judge = Judge(used.recipe, used.processor, used.labels)
        report = collapse(
            used.model,
            batches(known[:rows], used.recipe, used.processor, device),
            batches(judged[:rows], used.recipe, used.processor, device),
            refit_steps=refit_steps,
            metric=lambda model: judge(model, judged),
        )
        used.model.save_pretrained(str(new))
        for name in KEPT:
            if (used.path / name).is_file():
                shutil.copy(used.path / name, new / name)
        kept = kept_recipe(used.path)
        if not (new / "recipe.yaml").is_file() and kept is not None:
            shutil.copy(kept, new / "recipe.yaml")
        write_text(new / REPORT, json.dumps(report.to_dict(), indent=2))
        return report


def _rows(file: str, used: Adapter, labelled: bool = True) -> list[Row]:
    rows = data.rows_of(File(path=file, header=used.recipe.data.train.header), used.recipe, labelled)
    if not rows:
        raise LilyError(f"{file} holds no rows; collapse needs calibration data")
    return rows


def load_for_export(
    folder: str, *, recipe: str | None = None, base: str | None = None, weights: bool = False, dtype: str = "auto"
) -> tuple[Any, Any, dict[str, Any]]:
    """An adapter on its base model.

    Args:
        folder: a run's folder, or any adapter folder.
        recipe: default: the one kept beside the adapter.
        base: folder of the base model; default: where the recipe says it is, or the one the adapter was trained on.
        weights: whether the base model's weights are needed; if not, they are not read.
        dtype: of those weights; auto keeps the file's.

    Returns:
        The model (a PeftModel, or a diffusers model), the base model's tokenizer (None if it has none) and what is
        known of the adapter's origin.

    Raises:
        LilyError: if the adapter or its base model is missing, or they do not fit.
    """
    path = adapter_path(folder)
    config = _lily_config(path)
    drawing = drawing_recipe(path, recipe)
    if drawing is not None:
        from lily.recipes.dreambooth import deploy as dreambooth

        if weights:
            raise LilyError(
                f"{path} is for a pipeline, of which no merged model is written; export --to lora --for diffusers"
            )
        return dreambooth.without_weights(path, drawing), None, {"adapter": str(path)}
    if recipe is not None or (base is None and kept_recipe(path) is not None):
        chosen = recipe_of(path, recipe)
        source, task = chosen.model if base is None else elsewhere(chosen.model, base), chosen.task
    else:
        source, task = _base(path, config, base), "sft" if config.task_type == "CAUSAL_LM" else "text-classification"
        if config.task_type not in ("CAUSAL_LM", "SEQ_CLS"):
            raise LilyError(
                f"{path}: the command line exports task_type CAUSAL_LM and SEQ_CLS, not {config.task_type}; in "
                " Python, lily.export takes any model"
            )
    quantised = source.quantization
    # Merged into few bits an update would be rounded away: it goes into the weights that they were made of.
    source = source.model_copy(update={"dtype": dtype, "quantization": "none"})
    labels = kept_labels(path) or tuple(str(i) for i in range(_classes(path)))
    if weights:
        model = models.load_model(source, task, labels)
    else:
        # Names and shapes are enough to read the adapter; memory that nothing is written to costs nothing.
        model = models.meta_model(source, task, len(labels))
        model.to_empty(device="cpu")
    loaded = PeftModel.from_pretrained(model, str(path))
    facts: dict[str, Any] = {"adapter": str(path)}
    if quantised != "none":
        facts["trained_on"] = f"the base model in {quantised}"
    if (path / REPORT).is_file():
        facts["collapse"] = read_json(path / REPORT)
    try:
        tokenizer = models.load_tokenizer(source)
    except LilyError:
        tokenizer = None
    return loaded, tokenizer, facts


def drawing_recipe(path: Path, recipe: str | None) -> DreamBooth | None:
    """The recipe named, or the one kept beside an adapter, if it is one for drawing."""
    named = recipe or kept_recipe(path)
    found = None if named is None else loader.load_any(str(named))
    return found if isinstance(found, DreamBooth) else None


def _lily_config(path: Path) -> LilyConfig:
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LilyConfig):
        raise LilyError(f"{path} is a {config.peft_type} adapter, not a Lily one; it needs no export")
    return config


def _base(path: Path, config: LilyConfig, base: str | None) -> Model:
    where = base or config.base_model_name_or_path
    if not where:
        raise LilyError(f"{path} does not say which base model it is for; name it with --base")
    if base is None and not Path(where).is_dir():
        raise LilyError(f"{path} is for the base model {where!r}, which is no folder here; name it with --base")
    return Model(path=where) if Path(where).expanduser().exists() else Model(hub=where)


def _classes(path: Path) -> int:
    """Outputs of the classification head that the adapter file holds; 2 if it holds none."""
    for key, entry in read_header(path / "adapter_model.safetensors").entries.items():
        if ".lily_" not in key and key.endswith("weight") and entry.shape:
            return entry.shape[0]
    return 2


def describe(folder: str) -> dict[str, Any]:
    """What a folder is: an adapter (ours, a LoRA, another), an exported one, a merged model, and where it came from.

    The same for a GGUF file.

    Raises:
        LilyError: if it is neither.
    """
    path = Path(folder).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return {"folder": str(path), "bytes": path.stat().st_size, **describe_gguf(path)}
    if (path / "best").is_dir():
        path = path / "best"
    facts: dict[str, Any] = {"folder": str(path)}
    weights = sorted(path.glob("*.safetensors"))
    facts["bytes"] = sum(file.stat().st_size for file in weights)
    if (path / "adapter_config.json").is_file():
        config = PeftConfig.from_pretrained(str(path))
        facts["kind"] = f"{getattr(config.peft_type, 'value', config.peft_type)} adapter"
        names = ("r", "num_A", "stride_A", "num_B", "scaling", "routing", "activation", "settled", "lora_alpha",
                 "task_type", "base_model_name_or_path")  # fmt: skip
        facts["config"] = {n: getattr(config, n) for n in names if getattr(config, n, None) is not None}
        facts["tensors"] = {k: v for k, v in _tensors(weights).items() if v["count"]}
        if isinstance(config, LilyConfig):
            facts["zero_routers"] = config.dynamic and _zero_routers(weights)
            facts["static"] = (facts["zero_routers"] or not config.dynamic) and config.activation == "none"
            facts.update(config.provenance or {})
    elif (path / "config.json").is_file():
        facts["kind"] = "model"
    elif weights:
        facts["kind"] = "weights"
    else:
        raise LilyError(f"{folder} holds neither an adapter (adapter_config.json) nor a model (config.json)")
    if (path / REPORT).is_file():
        facts["collapse"] = read_json(path / REPORT)
    origin = provenance(path)
    if origin is not None:
        facts["provenance"] = origin
    return facts


def _zero_routers(files: list[Path]) -> bool:
    """Whether all routers weigh all experts alike, whatever the data: so static adapters are written for stock PEFT."""
    routers = []
    for file in files:
        routers += [tensor for key, tensor in read_tensors(read_header(file)).items() if ".lily_router" in key]
    return bool(routers) and not any(bool(router.any()) for router in routers)


def _tensors(files: list[Path]) -> dict[str, dict[str, int]]:
    parts = ("lily_A", "lily_B", "lily_router", "lily_logits", "lora_A", "lora_B", "other")
    found = {part: {"count": 0, "parameters": 0} for part in parts}
    for file in files:
        for key, entry in read_header(file).entries.items():
            part = next((p for p in parts if f".{p}" in key), "other")
            found[part]["count"] += 1
            found[part]["parameters"] += math.prod(entry.shape)
    return found
