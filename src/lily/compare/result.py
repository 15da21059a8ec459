"""A finished comparison as a value, read from the files of its runs; no model is trained or loaded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from lily.analysis.seeds import spread
from lily.compare.paired import Items, Paired, compare
from lily.errors import LilyError
from lily.recipes.results.card import lily_title
from lily.recipes.results.run_files import json_object
from lily.recipes.scoring.review import ClassScore, only_class
from lily.recipes.spec.schema import Metric
from lily.search.runner import METRICS, PREDICTIONS

TITLES = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "none": "no adapter", "stock-lily": "stock Lily",
          "vera": "VeRA", "loha": "LoHa", "lokr": "LoKr"}  # fmt: skip
# What `lily sweep` writes beside its runs: first, and last.
OTHERS = ("settings.json", "granularity.json")
# Keys of a run's adapter summary that say how much its update counts.
SCALES = ("scaling", "lora_alpha", "alpha")


@dataclass(frozen=True)
class Entry:
    """A method's figures, mean over its seeds."""

    name: str  # of the method, such as `lily:batch` or `lora/4`
    title: str  # for people
    seeds: tuple[int, ...]  # of its runs
    values: dict[str, tuple[float, ...]]  # metric -> a value per seed, of the best adapter on the held-out rows
    tests: dict[str, dict[str, tuple[float, ...]]]  # further test set -> metric -> a value per seed
    last: tuple[float, ...]  # main metric after the last epoch, on the validation rows, per seed
    best: tuple[float, ...]  # main metric of the best epoch, on the validation rows, per seed
    history: tuple[tuple[float, float], ...]  # (optimizer step, main metric on the validation rows, mean over seeds)
    # increase of the loss on general text, in nats per token, for each seed that measured it
    forgetting: tuple[float, ...]
    rank: int | None  # of its updates; None where it has none
    parameters: int  # number that train, without a new head's; the head's, where it alone trains
    learning_rate: float  # of the adapter
    scale: tuple[str, float] | None  # option that multiplies the update, and its value
    seconds: float  # of training
    peak_bytes: float  # of memory
    adapter_bytes: float  # size of the adapter's file
    test: Paired | None = None  # paired test against the first method, on the same rows
    one_class: int = 0  # number of seeds whose adapter predicts one class for every row, though rows are of several

    @property
    def factor(self) -> float | None:
        """What multiplies the update, in one unit: LoRA's alpha is divided by its rank (rsLoRA: by its root).

        None where a method has no such factor, or none that is known.
        """
        if self.scale is None:
            return None
        option, value = self.scale
        if option == "scaling":
            return value
        if not self.rank:
            return None
        return value / (math.sqrt(self.rank) if self.name.partition("/")[0] == "rslora" else self.rank)

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values[metric])

    def spread(self, metric: str) -> float | None:
        """Standard deviation over the seeds; see `spread`."""
        return spread(self.values[metric])


@dataclass(frozen=True)
class Comparison:
    """The figures of a comparison; `comparison.json` is this."""

    name: str  # of the recipe
    task: str  # its task
    metric: str  # the main one, which chose the best epochs
    metrics: tuple[str, ...]  # all of them
    split: str  # that they are measured on
    rows: int  # number in that split
    trained_on: int  # number of training rows
    # metric -> values of the model before training, by seed (a new head differs by seed)
    untrained: dict[str, tuple[float, ...]]
    untrained_tests: dict[str, dict[str, tuple[float, ...]]]  # further test set -> the same
    entries: tuple[Entry, ...]  # the methods, in the order of `--methods`
    device: str  # of the first run
    precision: str  # of the first run
    versions: dict[str, str]  # of the packages of the first run
    setting: dict[str, Any]  # options of the comparison: budget, seeds, tuning
    failed: dict[str, str]  # run, or method all of whose trials failed -> the reason

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """From the values of `to_dict`."""
        entries = tuple(
            Entry(**{**entry, "test": None if entry["test"] is None else Paired(**entry["test"])})
            for entry in values["entries"]
        )
        return cls(**{**values, "entries": entries})


def is_comparison(folder: Path) -> bool:
    """Whether a folder is one that `lily compare` wrote, not a sweep, which has runs too."""
    return (folder / "runs").is_dir() and not any((folder / name).exists() for name in OTHERS)


def read(folder: Path, setting: dict[str, Any] | None = None, failed: dict[str, str] | None = None) -> Comparison:
    """The comparison whose runs a folder holds, from their `metrics.json` and `predictions.json` alone.

    Args:
        folder: that `lily compare` wrote for one recipe.
        setting: options of the comparison; default: those in `comparison.json`, if it exists.
        failed: failures; default: those in `comparison.json`.

    Raises:
        LilyError: if it holds no finished run, or runs on different recipes or rows.
    """
    runs = sorted((p.parent for p in (folder / "runs").glob(f"*/*/{METRICS}")), key=lambda p: (len(p.name), p.name))
    file = folder / "comparison.json"
    kept = json_object(file) if file.is_file() else {}
    setting = kept.get("setting", {}) if setting is None else setting
    failed = kept.get("failed", {}) if failed is None else failed
    methods, seeds = setting.get("methods"), setting.get("seeds")
    if methods is not None:  # the folder may hold other methods, of an earlier command
        compared = {folder_of(name) for name in methods if name not in failed}
        runs = [r for r in runs if r.parent.name in compared and int(r.name) in (seeds or [int(r.name)])]
    if not runs:
        raise LilyError(f"{folder} holds no finished run of a comparison")
    figures_of = {run: json_object(run / METRICS) for run in runs}
    try:
        return _comparison(figures_of, setting, failed, folder)
    except LilyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LilyError(
            f"{folder}: its runs are not what `lily train` writes ({type(error).__name__}: {error}); start over with "
            "--overwrite"
        ) from None


