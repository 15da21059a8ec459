"""Collapse an adapter, load one for export, describe a folder: behind `lily collapse`, `export` and `inspect`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel

from lily.checkpoint.beside import resize_to_file
from lily.checkpoint.heads import LABELS
from lily.deploy.gguf import describe_gguf
from lily.deploy.provenance import provenance
from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.io.untrusted import read_header, read_json, read_tensors
from lily.plan.config import LilyConfig
from lily.progress.progress import current
from lily.recipes import data, models
from lily.recipes.by_task import function_for
from lily.recipes.data.tables import Row
from lily.recipes.results.adapter import Adapter, batches
from lily.recipes.results.adapter_folder import AdapterFolder
from lily.recipes.results.run_files import kept_recipe, unfinished, within_run
from lily.recipes.scoring.evaluate import Judge
from lily.recipes.scoring.inference import device_of
from lily.recipes.spec.schema import Recipe
from lily.recipes.work import judged as judged_work

if TYPE_CHECKING:
    from lily.deploy.collapse import CollapseReport

REPORT, METRICS = "collapse.json", "evaluation"


def collapse_adapter(
    folder: str | AdapterFolder,
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
        rows: at most this many rows for calibration, and for the drift.
        refit_steps: see `lily.collapse`.
        overwrite: replace the output folder.

    Returns:
        The report, also written as `collapse.json` beside the adapter.

    Raises:
        LilyError: for anything wrong with the adapter, the data or the output folder.
    """
    location = AdapterFolder.of(folder, recipe)
    collapse = function_for("collapse", location.recipe)
    with new_folder(output, overwrite) as new:  # first, so that hours of work do not end at a folder that exists
        report: CollapseReport = collapse(
            location, new, calibration=calibration, held_out=held_out, rows=rows, refit_steps=refit_steps
        )
        kept = kept_recipe(location.path)
        for file in (kept, location.path / LABELS, location.path / "README.md"):
            if file is not None and file.is_file():
                shutil.copy(file, new / file.name)
        write_text(new / REPORT, json.dumps(report.to_dict(), indent=2))
        return report


def collapse_text(
    location: AdapterFolder, new: Path, *, calibration: str | None, held_out: str | None, rows: int, refit_steps: int
) -> CollapseReport:
    """`collapse_adapter` for text and images; writes the adapter into `new`."""
    from lily.deploy.collapse import collapse

    with current().stage("", "loading"):
        used = Adapter(location)
    if used.recipe.method != "lily":
        raise LilyError(f"{location.path} is a {used.recipe.method} adapter; only Lily adapters are collapsed")
    calibrating = used.splits.train if calibration is None else _rows(calibration, used, labeled=False)
    judged = used.splits.held_out if held_out is None else _rows(held_out, used)
    if used.labels is not None:
        merge = used.recipe.data.similar_labels == "merge"
        data.check_labels(judged, used.labels, held_out or "the held-out split", merge)
    told = current()
    told.expect("", METRICS, judged_work(used.recipe, 2 * len(judged)))
    device = device_of(used.model)
    judge = Judge(used.recipe, used.processor, used.labels)

    def metric(model: Any) -> dict[str, float]:
        with told.stage("", METRICS):
            return judge(model, judged)

    report = collapse(
        used.model,
        batches(calibrating[:rows], used.recipe, used.processor, device),
        batches(judged[:rows], used.recipe, used.processor, device),
        refit_steps=refit_steps,
        metric=metric,
    )
    keep_name(used.model, location)
    used.model.save_pretrained(str(new))
    return report


def keep_name(model: Any, location: AdapterFolder) -> None:
    """Let an adapter name its base model as the recipe does: one of an earlier version names a folder of its cache."""
    if isinstance(location.recipe, Recipe) and location.base is None:
        name, revision = models.reference(location.recipe.model)
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = name, revision or config.revision


def named_folder(path: Path) -> str:
    """An adapter's folder in files that travel: without the folders of this machine around it."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in ("best", "last") else path.name


def _rows(file: str, used: Adapter, labeled: bool = True) -> list[Row]:
    rows = data.rows_of(used.recipe.data.file_at(file), used.recipe, labeled)
    if not rows:
        raise LilyError(f"{file} holds no rows; collapse needs calibration data")
    return rows


def load_for_export(
    folder: str | AdapterFolder,
    *,
    recipe: str | None = None,
    base: str | None = None,
    weights: bool = False,
    dtype: str = "auto",
) -> tuple[Any, Any, dict[str, Any]]:
    """An adapter on its base model.

    Args:
        folder: a run's folder, or any adapter folder.
        recipe: default: the one kept beside the adapter.
        base: folder of the base model; default: the recipe's, else the one that the adapter names.
        weights: read the base model's weights; without them names and shapes alone are right.
        dtype: of those weights; auto keeps the file's.

    Returns:
        The model (a PeftModel, or a diffusers model), the base model's tokenizer (None if it has none) and the
        adapter's origin as JSON values.

    Raises:
        LilyError: if the adapter or its base model is missing, or they do not fit.
    """
    location = AdapterFolder.of(folder, recipe, base)
    path = location.path
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LilyConfig):
        raise LilyError(f"{path} is a {config.peft_type} adapter, not a Lily one; it needs no export")
    model, tokenizer, facts = function_for("load_for_export", location.recipe)(location, weights=weights, dtype=dtype)
    return model, tokenizer, {"adapter": named_folder(path), **facts}


def load_text(location: AdapterFolder, *, weights: bool, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
    """`load_for_export` for text and images."""
    (source, task), path = location.base_model(), location.path
    quantized = source.quantization
    # Merged into few bits an update would be rounded away: it goes into the weights that they were made of.
    source = source.model_copy(update={"dtype": dtype, "quantization": "none"})
    labels = location.outputs()
    if weights:
        model = models.load_model(source, task, labels)
    else:
        # Names and shapes are enough to read the adapter; memory that nothing is written to costs nothing.
        model = models.meta_model(source, task, len(labels))
        model.to_empty(device="cpu")
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # which new memory undid
    resize_to_file(model, path)
    loaded = PeftModel.from_pretrained(model, str(path))
    keep_name(loaded, location)
    facts: dict[str, Any] = {}
    if quantized != "none":
        facts["trained_on"] = f"the base model in {quantized}"
    if (path / REPORT).is_file():
        facts["collapse"] = read_json(path / REPORT)
    try:
        tokenizer = models.load_tokenizer(source)
    except LilyError:
        tokenizer = None
    return loaded, tokenizer, facts


def describe(folder: str) -> dict[str, Any]:
    """Kind, size, configuration and origin of a folder (an adapter of any method, a model, an export) or a GGUF file.

    Raises:
        LilyError: if it is none of these.
    """
    path = Path(folder).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return {"folder": str(path), "bytes": path.stat().st_size, **describe_gguf(path)}
    path = within_run(path)
    facts: dict[str, Any] = {"folder": str(path)}
    weights = sorted(path.glob("*.safetensors"))
    facts["bytes"] = sum(file.stat().st_size for file in weights)
    if (path / "adapter_config.json").is_file():
        config = PeftConfig.from_pretrained(str(path))
        facts["kind"] = f"{getattr(config.peft_type, 'value', config.peft_type)} adapter"
        names = ("r", "own_r", "num_A", "stride_A", "num_B", "scaling", "routing", "activation", "distinct", "gain",
                 "settled", "lora_alpha", "task_type", "base_model_name_or_path")  # fmt: skip
        facts["config"] = {n: getattr(config, n) for n in names if getattr(config, n, None) is not None}
        if not getattr(config, "own_r", None):
            facts["config"].pop("own_r", None)
        facts["tensors"] = {k: v for k, v in _tensors(weights).items() if v["count"]}
        if isinstance(config, LilyConfig):
            facts["zero_routers"] = config.dynamic and _zero_routers(weights)
            facts["static"] = facts["zero_routers"] or not config.dynamic
            if bent := _no_matrix(config):
                facts["no_matrix"] = bent
            facts.update(config.provenance or {})
    elif (path / "config.json").is_file():
        facts["kind"] = "model"
    elif weights:
        facts["kind"] = "weights"
    else:
        what = unfinished(path) or "holds neither an adapter (adapter_config.json) nor a model (config.json)"
        raise LilyError(f"{folder} {what}")
    if (path / REPORT).is_file():
        facts["collapse"] = read_json(path / REPORT)
    origin = provenance(path)
    if origin is not None:
        facts["provenance"] = origin
    return facts


def _no_matrix(config: LilyConfig) -> str:
    """The option by which an adapter has updates that are no matrices, whatever its routing; empty without one."""
    groups = [own["activation"] for own in (config.group_options or {}).values() if "activation" in own]
    bent = next((a for a in (config.activation, *groups) if a != "none"), None)
    if bent is not None:
        return f"activation={bent!r}"
    return f"parallel_modules={sorted(config.parallel_modules)}" if config.parallel_modules else ""


def _zero_routers(files: list[Path]) -> bool:
    """Whether all routers are zero, so that all experts weigh the same: a static adapter written for stock PEFT."""
    routers = []
    for file in files:
        routers += [tensor for key, tensor in read_tensors(read_header(file)).items() if ".lily_router" in key]
    return bool(routers) and not any(bool(router.any()) for router in routers)


def _tensors(files: list[Path]) -> dict[str, dict[str, int]]:
    parts = ("lily_A", "lily_B", "lily_own_A", "lily_own_B", "lily_gain", "lily_router", "lily_logits", "lora_A",
             "lora_B", "other")  # fmt: skip
    totals = {part: {"count": 0, "parameters": 0} for part in parts}
    for file in files:
        for key, entry in read_header(file).entries.items():
            part = next((p for p in parts if f".{p}" in key), "other")
            totals[part]["count"] += 1
            totals[part]["parameters"] += math.prod(entry.shape)
    return totals
