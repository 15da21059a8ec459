"""Runs of tiny recipes, in this process and by the command line."""

from __future__ import annotations

import re

import pytest
from recipes_helpers import rows, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app
from lily.recipes import loader


def make(kind, folder, model, overrides=()):
    table = [{**r, "question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    return loader.load_recipe(
        write_recipe(folder, kind(model, write_jsonl(folder / "t.jsonl", table), folder)), list(overrides)
    )


def paste(folder):
    """What the Python lines of a folder's card define, run where they stand."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    scope = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, f"{folder}/README.md", "exec"), scope)
    return scope


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout
