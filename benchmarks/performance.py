"""The performance figures of README and docs/performance.md: measured, kept as JSON, written into the pages.

    python benchmarks/performance.py                 # everything (20 minutes on 2 cores); needs a quiet machine
    python benchmarks/performance.py --only llama    # one setting
    python benchmarks/performance.py --pages         # the pages' tables again, from the files; measures nothing

Files go to benchmarks/results/DEVICE/SETTING.json, one folder per device. `lily bench` measures any other setting.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lily.bench import report as reports
from lily.bench import subjects
from lily.bench.contestants import STRUCTURES
from lily.bench.report import Report
from lily.bench.subjects import Shape
from lily.io.tables import markdown
from lily.kernels import matmul

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "figures" / "performance.svg"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
SHORT = ("LoRA", "stock Lily", "Lily token", "Lily sequence")


@dataclass(frozen=True)
class Setting:
    """One report: a base model, Lily's options, what is measured.

    The rank is the paper's for models of this width (32), with `num_A = num_B = 2`, what `lily plan` chooses for 12
    layers; LoRA of as many parameters has rank 5.
    """

    shape: Shape
    kinds: Sequence[str]
    options: dict[str, Any] = field(default_factory=lambda: {"r": 32, "num_A": 2, "num_B": 2})
    names: Sequence[str] = reports.NAMES
    model: str = "llama"
    rounds: int = 9
    onednn: bool = True


CPU = {
    "llama": Setting(Shape(768, 12, 4, 128), ("step", "memory", "prefill", "decode", "files")),
    "vit": Setting(Shape(384, 12, 8), ("step", "memory", "prefill"), model="vit"),
    "llama-pytorch-products": Setting(Shape(768, 12, 4, 128), ("step",), names=SHORT, rounds=7, onednn=False),
    "structures": Setting(
        Shape(768, 12, 4, 128), ("step", "memory"), names=("LoRA", *STRUCTURES), rounds=7, onednn=False
    ),
    "rank-16": Setting(Shape(768, 12, 4, 128), ("step",), {"r": 16, "num_A": 2, "num_B": 2}, SHORT, rounds=3),
    "rank-64": Setting(Shape(768, 12, 4, 128), ("step",), {"r": 64, "num_A": 2, "num_B": 2}, SHORT, rounds=3),
    "rank-128": Setting(Shape(768, 12, 4, 128), ("step",), {"r": 128, "num_A": 2, "num_B": 2}, SHORT, rounds=3),
    "experts-4": Setting(Shape(768, 12, 4, 128), ("step",), {"r": 32, "num_A": 4, "num_B": 4}, SHORT, rounds=3),
    "width-1536": Setting(Shape(1536, 6, 4, 128), ("step",), {"r": 64, "num_A": 2, "num_B": 2}, SHORT, rounds=3),
    "depth-24": Setting(Shape(768, 24, 2, 128), ("step",), names=SHORT, rounds=3),
    "tokens-512": Setting(Shape(768, 12, 1, 512), ("step",), names=SHORT, rounds=3),
    "batch-16": Setting(Shape(768, 12, 16, 32), ("step",), names=SHORT, rounds=3),
}
# For a GPU: the shapes of Llama-3.2-1B and -3B with the public comparison's ranks.
CUDA = {
    "llama-1b": Setting(
        Shape(2048, 16, 4, 1024), ("step", "memory", "prefill", "decode"), {"r": 64, "num_A": 2, "num_B": 2}
    ),
    "llama-3b": Setting(Shape(3072, 28, 4, 768), ("step", "memory", "decode"), {"r": 140, "num_A": 2, "num_B": 2}),
    "vit-b": Setting(Shape(768, 12, 64), ("step", "memory", "prefill"), model="vit"),
}
# The same measurements on models so small that they say nothing: does everything run?
SMOKE = {
    name: replace(setting, shape=Shape(64, 2, 2, 8), names=(*SHORT, reports.MERGED), rounds=1)
    for name, setting in CUDA.items()
}


def measure(setting: Setting, device: str) -> Report:
    """Measure one setting."""
    matmul.ONEDNN = setting.onednn and matmul.onednn_is_faster()
    build = {"llama": subjects.llama, "vit": subjects.vit}[setting.model]
    subject = build(setting.shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    return reports.run(subject, setting.options, setting.kinds, setting.rounds, setting.names)


def start_up() -> dict[str, Any]:
    """Seconds to adapt a 200-layer model on the meta device, and what `import lily` adds to `import peft`."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    import lily

    seconds = []
    for _ in range(3):
        config = LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=200,
            num_attention_heads=16,
            vocab_size=1000,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        begun = time.perf_counter()
        peft.get_peft_model(
            model,
            lily.LilyConfig(r=64, num_A=4, num_B=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            low_cpu_mem_usage=True,
        )
        seconds.append(time.perf_counter() - begun)
    adds = [_import_seconds("peft, lily") - _import_seconds("peft") for _ in range(5)]
    return {
        "inject_seconds": statistics.median(seconds),
        "adapted_layers": 200 * 7,
        "import_adds_seconds": statistics.median(adds),
        "machine": reports.machine(torch.device("cpu")),
    }


def _import_seconds(names: str) -> float:
    code = f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def slug(device: str) -> str:
    """A folder name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


# --- pages ----------------------------------------------------------------------------------------------------------


def tables(folder: Path) -> dict[str, str]:
    """Marker -> Markdown, from the files of one device."""
    files = {name: folder / f"{name}.json" for name in sorted({*CPU, *CUDA})}
    found = {name: Report.read(file) for name, file in files.items() if file.is_file()}
    out = {}
    for name, report in found.items():
        for kind in report.results:
            header = ["", "rank", "trained", reports.MEASURES[kind].title, *reports.HEADER[4:]]
            out[f"{name} {kind}"] = markdown(header, reports.rows(report, kind))
        if report.files:
            out[f"{name} files"] = markdown(["", "MB", "seconds to load"], reports.file_rows(report))
    if "llama" in found:
        out["summary"] = _summary(found)
        out["scaling"] = _scaling(found)
    if (folder / "start-up.json").is_file():
        values = json.loads((folder / "start-up.json").read_text())
        out["start-up"] = (
            f"Adapting {values['adapted_layers']:,} layers (200 blocks) on the meta device takes "
            f"{values['inject_seconds']:.2f} s; `import lily` adds {values['import_adds_seconds']:.2f} s to "
            "`import peft`."
        )
    return out


def _summary(found: dict[str, Report]) -> str:
    names = ("LoRA", "stock Lily", "Lily token", "Lily sequence", "Lily static")
    lines = []
    for name, kind, title in (
        ("llama", "step", "training step, Llama 768 x 12"),
        ("vit", "step", "training step, ViT-S"),
        ("llama", "memory", "training memory, Llama"),
        ("llama", "prefill", "prompt, Llama"),
        ("llama", "decode", "decoding a token, Llama"),
    ):
        if name in found and kind in found[name].results:
            got = found[name].results[kind]
            lines.append([title, *(f"{got[c].ratio:.2f}" if c in got else "" for c in names)])
    files = found["llama"].files
    if files:
        base = files["LoRA"]["bytes"]
        lines.append(["adapter file, Llama", *(f"{files[c]['bytes'] / base:.2f}" for c in names)])
    ranks = found["llama"].contestants
    lines.insert(0, ["rank", *(str(ranks[c]["rank"]) for c in names)])
    return markdown(["ratio to PEFT's LoRA of as many parameters", *names], lines)


def _scaling(found: dict[str, Report]) -> str:
    names = SHORT[1:]
    lines = []
    for name in CPU:
        if name in found and set(names) <= found[name].results.get("step", {}).keys():
            report = found[name]
            got = report.results["step"]
            s = report.setting
            shape = f"{report.subject}, {s['batch']} x {s['tokens']} tokens"
            ranks = f"{report.contestants['Lily token']['rank']} / {report.contestants['LoRA']['rank']}"
            lines.append([name, shape, f"{s['num_A']}, {s['num_B']}", ranks, *(f"{got[c].ratio:.2f}" for c in names)])
    return markdown(["setting", "model", "A, B", "rank: Lily / LoRA", *names], lines)


MARKED = re.compile(r"(<!-- figures: (.*?) -->\n)(.*?)\n?(<!-- end -->)", re.DOTALL)


def shown(page: Path) -> dict[str, str]:
    """Marker -> the table that the page contains now."""
    return {m[2]: m[3] for m in MARKED.finditer(page.read_text("utf-8"))}


def put(page: Path, marker: str, written: str) -> None:
    """Put a table between its markers; the page's other tables are unchanged."""
    text = page.read_text("utf-8")
    page.write_text(MARKED.sub(lambda m: f"{m[1]}{written}\n{m[4]}" if m[2] == marker else m[0], text), "utf-8")


def write_pages(folder: Path) -> list[Path]:
    """Put the tables between their markers; returns the pages that changed."""
    made, changed = tables(folder), []
    for page in PAGES:
        text = page.read_text("utf-8")
        new = MARKED.sub(lambda m: f"{m[1]}{made[m[2]]}\n{m[4]}" if m[2] in made else m[0], text)
        if new != text:
            page.write_text(new, "utf-8")
            changed.append(page)
    if (folder / "llama.json").is_file():  # the figure is of that setting
        FIGURE.parent.mkdir(exist_ok=True)
        reports.plot(Report.read(folder / "llama.json"), FIGURE)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="settings, or start-up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--smoke", action="store_true", help="the GPU's settings, tiny, on the CPU; needs another --out"
    )
    parser.add_argument("--pages", action="store_true", help="write the pages from the files, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    if o.smoke and o.out.resolve() == RESULTS.resolve():
        parser.error("--smoke measures nothing of use; give another --out")
    warnings.simplefilter("ignore")
    if o.smoke:
        o.device = "cpu"
    folder = o.out / slug(reports.machine(torch.device(o.device))["device"])
    if not o.pages:
        folder.mkdir(parents=True, exist_ok=True)
        for name, setting in (SMOKE if o.smoke else CUDA if o.device == "cuda" else CPU).items():
            if not o.only or name in o.only:
                found = measure(setting, o.device)
                found.write(folder / f"{name}.json")
                for kind in found.results:
                    print(f"\n{name}: {kind}\n{markdown(reports.HEADER, reports.rows(found, kind))}", flush=True)
        if "start-up" in o.only if o.only else not o.smoke:
            (folder / "start-up.json").write_text(json.dumps(start_up(), indent=1))
    if o.out == RESULTS and o.device == "cpu":
        print("pages written:", ", ".join(p.name for p in write_pages(folder)) or "none changed")


if __name__ == "__main__":
    main()
