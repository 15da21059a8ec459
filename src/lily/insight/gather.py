"""Gather the analysis of an adapter's folder into one value: what `lily inspect` shows."""

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
from lily.recipes.data.tasks import encode_inputs
from lily.recipes.deploy import describe, load_for_export
from lily.recipes.results.adapter import Adapter, batches
from lily.recipes.results.run_files import RunFigures, adapter_path, kept_recipe, newest_checkpoint, run_figures, run_of
from lily.recipes.scoring.inference import by_length, device_of
from lily.recipes.spec.base import CLASSIFYING
from lily.tuner.adapter import find


@dataclass(frozen=True)
class Insight:
    """The analysis of an adapter; a part is None where it does not apply or could not be analyzed."""

    facts: dict[str, Any]  # from `lily.recipes.deploy.describe`: kind, configuration, tensors, origin, collapse
    plan: SharingPlan | None = None
    rank: RankReport | None = None
    lora: RankReport | None = None  # of the LoRA that the run trained as its baseline
    equal_lora: int | None = None  # rank of LoRA with as many parameters on these layers; None: it cannot adapt them
    routing: RoutingReport | None = None  # over the data that were read, or the constant weights
    history: RoutingHistory | None = None
    run: RunFigures | None = None
    lora_run: RunFigures | None = None
    read: str = ""  # what the routing was measured on, in words; empty if no data were read
    notes: tuple[str, ...] = ()  # what could not be analyzed, and why

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        parts = ("rank", "lora", "routing", "history", "run", "lora_run")
        values = {name: getattr(self, name).to_dict() for name in parts if getattr(self, name) is not None}
        if self.plan is not None:
            values["plan"] = [
                {"name": g.name, "shape": [g.out_features, g.in_features], "r": g.r, "num_B": g.num_B,
                 "blocks": list(map(list, g.blocks))} for g in self.plan.groups
            ]  # fmt: skip
        if self.equal_lora is not None:
            values["equal_lora"] = self.equal_lora
        return {**self.facts, **values, "read": self.read, "notes": list(self.notes)}


def insight(
    folder: str,
    *,
    file: str | None = None,
    rows: int = 256,
    recipe: str | None = None,
    base: str | None = None,
    threshold: float = THRESHOLD,
) -> Insight:
    """Analyze a folder.

    Args:
        folder: a run's folder, any adapter, an exported LoRA, a merged model or a GGUF file.
        file: rows to measure a data-dependent routing on, with the recipe's columns (without a recipe: `text`, and
            optionally `label`). Default: the held-out rows of a run; no data for any other folder.
        rows: maximum number of rows, a fixed sample; 0 reads no data.
        recipe: default: the one kept beside the adapter.
        base: folder of the base model; default: the one that the recipe or the adapter names.
        threshold: of the numerical rank.

    Raises:
        LilyError: if the folder holds no known format, its files are damaged, or `file` cannot be used. A missing part
            becomes a note instead.
    """
    analysis = Insight(describe(folder))
    _check_collapse(analysis.facts)
    path, run = Path(folder).expanduser(), None
    if path.is_dir() and (run := run_of(path)) is not None:
        analysis = _with_run(analysis, run)
    kind = analysis.facts["kind"]
    if kind != "LILY adapter" and file is not None:
        raise LilyError(f"{folder} is a {kind}; --data is for Lily adapters, whose routing may depend on data: drop it")
    if kind == "LORA adapter":
        try:
            return replace(analysis, rank=rank_report(lora_layers(adapter_path(folder)), threshold=threshold))
        except LilyError as error:  # DoRA, or a head trained without an adapter
            return _noting(analysis, f"no rank: {error}")
    if kind != "LILY adapter":
        return analysis
    static = bool(analysis.facts["static"])
    if file is not None or (run is not None and rows and not static):
        try:
            if file is not None and recipe is None and kept_recipe(adapter_path(folder)) is None:
                texts = load_texts(folder, file, base, rows or None)
                routing = routing_report(texts.model, texts.batches, texts.labels)
                analysis = replace(analysis, routing=routing, read=f"{texts.rows:,} rows of {file}")
                return _ranked(analysis, texts.model, folder, threshold)
            return _measured(analysis, Adapter(folder, recipe, base), file, rows, folder, threshold)
        except LilyError as error:
            if file is not None:
                raise
            analysis = _noting(analysis, f"no routing over data: {error}")
    try:  # the adapter's tensors and the base model's configuration; its weights are not read
        model, _, _ = load_for_export(folder, recipe=recipe, base=base)
    except LilyError as error:
        return _noting(analysis, f"who shares what and the rank per layer need the base model's configuration: {error}")
    if not find(model).config.dynamic:
        analysis = replace(analysis, routing=routing_report(model))
    return _ranked(analysis, model, folder, threshold)


