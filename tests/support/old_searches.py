"""Write the unfinished searches below tests/tune/fixtures and tests/compare/fixtures, with the `lily` that is imported.

    PYTHONPATH=OLD/src python tests/support/old_searches.py     (OLD: a checkout of commit b448574)

All but `finished` are interrupted half-way. Paths start with ROOT, which `unpacked` replaces; weights are left out.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from recipes_helpers import SPECIAL, WORDS, classification, rows, tokenizer, write_jsonl, write_recipe
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

ROOT = Path("/tmp/lily-unfinished-search")
LEFT_OUT = ("best", "last", "checkpoints", ".lock", "*.log", "*.html")
TESTS = Path(__file__).parents[1]
TUNE = ["tune", "recipe.yaml", "train.epochs=4", "train.batch_size=18", "--trials", "5", "--output", "tune"]
SWEEP = ["sweep", "recipe.yaml", "--grid", "--points", "4", "--halving", "--lora", "--jobs", "1", "--output", "sweep"]
COMPARE = ["compare", "recipe.yaml", "--methods", "lily,lora", "--seeds", "1", "--tune", "--jobs", "1"]
COMPARE += ["--threads", "1", "--output", "compare"]
FINISHED = ["compare", "recipe.yaml", "--methods", "lily,lora", "--seeds", "1", "--jobs", "1", "--output", "finished"]


def model_and_rows(folder: Path) -> str:
    """A tiny encoder, its rows and a recipe in a folder; the recipe's path."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(
        **sizes, num_attention_heads=4, vocab_size=len(WORDS) + len(SPECIAL), max_position_embeddings=64, pad_token_id=0
    )
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer(chat=False).save_pretrained(folder / "encoder")
    values = classification(folder / "encoder", write_jsonl(folder / "rows.jsonl", rows()), folder)
    values["lily"] = {"r": 16, "num_A": 2, "num_B": 2, "scaling": 4.0}
    values["train"]["epochs"] = 4
    del values["output"]
    return write_recipe(folder, values)


def unpacked(fixture: Path, folder: Path) -> None:
    """Copy a kept search, its model, its rows and its recipe into a folder, as if it had been begun there."""
    model_and_rows(folder)
    shutil.copytree(fixture, folder / fixture.name)
    for file in (folder / fixture.name).rglob("*"):
        if file.is_file():
            file.write_text(file.read_text("utf-8").replace(str(ROOT), str(folder)), "utf-8")


def failing_start(started: list[Any]) -> Any:
    """In place of `lily.search.runner._start`: notes the job, and starts a process that fails at once."""

    def start(job: Any, out: Path, threads: int, lock: Any) -> subprocess.Popen[bytes]:
        started.append(job)
        log = out / "logs" / f"{job.name.replace('/', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as file:
            return subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit('error: not now')"], stderr=file)

    return start


def interrupted_after(count: int, function: Any) -> Any:
    """The function, which raises KeyboardInterrupt after it has been called that often."""
    calls = iter(range(count))

    def called(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return called


def run(command: list[str]) -> None:
    from lily.cli import app

    print(*command, CliRunner().invoke(app, command).output[-2000:])


def main() -> None:
    from lily.compare import runner
    from lily.tune import study

    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    model_and_rows(ROOT)
    with contextlib.chdir(ROOT):
        watch = study.Going.watch
        study.Going.watch = interrupted_after(14, watch)  # type: ignore[method-assign]
        run(TUNE)  # three trials of four evaluations, and the beginning of a fourth
        for command, done in ((SWEEP, 5), (COMPARE, 5)):
            start = runner._start
            runner._start = interrupted_after(done, start)
            run(command)
            runner._start = start
        run(FINISHED)
    for name, kind in (("tune", "tune"), ("sweep", "tune"), ("compare", "compare"), ("finished", "compare")):
        to = TESTS / kind / "fixtures" / name
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns(*LEFT_OUT))


if __name__ == "__main__":
    main()
