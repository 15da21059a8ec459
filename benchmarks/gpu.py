"""What needs a GPU, by one command, within ten minutes and without a network. Run again, it goes on where it stopped.

    make gpu                                        # every part that is not done
    python benchmarks/gpu.py tests map              # single parts
    python benchmarks/gpu.py prepare                # before, where there is a network: the model and texts of `map`
    python benchmarks/gpu.py --smoke                # all parts on a CPU with tiny models: do they run? No figures

Parts:
    tests        the tests that need a GPU
    performance  every setting of `benchmarks/performance.py --device cuda`, each in a separate process
    map          `benchmarks/gpu_map.py`: loss at equal parameters on the packaged causal model, at full batches

Files go to benchmarks/results/DEVICE/: one for each setting, tests.json and map.json. What does not fit into the time
is left out, and listed. The package need not be installed, only what it imports.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PARTS = ("tests", "performance", "map")
NEEDED = ("torch", "peft", "safetensors", "transformers", "accelerate", "pytest")
SECONDS = 570  # a call may have ten minutes, and the machine ends it then
SMOKE_SECONDS = 1800  # it needs one minute of a core, and a busy machine is no failure
MARGIN = 30  # seconds that the map has for reading its model and for its last run
# Setting -> the least seconds that make it worth starting, and the most it may take.
TIMES = {"tests": (30, 150), "llama-1b": (60, 240), "vit-b": (30, 120), "llama-3b": (90, 300), "map": (90, SECONDS)}
OTHER = (60, 240)
# At most this many times LoRA's, at equal parameters and targets, in bfloat16; rounded to two digits as on the pages.
GOALS = {"step": 1.00, "memory": 1.00, "decode": 1.05}


@dataclass(frozen=True)
class Job:
    """One process."""

    part: str
    name: str
    file: Path  # its result
    command: Callable[[int], list[str]]  # of the seconds it has
    least: int  # seconds; with fewer it is not started
    most: int  # seconds; then it is ended

    @property
    def done(self) -> bool:
        """Whether its file is complete."""
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads(self.file.read_text("utf-8")).get("done", True))
        return False


@dataclass
class Outcome:
    """What became of the jobs, by name."""

    done: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)  # done by an earlier call
    failed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # name -> why


def jobs(parts: Sequence[str], out: Path, folder: Path, settings: Iterable[str], smoke: bool, again: bool) -> list[Job]:
    """The processes of the parts, in the order of `PARTS`.

    Args:
        parts: some of `PARTS`.
        out: folder of all devices.
        folder: folder of this device.
        settings: of `performance`.
        smoke: tiny models on the CPU; all settings are one job then, which saves importing PyTorch.
        again: whether the map drops its rows.
    """
    found = []
    if "tests" in parts:
        found.append(_job("tests", "tests", folder, lambda _: _pytest(folder)))
    if "performance" in parts:
        script, where = str(BENCHMARKS / "performance.py"), ["--out", str(out)]
        if smoke:
            command = [sys.executable, script, "--smoke", *where]
            found.append(_job("performance", list(settings)[-1], folder, lambda _: command))
        else:
            for name in sorted(settings, key=lambda name: TIMES.get(name, OTHER)[1]):
                command = [sys.executable, script, "--device", "cuda", "--only", name, *where]
                found.append(_job("performance", name, folder, lambda _, command=command: command))
    if "map" in parts:
        options = [*(["--smoke"] if smoke else []), *(["--again"] if again else [])]
        found.append(_job("map", "map", folder, lambda seconds: _map(folder, seconds, options)))
    return [replace(job, least=0, most=SMOKE_SECONDS) for job in found] if smoke else found


def _job(part: str, name: str, folder: Path, command: Callable[[int], list[str]]) -> Job:
    return Job(part, name, folder / f"{name}.json", command, *TIMES.get(name, OTHER))


def _map(folder: Path, seconds: int, options: list[str]) -> list[str]:
    script = [sys.executable, str(BENCHMARKS / "gpu_map.py"), "--out", str(folder / "map.json")]
    return [*script, "--seconds", str(max(1, seconds - MARGIN)), *options]


def _pytest(folder: Path) -> list[str]:
    """Without conftest.py, which imports what only recipes need."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    return [*command, f"--junitxml={folder / 'tests.xml'}", *map(str, cuda_tests())]


def cuda_tests() -> list[Path]:
    """The files with tests that need a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "\nfrom on_cuda import" in file.read_text("utf-8")]


def run(
    found: Sequence[Job],
    seconds: float,
    again: bool = False,
    launch: Callable[[list[str], float], int | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Outcome:
    """Run the jobs one after another within the time.

    Args:
        found: the jobs.
        seconds: that all of them have.
        again: whether jobs that are done run again.
        launch: runs a command for at most so long; returns its exit status, or None if it was ended.
        clock: seconds from some moment.
        say: prints a line.
    """
    outcome, end = Outcome(), clock() + seconds
    for job in found:
        left = end - clock()
        if job.done and not again:
            outcome.before.append(job.name)
        elif left < job.least:
            outcome.left_out[job.name] = f"needs {job.least} s, {max(0, left):.0f} s are left"
        else:
            limit = int(min(left, job.most))
            say(f"\n--- {job.part}: {job.name} (at most {limit} s)")
            started = clock()
            status = (launch or start)(job.command(limit), limit)
            if job.part == "tests":
                record_tests(job.file, status)
            if status is None:
                outcome.left_out[job.name] = f"ended after {limit} s"
            elif status == 0 and job.done:
                outcome.done.append(job.name)
            elif status == 0:
                outcome.left_out[job.name] = f"not complete after {clock() - started:.0f} s; run again to go on"
            else:
                outcome.failed.append(job.name)
    return outcome


def start(command: list[str], seconds: float) -> int | None:
    """Run a command in the checkout, and end it and what it started after some seconds."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def record_tests(file: Path, status: int | None) -> None:
    """tests.json from what pytest wrote; done if none failed."""
    xml = file.with_suffix(".xml")
    if not xml.is_file():
        return
    suites = list(ET.parse(xml).getroot().iter("testsuite"))
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    cases = [case for suite in suites for case in suite.iter("testcase")]
    broken = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    result = {
        "done": status == 0 and count["tests"] > 0,
        "passed": count["tests"] - count["failures"] - count["errors"] - count["skipped"],
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in broken],
        "skipped": count["skipped"],
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites), 1),
        "versions": {name: importlib.metadata.version(name) for name in NEEDED},
    }
    file.write_text(json.dumps(result, indent=1), "utf-8")
    xml.unlink()


