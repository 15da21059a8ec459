"""Training several recipes at once, each in a separate process; the same command resumes after any interruption.

A run is a folder that `lily.recipes.train.train` writes: a finished one is read, an interrupted one is resumed from its
last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.io.words import counted
from lily.progress.display import read_events
from lily.progress.progress import Progress, current
from lily.recipes import loader, preflight
from lily.recipes.begun import as_begun
from lily.recipes.scoring.metrics import shown
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer.signals import Signals

METRICS, PREDICTIONS = "metrics.json", "predictions.json"
STAGE = "run"  # the one stage of a run in another process
# Keys that may differ between the recipe of a finished run and the recipe that counts it.
FREE = ("output", "description", "chosen_by", "baselines")
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str  # such as `lora/0`
    recipe: Recipe  # what to train
    folder: Path  # where to write it
    trial: bool = False  # whether it serves to choose settings, and so does not read the test rows
    # optimizer steps; it stops at the first evaluation from there on, and a later job resumes it. None: it is trained
    # to the end
    until: int | None = None

    @property
    def done(self) -> bool:
        """Whether its metrics, and the predictions of a run that is no trial, are there."""
        if self.until is not None and (self.folder / METRICS).is_file():
            history = json.loads((self.folder / METRICS).read_text("utf-8"))["history"]
            return bool(history) and history[-1]["step"] >= self.until
        return (self.folder / METRICS).is_file() and (self.trial or (self.folder / PREDICTIONS).is_file())

    def check(self, undecided: Sequence[str] = ()) -> None:
        """Refuse to resume or count a run of another recipe.

        Args:
            undecided: keys of the recipe whose values are still to be chosen.

        Raises:
            LilyError: names the keys that differ.
        """
        kept, free = self.folder / "recipe.yaml", (*FREE, *undecided)
        if not kept.is_file():
            return
        then = as_begun(loader.load_any(str(kept)), self.folder)
        if other := list(preflight.changes(then, self.recipe, free)):
            raise LilyError(
                f"{self.folder} was trained by another recipe: {'; '.join(other)}. Name another folder with --output, "
                "or start over with --overwrite"
            )


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    figures: dict[str, Any] | None  # its `metrics.json`; None: it failed
    error: str | None = None  # why it failed

    @property
    def validation(self) -> float | None:
        """Main metric on the validation rows, of the best adapter; None: it failed, or was never evaluated."""
        best = self.figures and self.figures["best"]
        return best["value"] if best else None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(jobs: int | None) -> tuple[int, int]:
    """(runs at the same time, threads per run). By default a run for every two cores, or one run on a GPU."""
    import torch

    count = jobs or (1 if torch.cuda.is_available() else max(1, cores() // 2))
    given = os.environ.get("OMP_NUM_THREADS", "")
    return count, int(given) if given.isdigit() and int(given) else max(1, cores() // count)


def run(jobs: Sequence[Job], out: Path, count: int, threads: int, lock: Any, announce: Announce) -> dict[str, Outcome]:
    """Train what is not finished yet.

    The evaluations of the runs and their share of the whole are shown by the command's progress.

    Args:
        jobs: all runs, in the order in which they start.
        out: the folder for their recipes and logs.
        count: runs at the same time.
        threads: CPU threads per run.
        lock: from `lily.search.folder.opened`.
        announce: called with a line for each run that ends; for finished ones at once.

    Returns:
        Name of each job -> how it ended. A run that fails does not stop the others.

    Raises:
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM, when every run has written its checkpoint and ended.
    """
    outcomes: dict[str, Outcome] = {}
    told = current()

    def ended(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        announce(f"[{len(outcomes)}/{len(jobs)}] {job.name}{described(job, outcome)}")

    for job in jobs:
        job.check()
    for job in jobs:
        if job.done:
            ended(job, _outcome(job))
    waiting = [job for job in jobs if job.name not in outcomes]
    told.announce(job.name for job in waiting)
    for job in waiting:
        told.expect(job.name, STAGE, {"run": 1.0})
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    followed = {job.name: Followed(job.name, _events(out, job)) for job in waiting}
    with Signals(), told.stage("", counted(len(waiting), "run")):
        try:
            while waiting or running:
                while waiting and len(running) < count:
                    job = waiting.pop(0)
                    running.append((job, _start(job, out, threads, lock)))
                time.sleep(0.05)
                for job, _ in running:
                    followed[job.name].show(told)
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    followed[job.name].show(told)
                    told.count(job.name, STAGE, 1.0 - followed[job.name].share, "run")
                    told.end(job.name)
                    ended(job, _outcome(job, process.returncode, _log(out, job)))
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()
    return outcomes


class Followed:
    """The progress of a run in another process, read from its file of events.

    Args:
        name: of the job.
        file: that the process writes.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file, self.position, self.share = name, file, 0, 0.0

    def show(self, told: Progress) -> None:
        """Show what is new."""
        events, self.position = read_events(self.file, self.position)
        for event in events:
            if "share" in event:
                told.count(self.name, STAGE, event["share"] - self.share, "run")
                self.share = event["share"]
            else:
                told.evaluated(self.name, event["what"], event["values"], event["best"])


def described(job: Job, outcome: Outcome) -> str:
    """How a run ended, as the rest of a line that begins with its name."""
    figures = outcome.figures
    if figures is None:
        return f" failed: {outcome.error}"
    metric, split = figures["metric"], "validation" if job.trial else figures["split"]
    steps = "" if job.until is None else f" after {job.until} steps"
    seconds = figures["seconds"].get("train", 0.0)
    return f": {metric} {shown(metric, figures['final'][metric])} on the {split} rows{steps}, {seconds:.0f} s"


def _start(job: Job, out: Path, threads: int, lock: Any) -> subprocess.Popen[bytes]:
    recipe, log = out / "recipes" / f"{_flat(job.name)}.yaml", _log(out, job)
    for parent in (recipe.parent, log.parent, job.folder.parent):
        parent.mkdir(parents=True, exist_ok=True)
    _events(out, job).unlink(missing_ok=True)
    write_text(recipe, loader.dump_recipe(job.recipe))
    # stock Lily's groups depend on the hash seed where a layer matches several targets
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "lily.search.worker", str(recipe), str(job.folder), str(os.getpid())]
    command += [str(_events(out, job))]
    command += ["trial"] * job.trial + ([] if job.until is None else [f"until={job.until}"])
    with open(log, "wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which terminates the runs once
            pass_fds=(lock.fileno(),) if os.name == "posix" else (),
        )


def _log(out: Path, job: Job) -> Path:
    return out / "logs" / f"{_flat(job.name)}.log"


def _events(out: Path, job: Job) -> Path:
    return out / "logs" / f"{_flat(job.name)}.events"


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _outcome(job: Job, code: int = 0, log: Path | None = None) -> Outcome:
    if code == 0 and job.done:
        return Outcome(json.loads((job.folder / METRICS).read_text("utf-8")))
    return Outcome(None, f"{_killed(code) or _last_line(log) or f'ended with exit code {code}'} (see {log})")


def _last_line(log: Path | None) -> str:
    lines = log.read_text("utf-8", errors="replace").split("\n") if log is not None else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "").removeprefix("error: ")


def _killed(code: int) -> str | None:
    """Which signal ended a process, which its log does not show; None: it ended by itself.

    Args:
        code: exit code; minus the signal, or 128 plus the signal where the process wrote its checkpoint first.
    """
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return None
    return f"killed by {name}" + (", often: out of memory" if name == "SIGKILL" else "")
