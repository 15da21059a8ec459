"""A pytest plugin for `peft_suite.py`: puts Lily in LoRA's place, and writes every test's outcome.

`PEFT_SUITE_AS` says what runs: `plain` (PEFT alone), `beside` (after `import lily`), `default` and `static` (every
`peft.LoraConfig` is a `LilyConfig`). `PEFT_SUITE_OUT` is a file of one JSON object per line: a test's name when it
starts, then its outcome, its error, and whether a configuration of Lily's was made for it. Tests that are in the file
do not run again. `PEFT_SUITE_EVERY`: of the tests in files of `SAMPLED`, one in this number runs, and only those for
methods of `METHODS`. Nothing is fetched from the hub, and a test has `SECONDS`.
"""

from __future__ import annotations

import json
import os
import signal
import zlib
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import peft
import pytest

RUN_AS = os.environ["PEFT_SUITE_AS"]
OUT = Path(os.environ["PEFT_SUITE_OUT"])
EVERY = int(os.environ.get("PEFT_SUITE_EVERY", "1"))
SAMPLED = ("test_custom_models.py",)
METHODS = ("LoraConfig", "AdaLoraConfig", "IA3Config", "VeraConfig")
SECONDS = 60
SAME = {"lora_dropout": "dropout", "alpha_pattern": "scaling_pattern"}
NOT_NEEDED = {"use_rslora", "lora_alpha", "fan_in_fan_out", "init_lora_weights", *SAME}


made: list[Any] = []  # configurations of Lily's that the running test made

# Some tests switch the offline mode off, and each request is then tried several times.
huggingface_hub.constants.is_offline_mode = lambda: True


def put_lily_in_loras_place(routing: str | None) -> None:
    """Replace `peft.LoraConfig` by a `LilyConfig` that takes LoRA's options where Lily has one that does the same."""
    import lily

    class AsLora(lily.LilyConfig):
        def __init__(self, r: int = 8, *args: Any, **given: Any) -> None:
            made.append(self)
            ours = {SAME.get(name, name): value for name, value in given.items() if name not in NOT_NEEDED - {*SAME}}
            ours = {name: value for name, value in ours.items() if value is not False or name == "inference_mode"}
            if "scaling_pattern" in ours:
                ours["scaling_pattern"] = {name: value / r for name, value in ours["scaling_pattern"].items()}
            scale = r**0.5 if given.get("use_rslora") else r
            start = given.get("init_lora_weights", True)
            if start is False:
                ours["init_weights"] = False
            elif start not in (True, None):
                ours["init_lora_weights"] = start
            if ours.get("bias") == "lora_only":
                ours["bias"] = "lily_only"
            if routing is not None:
                ours["routing"] = routing
            super().__init__(r=r, **{"scaling": given.get("lora_alpha", 8) / scale, **ours})

    AsLora.__name__ = AsLora.__qualname__ = "LoraConfig"  # in the names of tests
    peft.LoraConfig = AsLora


if RUN_AS == "beside":
    import lily  # noqa: F401
elif RUN_AS != "plain":
    put_lily_in_loras_place(None if RUN_AS == "default" else RUN_AS)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    done = {json.loads(line)["test"] for line in OUT.read_text("utf-8").splitlines()} if OUT.exists() else set()
    kept = {item for item in items if item.nodeid not in done and is_sampled(item)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def is_sampled(item: Any) -> bool:
    """Whether a test is among those that run; which one of how many depends on its name alone."""
    if item.path.name not in SAMPLED or EVERY == 1:
        return True
    return zlib.crc32(item.nodeid.encode()) % EVERY == 0 and of_methods(item)


def parameters(item: Any) -> list[Any]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def of_methods(item: Any) -> bool:
    """Whether the configurations' classes among a test's parameters are among `METHODS`."""
    classes = [value for value in parameters(item) if isinstance(value, type) and issubclass(value, peft.PeftConfig)]
    ours = METHODS if RUN_AS in ("plain", "beside") else METHODS[:1]
    return all(cls.__name__ in ours for cls in classes)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: Any) -> Any:
    lily = peft.LoraConfig if RUN_AS not in ("plain", "beside") else ()
    made[:] = [value for value in parameters(item) if isinstance(value, lily)]
    write({"test": item.nodeid, "outcome": "started", "error": "the process ended", "lily": False})
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not finished in {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = (yield).get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    error = ""
    if call.excinfo is not None:
        error = f"{call.excinfo.typename}: {str(call.excinfo.value).strip()[:400]}"
    write({"test": item.nodeid, "outcome": report.outcome, "error": error, "lily": bool(made)})


def write(row: dict[str, Any]) -> None:
    with OUT.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
