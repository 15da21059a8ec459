"""Answers that need no model import neither torch nor what takes as long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "diffusers", "accelerate", "sklearn", "scipy", "optuna")
SCRIPT = """
import json, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in {heavy}:
            raise RuntimeError(f"imports {{name}}")

from lily.recipes import packages
found = packages.find_spec
packages.find_spec = lambda name: None if name == "trl" else True
sys.meta_path.insert(0, Refusing())

from typer.testing import CliRunner
from lily.cli.main import app

ends = []
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, command)
    ends.append([result.exit_code, result.output if result.exception is None else repr(result.exception)])
print(json.dumps(ends))
"""

# What is typed, and a part of the answer.
ANSWERS = [
    (["--help"], "low-rank adaptation that shares across layers"),
    (["--version"], "lily-peft "),
    (["trian", "quickstart"], "SystemExit"),
    (["train", "--help"], "Train a recipe"),
    (["recipes"], "quickstart"),
    (["recipes", "quickstart"], "learning_rate"),
    (["schema"], '"properties"'),
    (["train", "quickstar"], "did you mean quickstart or "),
    (["train", "quickstart", "lily.rr=1"], "lily.rr: unknown key"),
    (["train", "quickstart", "train.epochs=-1"], "train.epochs"),
    (["plan", "quickstart", "lily.rr=1"], "lily.rr: unknown key"),
    (["compare", "quickstart", "lily.rr=1"], "lily.rr: unknown key"),
    (["compare", "quickstar"], "did you mean quickstart or "),
    (["tune", "quickstart", "lily.rr=1"], "lily.rr: unknown key"),
    (["sweep", "quickstart", "lily.rr=1"], "lily.rr: unknown key"),
    (["eval", "no-such-run"], "holds no adapter"),
    (["predict", "no-such-run", "--input", "-"], "holds no adapter"),
    (["generate", "no-such-run", "x"], "holds no adapter"),
    (["recipes", "--task", "sft"], "offline/gsm8k"),
    (["recipes", "headlines"], "quickstart"),
    (["train", "quickstart", "epochs=3"], "did you mean train.epochs?"),
    (["collapse", "no-such-run", "--out", "x"], "holds no adapter"),
    (["export", "no-such-run", "--to", "lora", "--out", "x"], "holds no adapter"),
    (["train", "chat"], "trl is not installed; pip install"),  # a missing extra
]


@pytest.fixture(scope="module")
def ends():
    command = [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), json.dumps([typed for typed, _ in ANSWERS])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(ANSWERS)), ids=[" ".join(typed) for typed, _ in ANSWERS])
def test_an_answer_without_a_model_imports_nothing_heavy(ends, number):
    assert ANSWERS[number][1] in ends[number][1]
