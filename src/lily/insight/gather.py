"""Everything that can be told of an adapter's folder, gathered into one value: what `lily inspect` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lily.analysis.factored import Factored, lily_layers, lora_layers
from lily.analysis.history import FILE, RoutingHistory
from lily.analysis.rank import THRESHOLD, RankReport, rank_report
from lily.analysis.routing import RoutingReport, routing_report
from lily.analysis.sentences import title_of
from lily.checkpoint.format import specs_of
from lily.errors import LilyError
from lily.insight.texts import load_texts
from lily.plan.budget import equal_lora_rank
from lily.plan.sharing_plan import SharingPlan
from lily.plan.specs import PARALLEL_MODULE, SLICE
from lily.recipes import data
from lily.recipes.data.tables import Row
from lily.recipes.data.tasks import encode_inputs
from lily.recipes.deploy import describe, load_for_export
from lily.recipes.results.adapter import Adapter, batches
from lily.recipes.results.adapter_folder import adapter_path, kept_recipe
from lily.recipes.results.run_files import RunFigures, newest_checkpoint, run_figures, run_of
from lily.recipes.scoring.inference import by_length, device_of
from lily.recipes.spec.schema import CLASSIFYING, File
from lily.tuner.adapter import find


@dataclass(frozen=True)
class Insight:
    """What is known of an adapter.

    Attributes:
        facts: from `lily.recipes.deploy.describe`: kind, configuration, tensors, origin, collapse.
        plan: who shares what; None: it is no Lily adapter, or its base model's configuration is not here.
        rank: of its updates.
        lora: rank of the LoRA that the run trained as its baseline.
        equal_lora: the rank of LoRA that as many parameters buy on these layers; None: it cannot be on them.
        routing: over the data that were read, or the constant weights.
        history: of the routing during training.
        run: figures of the run; None: the folder is not a run's.
        lora_run: figures of its LoRA baseline.
        read: what the routing was measured on, in words; empty: no data were read.
        notes: what could not be told, and why.
    """

    facts: dict[str, Any]
    plan: SharingPlan | None = None
    rank: RankReport | None = None
    lora: RankReport | None = None
    equal_lora: int | None = None
    routing: RoutingReport | None = None
    history: RoutingHistory | None = None
    run: RunFigures | None = None
    lora_run: RunFigures | None = None
    read: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        parts = ("rank", "lora", "routing", "history", "run", "lora_run")
        told = {name: getattr(self, name).to_dict() for name in parts if getattr(self, name) is not None}
        if self.plan is not None:
            told["plan"] = [
                {"name": g.name, "shape": [g.out_features, g.in_features], "r": g.r, "num_B": g.num_B,
                 "blocks": [list(block) for block in g.blocks]}
                for g in self.plan.groups
            ]  # fmt: skip
        if self.equal_lora is not None:
            told["equal_lora"] = self.equal_lora
        return {**self.facts, **told, "read": self.read, "notes": list(self.notes)}


def insight(
    folder: str,
    *,
    file: str | None = None,
    rows: int = 256,
    recipe: str | None = None,
    base: str | None = None,
    threshold: float = THRESHOLD,
) -> Insight:
    """Gather what can be told of a folder.

    Args:
        folder: a run's folder, any adapter, an exported LoRA, a merged model or a GGUF file.
        file: rows to measure a data-dependent routing on, with the recipe's columns (without a recipe: `text`, and
            `label` if wanted); labels are used if they are there. Default: a run's held-out rows; of any other
            folder none.
        rows: at most so many, a fixed sample; 0: read no data.
        recipe: default: the one kept beside the adapter.
        base: folder of the base model; default: where the recipe or the adapter says it is.
        threshold: of the numerical rank.

    Raises:
        LilyError: if the folder holds nothing known, its files are damaged, or `file` cannot be used. What is merely
            missing becomes a note.
    """
    told = Insight(describe(folder))
    _check_collapse(told.facts)
    path, run = Path(folder).expanduser(), None
    if path.is_dir() and (run := run_of(path)) is not None:
        told = _with_run(told, run)
    kind = told.facts["kind"]
    if kind != "LILY adapter" and file is not None:
        raise LilyError(f"{folder} is a {kind}; --data is for Lily adapters, whose routing may depend on the data")
    if kind == "LORA adapter":
        try:
            return replace(told, rank=rank_report(lora_layers(adapter_path(folder)), threshold=threshold))
        except LilyError as error:  # DoRA, or a head trained without an adapter
            return _noting(told, f"no rank: {error}")
    if kind != "LILY adapter":
        return told
    static = bool(told.facts["static"])
    if file is not None or (run is not None and rows and not static):
        try:
            if file is not None and recipe is None and kept_recipe(adapter_path(folder)) is None:
                return _measured_texts(told, folder, file, rows, base, threshold)
            return _measured(told, Adapter(folder, recipe, base), file, rows, folder, threshold)
        except LilyError as error:
            if file is not None:
                raise
            told = _noting(told, f"no routing over data: {error}")
    return _from_files(told, folder, recipe, base, threshold)


def _check_collapse(facts: Mapping[str, Any]) -> None:
    """Refuse a collapse report that is not one: tables and pages are made of it."""
    report = facts.get("collapse") or facts.get("provenance", {}).get("collapse")
    if not report:
        return
    try:
        drift, before = report["drift"], report["drift_before_refit"]
        numbers = [report["tokens"], report["refit_steps"], *(report["metrics"].get("before") or {}).values()]
        numbers += [report["metrics"]["after"][name] for name in report["metrics"].get("before") or {}]
        for found in (drift, *([] if before is None else [before])):
            numbers += [found["relative_error"], found["positions"], found["kl"] or 0]
        for layer in report["layers"]:
            numbers += [*layer["weights"], layer["uniformity"], layer["variance"], layer["update_error"] or 0]
        texts = [report["routing"], *(layer["name"] for layer in report["layers"])]
        fine = all(type(n) in (int, float) for n in numbers) and all(isinstance(t, str) for t in texts)
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise LilyError(f"{facts['folder']}: its collapse report is not what `lily collapse` writes; is it damaged?")


def _noting(told: Insight, note: str) -> Insight:
    return replace(told, notes=(*told.notes, note))


def _with_run(told: Insight, run: Path) -> Insight:
    told = replace(told, run=run_figures(run))
    if (run / "lora" / "metrics.json").is_file():
        told = replace(told, lora_run=run_figures(run / "lora"))
    places = [run / "checkpoints", newest_checkpoint(run / "checkpoints")]
    kept = next((p / FILE for p in places if p is not None and (p / FILE).is_file()), None)
    return told if kept is None else replace(told, history=RoutingHistory.load(kept))


def _from_files(told: Insight, folder: str, recipe: str | None, base: str | None, threshold: float) -> Insight:
    """From the adapter's tensors and the base model's configuration; no weight of it is read."""
    try:
        model, _, _ = load_for_export(folder, recipe=recipe, base=base)
    except LilyError as error:
        return _noting(
            told, f"who shares what, and so the rank per layer, needs the base model's configuration: {error}"
        )
    if not find(model).config.dynamic:
        told = replace(told, routing=routing_report(model))
    return _ranked(told, model, folder, threshold)


def _measured(told: Insight, used: Adapter, file: str | None, rows: int, folder: str, threshold: float) -> Insight:
    """On the base model with its weights, over data."""
    chosen, told = _rows(told, used, file, rows)
    labels: Sequence[object] | None = None
    if used.recipe.task != "sft":
        encoded = [encode_inputs(row, used.recipe, used.processor) for row in chosen]
        order = [i for batch in by_length(encoded, used.recipe.train.eval_batch_size) for i in batch]
        chosen = [chosen[i] for i in order]  # a stable order, so that batches keep it and labels follow
        if used.recipe.task in CLASSIFYING and all("label" in row for row in chosen):
            labels = [row["label"] for row in chosen]
    made = batches(chosen, used.recipe, used.processor, device_of(used.model))
    where = file or ("test" if used.splits.test else "validation")
    routing = routing_report(used.model, made, labels)
    told = replace(told, routing=routing, read=f"{len(chosen):,} rows of {where}")
    return _ranked(told, used.model, folder, threshold)


def _measured_texts(told: Insight, folder: str, file: str, rows: int, base: str | None, threshold: float) -> Insight:
    """The same of an adapter without a recipe, over a file's texts."""
    used = load_texts(folder, file, base, rows or None)
    routing = routing_report(used.model, used.batches, used.labels)
    told = replace(told, routing=routing, read=f"{used.rows:,} rows of {file}")
    return _ranked(told, used.model, folder, threshold)