# --- what the figures say -------------------------------------------------------------------------------------------


def goals(folder: Path, settings: Iterable[str]) -> list[str]:
    """One line for each goal, setting and routing of Lily: met or not, with the ratio to LoRA."""
    from lily.bench.contestants import MERGED
    from lily.bench.report import Report

    lines = []
    for name in settings:
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        report = Report.read(file)
        for kind, goal in GOALS.items():
            for contestant, outcome in report.results.get(kind, {}).items():
                if contestant.startswith("Lily ") and contestant != MERGED:
                    met = "met" if round(outcome.ratio, 2) <= goal else "NOT met"
                    lines.append(f"{met}: {name}, {kind}, {contestant}: {outcome.ratio:.2f} (at most {goal:.2f})")
    return lines


# --- what must be there ---------------------------------------------------------------------------------------------


def requirements(text: str) -> dict[str, str]:
    """Package -> its requirement, from pyproject.toml; the first that names it counts."""
    declared = text[text.index("\ndependencies = [") : text.index("\n[tool.")]
    lists = re.findall(r"^\w+ = (\[\n.*?^\]|\[.*?\])$", declared, re.MULTILINE | re.DOTALL)
    every = [one for found in lists for one in ast.literal_eval(found) if isinstance(one, str)]
    named = ((re.match(r"[\w-]+", one), one) for one in every)
    return {match[0]: one for match, one in reversed([*named]) if match}


def lacking(
    names: Iterable[str], wanted: dict[str, str], version: Callable[[str], str] = importlib.metadata.version
) -> tuple[list[str], list[str]]:
    """Requirements that are not installed, and those of which another version is."""
    absent, other = [], []
    for name in names:
        try:
            found = version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(wanted[name])
            continue
        from packaging.requirements import Requirement

        if not Requirement(wanted[name]).specifier.contains(found, prereleases=True):
            other.append(f"{name} {found}, expected {wanted[name]}")
    return absent, other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all), or prepare")
    parser.add_argument("--seconds", type=float, help=f"that all parts have together ({SECONDS})")
    parser.add_argument("--again", action="store_true", help="repeat parts that are done")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with tiny models")
    parser.add_argument("--out", type=Path, help="folder of the results of all devices")
    o = parser.parse_args()
    if unknown := sorted({*o.parts} - {*PARTS, "prepare"}):
        parser.error(f"{unknown[0]!r} is no part; choose from {', '.join(PARTS)}, prepare")
    if "prepare" in o.parts:
        if o.parts != ["prepare"]:
            parser.error("prepare runs alone: the other parts run on the GPU, where nothing can be downloaded")
        return start([sys.executable, str(BENCHMARKS / "gpu_map.py"), "--prepare"], 3600) or 0
    began = time.monotonic()
    absent, other = lacking(NEEDED, requirements((ROOT / "pyproject.toml").read_text("utf-8")))
    if absent:
        print(f"missing: {', '.join(absent)}; install them, from wheels where there is no network", file=sys.stderr)
        return 2
    for line in other:
        print(f"warning: not tested with {line}", file=sys.stderr)
    sys.path[:0] = [str(ROOT / "src"), str(BENCHMARKS)]
    import performance
    import torch

    if not (o.smoke or torch.cuda.is_available()):
        print("no GPU: torch.cuda.is_available() is False; --smoke runs everything on the CPU", file=sys.stderr)
        return 2
    from lily.bench import report

    out = o.out or (ROOT / "runs" / "gpu-smoke" if o.smoke else performance.RESULTS)
    device: Any = torch.device("cpu" if o.smoke else "cuda")
    folder = out.resolve() / performance.slug(report.machine(device)["device"])
    folder.mkdir(parents=True, exist_ok=True)
    again = o.again or o.smoke
    found = jobs(o.parts or PARTS, out.resolve(), folder, performance.CUDA, o.smoke, again)
    seconds = o.seconds or (SMOKE_SECONDS if o.smoke else SECONDS)
    outcome = run(found, seconds - (time.monotonic() - began), again)
    lines = goals(folder, performance.CUDA)
    print(f"\n{folder}")
    if o.smoke:
        print(f"{len(lines)} ratios; tiny models on a CPU, so they say nothing")
    else:
        print("\n".join(lines))
    for title, names in (("done", outcome.done), ("done before", outcome.before), ("FAILED", outcome.failed)):
        if names:
            print(f"{title}: {', '.join(names)}")
    for name, why in outcome.left_out.items():
        print(f"left out: {name}: {why}")
    return 1 if outcome.failed or (o.smoke and outcome.left_out) else 0


if __name__ == "__main__":
    raise SystemExit(main())
