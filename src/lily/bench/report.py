"""Running the measurements; their report as a value, as JSON, as tables and as a plot."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lily._version import __version__
from lily.analysis.plots import Picture, new_figure
from lily.bench import measure
from lily.bench.contestants import FROZEN, LORA, MERGED, NAMES, STOCK, Contestant, contestants
from lily.bench.measure import Outcome
from lily.bench.subjects import Subject
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.kernels import matmul


@dataclass(frozen=True)
class Measure:
    """One kind of measurement."""

    title: str  # with its unit, for tables
    make: Callable[[Subject, Contestant], measure.Run]  # returns the function that measures a contestant
    without: tuple[str, ...]  # contestants that it does not apply to
    scale: float  # from the measured value to the title's unit
    rounds: int | None = None  # fixed number where the value hardly varies; None: the report's


MEASURES = {
    "step": Measure("training step, ms", measure.step_time, (MERGED,), 1e3),
    "memory": Measure("training memory at its peak, MB", measure.step_memory, (MERGED,), 1e-6, rounds=1),
    "prefill": Measure("forward without gradients, ms", measure.prefill_time, (), 1e3),
    "decode": Measure("decoding a token, ms", measure.decode_time, (), 1e3),
    "mixed": Measure("rows of two adapters and the base, ms", measure.mixed_time, (FROZEN, MERGED, STOCK), 1e3),
}


@dataclass
class Report:
    """The figures of one subject."""

    subject: str  # name of the base model
    setting: dict[str, Any]  # sizes, ranks, rounds
    machine: dict[str, Any]  # device, threads, versions
    contestants: dict[str, dict[str, int]] = field(default_factory=dict)  # name -> rank and trained parameters
    # measure -> contestant -> median and ratios to LoRA at equal parameters
    results: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    files: dict[str, dict[str, float]] = field(default_factory=dict)  # contestant -> bytes and seconds to load

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> Report:
        """A report that `write` wrote."""
        values = json.loads(path.read_text("utf-8"))
        results = {
            kind: {name: Outcome(**outcome) for name, outcome in found.items()}
            for kind, found in values.pop("results").items()
        }
        return cls(**values, results=results)

    def write(self, path: Path) -> None:
        """As JSON, atomically."""
        write_text(path, self.to_json())


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, that affect times."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "onednn_products": matmul.ONEDNN,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "peft")},
            "lily-peft": __version__,  # of a checkout too, that is not installed
        },
    }


def _cpu_name() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text("utf-8", errors="replace").splitlines() if known.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def run(
    subject: Subject,
    options: dict[str, Any],
    kinds: Sequence[str],
    rounds: int,
    names: Sequence[str] = NAMES,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure the contestants on one base model.

    Args:
        subject: the base model and its inputs.
        options: `r`, `num_A`, `num_B`, `scaling` of Lily.
        kinds: keys of `MEASURES`, and `files`.
        rounds: of each measurement that varies.
        names: contestants; LoRA, the reference of the ratios, is always added.
        say: called with the name of each measurement when it begins.

    Raises:
        LilyError: for an unknown measurement, or decoding with a model that does not generate.
    """
    if unknown := [kind for kind in kinds if kind not in (*MEASURES, "files")]:
        raise LilyError(f"--measure: {unknown[0]!r} is unknown; choose from {', '.join([*MEASURES, 'files'])}")
    if "decode" in kinds and subject.vocabulary is None:
        raise LilyError(f"{subject.name} does not generate, so it cannot decode; remove decode from --measure")
    chosen = [name for name in NAMES if name in names or name == LORA]
    made = {c.name: c for c in contestants(subject, options, [*chosen, *(n for n in names if n not in NAMES)])}
    setting = {
        **asdict(subject.shape),
        "dtype": str(next(subject.base.parameters()).dtype),
        "rounds": rounds,
        **options,
    }
    report = Report(subject.name, setting, machine(subject.device))
    report.contestants = {c.name: {"rank": c.rank, "parameters": c.parameters} for c in made.values()}
    for kind in kinds:
        say(kind)
        if kind == "files":
            report.files = measure.files(subject, list(made.values()), min(rounds, 3))
            continue
        how = MEASURES[kind]
        runs = {name: how.make(subject, c) for name, c in made.items() if name not in how.without}
        report.results[kind] = measure.interleave(runs, LORA, how.rounds or rounds)
    return report


def rows(report: Report, kind: str) -> list[list[str]]:
    """A table of one measurement: contestant, rank, parameters, median, ratio to LoRA, its spread, ratio to stock."""
    how, found = MEASURES[kind], report.results[kind]
    out = []
    for name, outcome in found.items():
        about = report.contestants[name]
        stock = ""
        if STOCK in found:
            pairs = zip(outcome.ratios, found[STOCK].ratios, strict=True)
            stock = f"{statistics.median(a / b for a, b in pairs):.2f}"
        spread = f"{min(outcome.ratios):.2f} to {max(outcome.ratios):.2f}" if len(outcome.ratios) > 1 else ""
        rank = str(about["rank"]) if about["rank"] else ""
        trained = f"{about['parameters']:,}" if about["parameters"] else ""
        out.append([name, rank, trained, f"{outcome.median * how.scale:.4g}", f"{outcome.ratio:.2f}", spread, stock])
    return out


HEADER = ["", "rank", "trained", "", "to LoRA", "spread", "to stock"]


def file_rows(report: Report) -> list[list[str]]:
    """The table of adapter files: contestant, size, seconds to load."""
    return [
        [name, f"{found['bytes'] / 1e6:.2f}", f"{found['load_seconds']:.2f}"] for name, found in report.files.items()
    ]


def plot(report: Report, path: Path) -> None:
    """Draw the ratios to LoRA, one panel per measurement, the spread as whiskers.

    Raises:
        LilyError: if matplotlib is not installed.
    """
    kinds = list(report.results)
    figure = new_figure(4.2 * len(kinds) + 1.6, 4)
    panels = figure.subplots(1, len(kinds), sharey=False, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        found = report.results[kind]
        middle = [o.ratio for o in found.values()]
        low, high = ([abs(f(o.ratios) - o.ratio) for o in found.values()] for f in (min, max))
        colors = ["#7a5195" if name.startswith("Lily") else "#b0b0b0" for name in found]
        panel.barh(list(found), middle, xerr=[low, high], color=colors, ecolor="#404040")
        panel.axvline(1, color="#202020", linewidth=1)
        panel.invert_yaxis()
        panel.set_title(MEASURES[kind].title.partition(",")[0])
        panel.set_xlabel("ratio to LoRA at equal parameters")
    figure.suptitle(f"{report.subject}, {report.machine['device']}")
    Picture(figure, "").save(path, overwrite=True)
