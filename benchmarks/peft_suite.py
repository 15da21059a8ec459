"""PEFT's own tests with Lily in LoRA's place, and beside LoRA and the other methods. Writes and prints a table.

    git clone https://github.com/huggingface/peft
    python benchmarks/peft_suite.py --tests peft/tests      # an hour on one core; goes on where it stopped
    python benchmarks/peft_suite.py                         # the table of the committed figures

Each file of tests runs four times: `plain`, PEFT alone; `beside`, the same after `import lily`, which must change
nothing for any method; and with every `peft.LoraConfig` a `LilyConfig`, by `default` and with `static` routing. Of
these two, tests count that pass with LoRA. Every failure has a reason in `REASONS`; one without is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "peft-suite.json"
FILES = (
    "auto", "config", "custom_models", "initialization", "integrations", "lora_conversion", "lora_intruders",
    "lora_variants", "lorafa", "loraplus", "low_level_api", "mapping", "mixed", "other", "target_parameters",
    "torch_compile", "trainable_tokens", "tuners_utils", "vera", "shira", "adaption_prompt", "vision_models",
)  # fmt: skip
OURS = ("default", "static")
WAYS = ("plain", "beside", *OURS)

# A test's name, its error, and why it is so.
REASONS: list[tuple[str, str, str]] = [
    (r"\[LilyConfig-", "", "`peft.LilyConfig` is read as this package's configuration, which has more options"),
    ("layers_to_transform_validation|layer_indexing", "Regex pattern", "the same mistake is refused in other words"),
    ("test_lora_plus_embedding_lr", "Extra items", "the test lists LoRA's tensors; Lily has routers too"),
    ("test_lora_plus_helper", "6e-05 == 5e-05", "routers and static weights have a group of their own, at A's rate"),
    ("repeated_invocation", "NoTargetError", "a second `get_peft_model` adapts the base model, not the wrapper"),
]

Outcomes = dict[str, dict[str, str]]  # test -> outcome and error


def run(tests: Path, name: str, way: str, out: Path, limit: int) -> None:
    """Run one file of tests, unless its outcomes are there."""
    if out.exists():
        return
    part = out.with_suffix(".part")
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"test_{name}.py", "-q", "-p", "peft_suite_plugin", "-o", "addopts=",
               "-p", "no:cacheprovider", "-p", "no:randomly"]  # fmt: skip
    if way in OURS:
        command += ["-k", "lora or Lora or LORA"] if name in ("custom_models", "initialization") else []
    environment = {
        **os.environ, "PEFT_SUITE_AS": way, "PEFT_SUITE_OUT": str(part), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src"), str(tests.parent)]),
    }  # fmt: skip
    try:
        subprocess.run(command, cwd=tests, env=environment, timeout=limit, stdout=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}, {way}: not finished in {limit} s; what was reached counts", file=sys.stderr)
    if part.exists():
        part.rename(out)


def read(out: Path) -> Outcomes:
    """The outcomes of one file of tests; the worst of a test's phases."""
    found: Outcomes = {}
    for line in out.read_text("utf-8").splitlines() if out.exists() else ():
        row = json.loads(line)
        if row["outcome"] == "failed" or row["test"] not in found:
            found[row["test"]] = {"outcome": row["outcome"], "error": row["error"]}
    return found


def reason(test: str, error: str) -> str | None:
    """Why a test that LoRA passes fails with Lily, or None if no reason is known."""
    return next((why for name, text, why in REASONS if re.search(name, test) and re.search(text, error, re.S)), None)


def summary(folder: Path) -> dict[str, Any]:
    """The figures of all files, from the outcomes in a folder."""
    files: dict[str, Any] = {}
    why: dict[str, Counter[str]] = {way: Counter() for way in OURS}
    differ, unknown = [], []
    for name in FILES:
        plain = read(folder / f"{name}-plain.jsonl")
        passed = {test for test, row in plain.items() if row["outcome"] == "passed"}
        if not passed:
            continue
        files[name] = {"plain": len(passed)}
        beside = read(folder / f"{name}-beside.jsonl")
        differ += sorted(t for t in plain if t in beside and beside[t]["outcome"] != plain[t]["outcome"])
        files[name]["beside"] = sum(row["outcome"] == "passed" for row in beside.values())
        for way in OURS:
            found = {t: row for t, row in read(folder / f"{name}-{way}.jsonl").items() if t in passed}
            failed = {test: row["error"] for test, row in found.items() if row["outcome"] == "failed"}
            files[name][way] = {
                "passed": sum(row["outcome"] == "passed" for row in found.values()), "failed": len(failed),
            }  # fmt: skip
            for test, error in failed.items():
                if (known := reason(test, error)) is None:
                    unknown.append({"as": way, "test": test, "error": error})
                else:
                    why[way][known] += 1
    return {
        "files": files, "differ": differ, "unknown": unknown,
        "reasons": {way: dict(why[way].most_common()) for way in OURS},
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| tests | PEFT alone | after `import lily` | Lily, default | Lily, static |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = Counter[str]()
    for name, row in found["files"].items():
        cells = [f"{row[way]['passed']:,} of {sum(row[way].values()):,}" for way in OURS]
        lines.append(f"| `test_{name}.py` | {row['plain']:,} | {row['beside']:,} | {cells[0]} | {cells[1]} |")
        total.update({"plain": row["plain"], "beside": row["beside"]})
        for way in OURS:
            total.update({way: row[way]["passed"], f"{way} of": sum(row[way].values())})
    cells = [f"{total[way]:,} of {total[f'{way} of']:,}" for way in OURS]
    lines += [f"| all | {total['plain']:,} | {total['beside']:,} | {cells[0]} | {cells[1]} |", ""]
    lines += ["| why Lily does not pass it | default | static |", "| --- | --- | --- |"]
    reasons = found["reasons"]
    for why in dict.fromkeys([*reasons["default"], *reasons["static"]]):
        lines.append(f"| {why} | {reasons['default'].get(why, 0)} | {reasons['static'].get(why, 0)} |")
    lines += ["", f"Tests whose outcome `import lily` changes: {len(found['differ'])}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="the folder tests/ of a checkout of PEFT")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peft-suite", help="outcomes of single tests")
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES)
    parser.add_argument("--as", dest="ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one file")
    given = parser.parse_args()
    if given.tests is None:
        print(table(json.loads(FIGURES.read_text("utf-8"))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.files:
        for way in given.ways:
            run(given.tests.resolve(), name, way, given.out.resolve() / f"{name}-{way}.jsonl", given.limit)
    found = summary(given.out)
    for row in found["unknown"]:
        print(f"no reason: {row['as']} {row['test']}\n    {row['error'][:300]}", file=sys.stderr)
    FIGURES.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
