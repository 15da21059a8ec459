"""A pytest plugin for `peft_suite.py`: puts Lily in LoRA's place, and writes every test's outcome.

`PEFT_SUITE_AS` says what runs: `plain` (PEFT alone), `beside` (after `import lily`), `default` and `static` (every
`peft.LoraConfig` is a `LilyConfig`). `PEFT_SUITE_OUT` is a file that gets one JSON object per test.
"""

from __future__ import annotations

import json
import os
from typing import Any

import peft
import pytest

RUN_AS = os.environ["PEFT_SUITE_AS"]
SAME = {"lora_dropout": "dropout", "alpha_pattern": "scaling_pattern"}
NOT_NEEDED = {"use_rslora", "lora_alpha", "fan_in_fan_out", "init_lora_weights", *SAME}


def put_lily_in_loras_place(routing: str | None) -> None:
    """Replace `peft.LoraConfig` by a `LilyConfig` that takes LoRA's options where Lily has one that does the same."""
    import lily

    class AsLora(lily.LilyConfig):
        def __init__(self, r: int = 8, *args: Any, **given: Any) -> None:
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
            super().__init__(r=r, scaling=given.get("lora_alpha", 8) / scale, **ours)

    peft.LoraConfig = AsLora


if RUN_AS == "beside":
    import lily  # noqa: F401
elif RUN_AS != "plain":
    put_lily_in_loras_place(None if RUN_AS == "default" else RUN_AS)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = (yield).get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    error = ""
    if call.excinfo is not None:
        error = f"{call.excinfo.typename}: {str(call.excinfo.value).strip()[:400]}"
    with open(os.environ["PEFT_SUITE_OUT"], "a", encoding="utf-8") as out:
        out.write(json.dumps({"test": item.nodeid, "outcome": report.outcome, "error": error}) + "\n")
