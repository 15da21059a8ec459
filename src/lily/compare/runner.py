"""Running the grid: each run in a process of its own, several side by side, all of it resumable.

A run is a folder that `lily.recipes.train.train` writes. Whatever was finished stays; what was broken off goes on from
its last checkpoint; so the same command goes on after anything that ended it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lily.errors import LilyError
from lily.io.atomic import remove_folder, write_text
from lily.recipes import loader, preflight
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer.signals import Signals

METRICS, PREDICTIONS = "metrics.json", "predictions.json"
# What a comparison writes into its folder.
OWN = ("runs", "tuning", "recipes", "logs", "comparison.json", "comparison.md", "comparison.html", ".lock")
# What may differ between a run that is there and the one that is asked for.
FREE = ("output", "description", "baselines")
PATIENCE = 60.0  # seconds in which runs whose comparison was killed write their checkpoints


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: such as `lora/0`.
        recipe: what to train.
        folder: where.
        trial: whether it is there to choose settings: it leaves the test rows alone.
        until: stop at the first evaluation after so many steps; a later job goes on from there. None: at the end.
    """

    name: str
    recipe: Recipe
    folder: Path
    trial: bool = False
    until: int | None = None

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        if self.until is not None and (self.folder / METRICS).is_file():
            history = json.loads((self.folder / METRICS).read_text("utf-8"))["history"]
            return bool(history) and history[-1]["step"] >= self.until
        return (self.folder / METRICS).is_file() and (self.trial or (self.folder / PREDICTIONS).is_file())

    def check(self, undecided: Sequence[str] = ()) -> None:
        """Refuse to go on with, or to count, a run of another recipe.

        Args:
            undecided: keys of the recipe whose values are still to be chosen.

        Raises:
            LilyError: if there is one.
        """
        kept, free = self.folder / "recipe.yaml", (*FREE, *undecided)
        if kept.is_file() and (other := list(preflight.changes(loader.load_any(str(kept)), self.recipe, free))):
            raise LilyError(
                f"{self.folder} was trained by another recipe: {'; '.join(other)}. Name another folder with --output, "
                "or start anew with --overwrite"
            )


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        figures: its `metrics.json`; None: it failed.
        error: why it failed.
    """

    figures: dict[str, Any] | None
    error: str | None = None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(jobs: int | None) -> tuple[int, int]:
    """(runs at the same time, threads of each). By default a run for every two cores; one where there is a GPU."""
    import torch

    count = jobs or (1 if torch.cuda.is_available() else max(1, cores() // 2))
    given = os.environ.get("OMP_NUM_THREADS", "")
    return count, int(given) if given.isdigit() and int(given) else max(1, cores() // count)


def check_folder(folder: Path) -> list[str]:
    """What a comparison's folder holds; nothing, if it is not there.

    Raises:
        LilyError: if it holds anything that no comparison wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise LilyError(f"--output {folder} is a file; name a folder")
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in found if name not in OWN and not _is_leftover(name)]:
        raise LilyError(f"--output {folder} holds {foreign[0]}, which no comparison wrote; name another folder")
    return found


@contextlib.contextmanager
def opened(folder: Path, overwrite: bool) -> Iterator[Any]:
    """A comparison's folder, for this process alone; gives what its runs must hold on to.

    Raises:
        LilyError: if it holds anything that no comparison wrote, or another comparison is at work in it.
    """
    found = check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", encoding="utf-8") as lock:
        hold(lock, folder)
        for name in found:
            path = folder / name
            if name != ".lock" and (overwrite or _is_leftover(name)):
                remove_folder(path) if path.is_dir() else path.unlink()
        yield lock


def _is_leftover(name: str) -> bool:
    return any(name.startswith(f".{own}.") for own in OWN)


def hold(file: IO[str], folder: Path) -> None:
    """Lock a folder by an open file in it. Runs that outlived their parent hold it too, and stop within a step.

    Raises:
        LilyError: if it is held for longer than that takes.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > end:
                raise LilyError(f"another process is at work in {folder}; wait for it, or end it") from None
            time.sleep(0.2)


def run(
    jobs: Sequence[Job], out: Path, count: int, threads: int, lock: Any, told: Callable[[Job, Outcome], None]
) -> dict[str, Outcome]:
    """Do what is not done yet.

    Args:
        jobs: all runs, in the order in which they begin.
        out: the comparison's folder.
        count: runs at the same time.
        threads: of each.
        lock: from `opened`.
        told: called with each run as it ends, those that were there at once.

    Returns:
        Run -> what became of it, one that failed too: the others go on.

    Raises:
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM, when every run has written its checkpoint and ended.
    """
    outcomes: dict[str, Outcome] = {}

    def ended(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        told(job, outcome)

    for job in jobs:
        job.check()
    waiting = []
    for job in jobs:
        if job.done:
            ended(job, _outcome(job))
        else:
            waiting.append(job)
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    with Signals():
        try:
            while waiting or running:
                while waiting and len(running) < count:
                    job = waiting.pop(0)
                    running.append((job, _start(job, out, threads, lock)))
                time.sleep(0.05)
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    ended(job, _outcome(job, process.returncode, _log(out, job)))
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()
    return outcomes


def _start(job: Job, out: Path, threads: int, lock: Any) -> subprocess.Popen[bytes]:
    recipe, log = out / "recipes" / f"{_flat(job.name)}.yaml", _log(out, job)
    for parent in (recipe.parent, log.parent, job.folder.parent):
        parent.mkdir(parents=True, exist_ok=True)
    write_text(recipe, loader.dump_recipe(job.recipe))
    # stock Lily's groups depend on the hash seed where a layer matches several targets
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "lily.compare.worker", str(recipe), str(job.folder), str(os.getpid())]
    command += ["trial"] * job.trial + ([] if job.until is None else [f"until={job.until}"])
    with open(log, "wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us, who tell them once
            pass_fds=(lock.fileno(),) if os.name == "posix" else (),
        )


def _log(out: Path, job: Job) -> Path:
    return out / "logs" / f"{_flat(job.name)}.log"


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _outcome(job: Job, code: int = 0, log: Path | None = None) -> Outcome:
    if code == 0 and job.done:
        found: dict[str, Any] = json.loads((job.folder / METRICS).read_text("utf-8"))
        return Outcome(found)
    return Outcome(None, f"{_killed(code) or _last_line(log) or f'ended with exit code {code}'} (see {log})")


def _last_line(log: Path | None) -> str:
    lines = log.read_text("utf-8", errors="replace").split("\n") if log is not None else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "").removeprefix("error: ")


def _killed(code: int) -> str | None:
    """Which signal ended a process, whose log cannot tell; None: it ended by itself.

    Args:
        code: minus the signal; or 128 and the signal, where the process wrote its checkpoint first.
    """
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return None
    return f"killed by {name}" + (", often: out of memory" if name == "SIGKILL" else "")