def _comparison(
    figures_of: dict[Path, dict[str, Any]], setting: dict[str, Any], failed: dict[str, str], folder: Path
) -> Comparison:
    whose: dict[str, list[Path]] = {}
    for run in figures_of:
        whose.setdefault(run.parent.name, []).append(run)
    order = [folder_of(name) for name in setting.get("methods", [])]
    names = sorted(whose, key=lambda n: (order.index(n) if n in order else len(order), n))
    one = figures_of[whose[names[0]][0]]
    about = [(f["name"], f["metric"], f["split"], f["rows"][f["split"]]) for f in figures_of.values()]
    if len(set(about)) > 1:
        raise LilyError(f"{folder} holds runs of different recipes or rows: {', '.join(map(str, sorted(set(about))))}")
    listed = dict(zip(order, setting.get("methods", []), strict=True))
    entries: list[Entry] = []
    items: dict[str, dict[int, Items]] = {}
    for name in names:
        figures = [figures_of[run] for run in whose[name]]
        entry = _entry(listed.get(name, name.replace("-over-", "/").replace("lily-", "lily:", 1)), figures)
        items[name] = {f["seed"]: _items(run) for run, f in zip(whose[name], figures, strict=True)}
        entries.append(_tested(entry, items[name], entries[0], items[names[0]], one["metric"]) if entries else entry)
    return Comparison(
        name=one["name"],
        task=one["task"],
        metric=one["metric"],
        metrics=tuple(one["final"]),
        split=one["split"],
        rows=one["rows"][one["split"]],
        trained_on=one["rows"]["train"],
        untrained=_values([figures_of[run]["before"] for run in whose[names[0]]]),
        untrained_tests=_tests([figures_of[run] for run in whose[names[0]]], "before"),
        entries=tuple(entries),
        device=one["device"],
        precision=one["precision"],
        versions=one["versions"],
        setting=setting,
        failed=failed,
    )


def _entry(name: str, figures: Sequence[dict[str, Any]]) -> Entry:
    one = figures[0]
    adapter, parameters = one["adapter"], one["parameters"]
    scale = next(((key, float(adapter[key])) for key in SCALES if adapter.get(key) is not None), None)
    return Entry(
        name=name,
        title=title_of(name, adapter),
        seeds=tuple(int(f["seed"]) for f in figures),
        values=_values([f["final"] for f in figures]),
        tests=_tests(figures, "final"),
        last=tuple(f["last"]["value"] for f in figures if f.get("last")),
        best=tuple(f["best"]["value"] for f in figures if f.get("best")),
        history=_history(figures),
        forgetting=tuple(f["forgetting"]["increase"] for f in figures if f.get("forgetting")),
        rank=adapter.get("r") or None,
        parameters=int(parameters["adapter"] or (parameters["head"] if name == "none" else 0)),
        learning_rate=float(adapter["learning_rate"]),
        scale=scale,
        seconds=statistics.fmean(f["seconds"].get("train", 0.0) for f in figures),
        peak_bytes=max(float(f.get("peak_bytes", 0)) for f in figures),
        adapter_bytes=float(one["adapter_bytes"]),
        one_class=sum(_predicts_one_class(f) for f in figures),
    )


def _predicts_one_class(figures: dict[str, Any]) -> bool:
    classes = (figures.get("review") or {}).get("classes") or {}
    return only_class([ClassScore(**score) for score in classes.get("scores", [])]) is not None


def _tests(figures: Sequence[dict[str, Any]], when: str) -> dict[str, dict[str, tuple[float, ...]]]:
    return {test: _values([f["tests"][test][when] for f in figures]) for test in figures[0].get("tests") or {}}


def _history(figures: Sequence[dict[str, Any]]) -> tuple[tuple[float, float], ...]:
    """The main metric over training, at the steps that every seed has."""
    curves = [{h["step"]: h[f["metric"]] for h in f.get("history") or []} for f in figures]
    steps = sorted(set.intersection(*map(set, curves)))
    return tuple((float(step), statistics.fmean(curve[step] for curve in curves)) for step in steps)


def folder_of(name: str) -> str:
    """Name of the folder of a method's runs."""
    return name.replace(":", "-").replace("/", "-over-")


def title_of(name: str, adapter: dict[str, Any]) -> str:
    """A method's name in tables."""
    whole, _, divisor = name.partition("/")
    if whole.partition(":")[0] == "lily":
        title = lily_title(adapter)
    else:
        title = TITLES.get(whole, str(adapter.get("peft_type", whole)))
    return f"{title}, 1/{divisor}" if divisor else title


def _values(by_seed: Sequence[dict[str, float]]) -> dict[str, tuple[float, ...]]:
    return {metric: tuple(float(values[metric]) for values in by_seed) for metric in by_seed[0]}


def _tested(entry: Entry, mine: dict[int, Items], reference: Entry, theirs: dict[int, Items], metric: str) -> Entry:
    """The entry with its test against the reference, on the seeds that both have."""
    seeds = [seed for seed in entry.seeds if seed in reference.seeds]
    if not seeds:
        return entry
    test = compare(cast(Metric, metric), [mine[s] for s in seeds], [theirs[s] for s in seeds])
    return replace(entry, test=test)


def _items(run: Path) -> Items:
    file = run / PREDICTIONS
    return cast(Items, json_object(file).get("items", {})) if file.is_file() else {}