def _check_collapse(facts: Mapping[str, Any]) -> None:
    """Refuse a damaged collapse report: tables and pages read its numbers."""
    report = facts.get("collapse") or facts.get("provenance", {}).get("collapse")
    if not report:
        return
    try:
        drift, before = report["drift"], report["drift_before_refit"]
        numbers = [report["tokens"], report["refit_steps"], *(report["metrics"].get("before") or {}).values()]
        numbers += [report["metrics"]["after"][name] for name in report["metrics"].get("before") or {}]
        for measured in (drift, *([] if before is None else [before])):
            numbers += [measured["relative_error"], measured["positions"], measured["kl"] or 0]
        for layer in report["layers"]:
            numbers += [*layer["weights"], layer["uniformity"], layer["variance"], layer["update_error"] or 0]
        texts = [report["routing"], *(layer["name"] for layer in report["layers"])]
        fine = all(type(n) in (int, float) for n in numbers) and all(isinstance(t, str) for t in texts)
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise LilyError(
            f"{facts['folder']}: its collapse report is not what `lily collapse` writes; run `lily collapse` again"
        )


def _noting(analysis: Insight, note: str) -> Insight:
    return replace(analysis, notes=(*analysis.notes, note))


def _with_run(analysis: Insight, run: Path) -> Insight:
    analysis = replace(analysis, run=run_figures(run))
    if (run / "lora" / "metrics.json").is_file():
        analysis = replace(analysis, lora_run=run_figures(run / "lora"))
    folders = [run / "checkpoints", newest_checkpoint(run / "checkpoints")]
    file = next((f / FILE for f in folders if f is not None and (f / FILE).is_file()), None)
    return analysis if file is None else replace(analysis, history=RoutingHistory.load(file))


def _measured(analysis: Insight, used: Adapter, file: str | None, rows: int, folder: str, threshold: float) -> Insight:
    """Analyze the adapter on its base model, with the routing over data."""
    if file is None:
        chosen = data.drawn(used.splits.held_out, rows)
    else:
        source = used.recipe.data.file_at(file)
        try:
            chosen = data.drawn(data.rows_of(source, used.recipe), rows or None)
        except LilyError as error:
            chosen = data.drawn(data.rows_of(source, used.recipe, labeled=False), rows or None)
            analysis = _noting(analysis, f"labels are not used: {error}")
    labels: Sequence[object] | None = None
    if used.recipe.task != "sft":
        encoded = [encode_inputs(row, used.recipe, used.processor) for row in chosen]
        order = [i for batch in by_length(encoded, used.recipe.train.eval_batch_size) for i in batch]
        chosen = [chosen[i] for i in order]  # by_length is stable, so batches keep this order
        if used.recipe.task in CLASSIFYING and all("label" in row for row in chosen):
            labels = [row["label"] for row in chosen]
    inputs = batches(chosen, used.recipe, used.processor, device_of(used.model))
    where = file or ("test" if used.splits.test else "validation")
    routing = routing_report(used.model, inputs, labels)
    analysis = replace(analysis, routing=routing, read=f"{len(chosen):,} rows of {where}")
    return _ranked(analysis, used.model, folder, threshold)


def _ranked(analysis: Insight, model: Any, folder: str, threshold: float) -> Insight:
    plan = find(model).plan
    # PEFT's LoRA cannot adapt a slice or a parallel module.
    comparable = not any(group.kind in (SLICE, PARALLEL_MODULE) for group in plan.groups)
    equal = equal_lora_rank(specs_of(plan), plan.parameters.total) if comparable else None
    analysis = replace(analysis, plan=plan, equal_lora=equal)
    try:
        mixings = analysis.routing.mixings if analysis.routing is not None else None
        analysis = replace(analysis, rank=rank_report(lily_layers(model), mixings, threshold))
    except LilyError as error:
        return _noting(analysis, f"no rank: {error}")
    run = run_of(Path(folder).expanduser())
    lora = None if run is None else run / "lora" / "best"
    if lora is not None and (lora / "adapter_config.json").is_file():
        try:
            analysis = replace(analysis, lora=rank_report(_like(plan, lora_layers(lora)), threshold=threshold))
        except LilyError as error:
            analysis = _noting(analysis, f"no rank of the LoRA trained beside it: {error}")
    return analysis


def _like(plan: SharingPlan, layers: Sequence[Factored]) -> list[Factored]:
    """A LoRA's layers in the order and the groups of a plan; layers outside the plan come last."""
    order = {name: i for i, name in enumerate(plan.slots)}
    placed = [replace(x, group=title_of(plan.group_of(x.name))) if x.name in order else x for x in layers]
    return sorted(placed, key=lambda x: order.get(x.name, len(order)))
