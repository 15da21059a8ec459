"""What importing the package costs and pulls in, in fresh processes."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ["trl", "matplotlib", "sklearn", "datasets", "timm", "diffusers", "scipy", "pandas", "onnx", "gguf"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_lily_imports_nothing_heavy_beyond_what_peft_needs():
    code = "import sys, {}\nprint([m for m in " + str(HEAVY) + " if m in sys.modules])"
    assert run(code.format("lily")) == run(code.format("peft"))


def test_importing_lily_adds_itself_and_one_module_of_pefts_to_importing_peft():
    code = (
        "import sys\nimport peft\nbefore = set(sys.modules)\nimport lily\n"
        "print(sorted(m for m in set(sys.modules) - before if m.partition('.')[0] != 'lily'))"
    )
    assert run(code).strip() == "['peft.utils.hotswap']"
