"""The explanations' figures, as benchmarks/results/ has them: `python docs/hooks/figures.py` writes them into pages.

The site takes them from the files whenever it is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "routing.md", ROOT / "docs" / "sharing.md", ROOT / "docs" / "tune.md")
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def routing() -> str:
    """What else a sample's output depends on, for a small random model."""
    found: dict[str, dict[str, float]] = _read("routing.json")["random"]
    measures = list(found["batch"])
    lines = []
    for name, values in found.items():
        shown = [f"{values[m]:.0%}" if m.startswith("cache") else f"{values[m]:.2g}" for m in measures]
        lines.append([name, *shown])
    return _table(["routing", *measures], lines)


def batches() -> str:
    """Predictions of a trained classifier for the same rows in other batches."""
    lines = []
    for run in _read("routing.json")["runs"]:
        for name, values in run["arrangements"].items():
            changed = f"{values['changed']} of {run['rows']:,}"
            lines.append([run["routing"], name, f"{values['accuracy']:.1%}", changed, f"{values['largest']:.4f}"])
    head = ["routing", "batches of 32 rows", "accuracy", "other predictions", "largest change of a probability"]
    return _table(head, lines)


def sharing() -> str:
    """Rank and overlap of Lily and of LoRA of equal size, on the quickstart."""
    found = _read("insight-quickstart.json")
    ranks = found["ranks"]
    sizes = {"Lily": found["parameters"]["adapter"], "LoRA": found["lora"]["parameters"]}
    lines = []
    for name, values in ranks.items():
        shown = [f"{values[key]:g}" for key in ("numerical_rank", "effective_rank")]
        overlaps = [f"{values[f'{what}_others']:.2f}" for what in ("rows", "columns")]
        lines.append([name, f"{sizes[name]:,}", *shown, *overlaps, f"{values['rows_by_chance']:.2f}"])
    head = ["", "parameters", "numerical rank", "effective rank", "read alike", "write alike", "by chance"]
    return _table(head, lines)


def granularity() -> str:
    """Quality of the shapes that one budget buys, and of LoRA, on the quickstart."""
    lines = []
    for entry in _read("granularity-quickstart.json")["entries"]:
        shape = "LoRA" if entry["name"] == "lora" else f"{entry['num_A']} A, {entry['num_B']} B"
        values = [100 * value for value in entry["held_out"]]
        lines.append([shape, str(entry["r"]), f"{fmean(values):.1f} ± {stdev(values):.1f}"])
    return _table(["shape", "rank", "accuracy"], lines)


FIGURES: dict[str, Callable[[], str]] = {
    "routing": routing,
    "batches": batches,
    "sharing": sharing,
    "granularity": granularity,
}


def filled(markdown: str) -> str:
    """A page with its figures as the files have them now; marks of other scripts are unchanged."""
    return MARKED.sub(lambda m: f"{m[1]}{FIGURES[m[2]]()}\n{m[4]}" if m[2] in FIGURES else m[0], markdown)


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text("utf-8"))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Write the figures into the pages."""
    for page in PAGES:
        text = page.read_text("utf-8")
        page.write_text(filled(text), "utf-8")


if __name__ == "__main__":
    main()
