"""How long answers take that need no model: the time of `lily`'s process, best of several.

    python benchmarks/startup.py

`tests/cli/test_startup.py` holds that these import neither torch nor what takes as long.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

COMMANDS = (
    ["--help"], ["--version"], ["trian", "quickstart"], ["recipes"], ["schema"], ["train", "quickstar"],
    ["train", "quickstart", "lily.rr=1"], ["plan", "quickstart", "lily.rr=1"], ["compare", "quickstart", "lily.rr=1"],
    ["tune", "quickstart", "lily.rr=1"], ["eval", "no-such-run"],
)  # fmt: skip


def seconds(command: list[str]) -> float:
    """Wall-clock time of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lily", *command], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("| command | seconds |\n| --- | --- |")
    for command in COMMANDS:
        print(f"| `lily {' '.join(command)}` | {min(seconds(command) for _ in range(repeats)):.2f} |", flush=True)


if __name__ == "__main__":
    main()
