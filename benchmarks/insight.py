r"""What a run of `lily train` with a LoRA beside it shows of rank, sharing and routing. Prints Markdown, writes JSON.

    lily train quickstart-routed
    python benchmarks/insight.py runs/quickstart-routed-lily-0 --out benchmarks/results/insight-quickstart.json \
        --figures docs/figures/quickstart

Of two runs that `benchmarks/scaling.py` leaves, which have no LoRA beside them:

    python benchmarks/insight.py runs/scaling/sst2/runs/lily-rate0.001-scale4-seed0 \
        --lora runs/scaling/sst2/runs/lora-rate0.001-scale4-seed0/best --figures docs/figures/sst2 \
        --out benchmarks/results/insight-sst2.json

`--figures` also draws the paper's Fig. 3 (NAME-rank.svg) and Fig. 4 (NAME-routers.svg) of this run. The JSON has no
times, and rounds numbers, so that a repetition differs by what training differs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from lily.analysis.plots import rank_plot, router_plot
from lily.analysis.rank import RankReport
from lily.analysis.sentences import most_by_label
from lily.insight.gather import Insight, insight
from lily.io.atomic import write_text

RANKS = ("numerical_rank", "effective_rank", "stable_rank")


def ranks(report: RankReport) -> dict[str, Any]:
    overlaps = {
        f"{what}_{name}": mean(values)
        for what in ("rows", "columns")
        for name, sharing in (("sharing", True), ("others", False))
        if (values := [v for o in report.overlaps if (v := o.mean(what, sharing)) is not None])
    }
    overlaps |= {
        f"{what}_by_chance": mean(getattr(o, f"{what}_by_chance") for o in report.overlaps)
        for what in ("rows", "columns")
    }
    return {
        **{name: report.median(name) for name in RANKS},
        "union_numerical_rank": report.median(union=True),
        "varying": mean(layer.varying for layer in report.layers),
        "layers": {
            layer.name: [layer.expected.numerical_rank(report.threshold), round(layer.expected.effective_rank, 2)]
            for layer in report.layers
        },
        **overlaps,
    }


def classes(told: Insight) -> list[dict[str, Any]]:
    assert told.routing is not None
    return [
        {"layer": layer.name, "weights": layer.labels, **asdict(layer.variance)}
        for layer in most_by_label(told.routing.layers)
        if layer.variance is not None
    ]


def rounding(text: str) -> float:
    """Round everything but counts to four digits."""
    value = float(text)
    return int(value) if value.is_integer() else float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="A run's folder.")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lora", help="Folder of a LoRA of equal size, where the run has none beside it.")
    parser.add_argument("--figures", type=Path, help="Where figures go, without an ending.")
    options = parser.parse_args()
    told = insight(options.run, rows=options.rows)
    lora = insight(options.lora).rank if options.lora else told.lora
    if told.rank is None or lora is None or told.run is None or told.routing is None:
        raise SystemExit(f"{options.run} has no LoRA beside it, or cannot be read: {'; '.join(told.notes)}")
    found = {
        "recipe": told.run.name,
        "seed": told.run.seed,
        "threshold": told.rank.threshold,
        "samples": told.routing.samples,
        "final": told.run.final,
        "parameters": told.run.parameters,
        "lora": {**told.run.baselines.get("lora", {}), "seconds": None},
        "ranks": {"Lily": ranks(told.rank), "LoRA": ranks(lora)},
        "layers": len(told.routing.layers),
        "classes": classes(told),
    }
    rounded = json.loads(json.dumps(found), parse_float=rounding)
    print("| | numerical rank | effective rank | stable rank | union over tokens |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in rounded["ranks"].items():
        cells = [f"{values[key]:g}" for key in (*RANKS, "union_numerical_rank")]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| layer | mean weights by class | of the variance | by chance | p |")
    print("| --- | --- | --- | --- | --- |")
    for c in rounded["classes"][:6]:
        said = "; ".join(f"{k}: {' '.join(f'{w:.2f}' for w in v)}" for k, v in sorted(c["weights"].items()))
        shares = [f"{c[key] / c['total']:.1%}" for key in ("label", "label_by_chance")]
        print(f"| {c['layer']} | {said} | {' | '.join(shares)} | {c['p_value']:g} |")
    print(f"\n{len(rounded['classes'])} of {rounded['layers']} layers beyond chance (p < 0.05 each)")
    if options.out is not None:
        write_text(options.out, json.dumps(rounded, indent=1))
    if options.figures is not None:
        for name, picture in (("rank", rank_plot(told.rank, lora)), ("routers", router_plot(told.routing))):
            picture.save(options.figures.with_name(f"{options.figures.name}-{name}.svg"), overwrite=True)
            print(f"\n{name}: {picture.alt}")


if __name__ == "__main__":
    main()
