"""Runs exported programs in another process, where neither this package nor PEFT nor transformers can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ABSENT = ("lily", "peft", "transformers")


class Runner:
    """The other process. It reads a program's path, runs the program on stored inputs and stores its outputs."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__))]
        environment = {**os.environ, "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def outputs(self, program: Path, calls: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """What the program returns for each call's arguments."""
        stored = {f"{i}.{k}": tensor.clone() for i, call in enumerate(calls) for k, tensor in enumerate(call)}
        save_file(stored, inputs := program.with_suffix(".inputs.safetensors"))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(program), str(inputs), len(calls)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer == "done\n", answer
        outputs = load_file(program.with_suffix(".outputs.safetensors"))
        return [outputs[str(i)] for i in range(len(calls))]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


class Refuse:
    """An import finder to which some packages do not exist."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed here")


def run(program: Path, calls: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The outputs of a program of any of the three formats."""
    if program.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        feeds = [{n: t.numpy() for n, t in zip(names, call, strict=True)} for call in calls]
        return [torch.from_numpy(session.run(None, feed)[0]) for feed in feeds]
    loaded = torch.jit.load(program) if program.suffix == ".ts" else torch.export.load(program).module()
    with torch.no_grad():
        return [loaded(*call) for call in calls]


def main() -> None:
    """Answer one line for each line that is read."""
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    for name in ABSENT:
        try:
            __import__(name)
        except ImportError:
            continue
        raise SystemExit(f"{name} can be imported")
    for line in sys.stdin:
        program, inputs, count = json.loads(line)
        stored = load_file(inputs)
        calls = [[stored[key] for key in sorted(stored) if key.startswith(f"{i}.")] for i in range(count)]
        try:
            outputs = run(Path(program), calls)
        except Exception as error:  # the test shows it
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
            continue
        named = {str(i): output.contiguous() for i, output in enumerate(outputs)}
        save_file(named, Path(program).with_suffix(".outputs.safetensors"))
        print("done", flush=True)


if __name__ == "__main__":
    main()