def _rows(told: Insight, used: Adapter, file: str | None, rows: int) -> tuple[list[Row], Insight]:
    if file is None:
        return data.drawn(used.splits.held_out, rows), told
    source = File(path=file, header=used.recipe.data.train.header)
    try:
        return data.drawn(data.rows_of(source, used.recipe), rows or None), told
    except LilyError as error:
        found = data.drawn(data.rows_of(source, used.recipe, labeled=False), rows or None)
        return found, _noting(told, f"labels are not used: {error}")


def _ranked(told: Insight, model: Any, folder: str, threshold: float) -> Insight:
    plan = find(model).plan
    # LoRA of a slice, or beside a module, is nothing that anybody could use instead.
    alike = not any(group.kind in (SLICE, PARALLEL_MODULE) for group in plan.groups)
    equal = equal_lora_rank(specs_of(plan), plan.parameters.total) if alike else None
    told = replace(told, plan=plan, equal_lora=equal)
    try:
        mixings = told.routing.mixings if told.routing is not None else None
        told = replace(told, rank=rank_report(lily_layers(model), mixings, threshold))
    except LilyError as error:
        return _noting(told, f"no rank: {error}")
    run = run_of(Path(folder).expanduser())
    lora = None if run is None else run / "lora" / "best"
    if lora is not None and (lora / "adapter_config.json").is_file():
        try:
            told = replace(told, lora=rank_report(_like(plan, lora_layers(lora)), threshold=threshold))
        except LilyError as error:
            told = _noting(told, f"no rank of the LoRA beside it: {error}")
    return told


def _like(plan: SharingPlan, layers: Sequence[Factored]) -> list[Factored]:
    """A LoRA's layers in the order and the groups of a plan; those that it does not adapt come last."""
    order = {name: i for i, name in enumerate(plan.slots)}
    placed = [replace(x, group=title_of(plan.group_of(x.name))) if x.name in order else x for x in layers]
    return sorted(placed, key=lambda x: order.get(x.name, len(order)))
