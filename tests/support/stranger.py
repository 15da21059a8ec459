"""A process with stock PEFT and transformers, in which this package is never imported. One answers all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from paths import ROOT

HASH_SEED = "77"  # not this process's
# Each question is answered by a fork. `peft`, `torch` and what helpers.py has are there.
PROCESS = f"""
import gc, os, sys, traceback
sys.modules.update(lily=None, bitsandbytes=None, torchao=None)  # the last two are not needed, and take seconds
gc.disable()
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
import peft, torch
from helpers import *
from safetensors.torch import load_file, save_file
for line in sys.stdin:
    code, printed, *args = eval(line)
    if (child := os.fork()) == 0:
        sys.stdout = sys.stderr = open(printed, "w")
        try:
            exec(code)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("answered", flush=True)
"""


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Run code there, with arguments in `args`, and give what it prints, a traceback too."""
    printed = tmp_path_factory.mktemp("stranger") / "printed"
    environment = {**os.environ, "PYTHONHASHSEED": HASH_SEED}
    command = [sys.executable, "-c", PROCESS]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:

        def ask(code: str, *args: object) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(repr((code, str(printed), *map(str, args))) + "\n")
            process.stdin.flush()
            while process.stdout.readline().strip() != "answered":
                assert process.poll() is None
            return printed.read_text()

        yield ask
        assert process.stdin is not None
        process.stdin.close()
