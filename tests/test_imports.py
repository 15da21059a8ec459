"""Which folder may import which, and what importing the package costs and pulls in, in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT

SOURCE = ROOT / "src"

# A file or folder imports what stands below it, never what stands above it or on its own line. One line is one level.
DIRECTION = """
__main__
cli
tune
compare
search
insight
recipes bench
analysis
export gguf_lora
callbacks deploy
tuner
checkpoint distributed optim
layers
budget
plan
kernels io
functional html progress errors
_after_import _version
"""
RECIPES = """
deploy dry_run exports new
by_task
dreambooth
train
preflight
vision_mamba standins
results
begun
loader packages new work
document inherit
checks
trainer
scoring
pace schedule
methods
models
offline
data
spec
"""


def test_imports_go_down_only():
    assert list(upward(levels(DIRECTION), ("lily",))) == []


def test_imports_within_recipes_go_down_only():
    assert list(upward(levels(RECIPES), ("lily", "recipes"))) == []


def test_every_folder_has_a_level():
    for table, folder in ((DIRECTION, SOURCE / "lily"), (RECIPES, SOURCE / "lily" / "recipes")):
        rooms = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        assert rooms - {"__init__"} == set(levels(table))


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {imported for imported, _ in imports(module)} - {module} for module in modules()}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    while roots := graph.keys() - set().union(*graph.values()):
        graph = {module: needs for module, needs in graph.items() if module not in roots}
    assert graph == {}


def test_an_upward_import_and_a_circle_are_seen(tmp_path, monkeypatch):
    for name, text in {
        "__init__": "",
        "low": "def f():\n    from lily import high\n",
        "high": "import lily.low",
    }.items():
        (tmp_path / "lily").mkdir(exist_ok=True)
        (tmp_path / "lily" / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    modules.cache_clear()
    try:
        assert list(upward(levels("high\nlow"), ("lily",))) == ["lily/low.py:2 imports lily.high"]
        with pytest.raises(AssertionError):
            test_no_modules_import_each_other_in_a_circle()
    finally:
        modules.cache_clear()


def levels(table: str) -> dict[str, int]:
    """Name of a file or folder -> its level, 0 at the bottom."""
    return {name: level for level, line in enumerate(reversed(table.split("\n"))) for name in line.split()}


def upward(table: dict[str, int], folder: tuple[str, ...]) -> Iterator[str]:
    """The imports, between what is in `folder`, that go up or sideways."""
    for module in modules():
        here = room(module, folder)
        for imported, line in imports(module):
            there = room(imported, folder)
            if here in table and there in table and here != there and table[there] >= table[here]:
                yield f"{modules()[module].relative_to(SOURCE)}:{line} imports {imported}"


def room(module: str, folder: tuple[str, ...]) -> str | None:
    parts = tuple(module.split("."))
    return parts[len(folder)] if parts[: len(folder)] == folder and len(parts) > len(folder) else None


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((SOURCE / "lily").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> Iterator[tuple[str, int]]:
    """The package's modules that a module imports, wherever the import stands, and the line. `lily` itself is lazy."""
    if module == "lily":
        return
    for node in ast.walk(ast.parse(modules()[module].read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in names]
        for name in names:
            if name in modules() and name != "lily":
                yield name, node.lineno


# --- fresh processes ------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_lily_and_the_help_of_the_command_line_import_nothing_heavy():
    code = (
        "import sys, lily, lily.cli.main\n"
        "from typer.testing import CliRunner\n"
        "assert 'Fine-tune' in CliRunner().invoke(lily.cli.main.app, ['--help']).stdout\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy', 'pydantic') if m in sys.modules])"
    )
    assert run(code).strip() == "[]"


# Each case is forked from a process that has most of what PEFT imports, but neither PEFT nor transformers' models.
FORKS = """
import gc, os, sys, traceback
import accelerate, bitsandbytes, scipy.optimize, torch, torchao.quantization, transformers, transformers.masking_utils
import torch._dynamo, torch._inductor.compile_fx, torch.distributed.tensor
assert "peft" not in sys.modules and "transformers.modeling_utils" not in sys.modules
gc.freeze(), gc.disable()
for code in {cases!r}:
    if (child := os.fork()) == 0:
        try:
            exec(code)
            from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners
            from transformers.integrations.peft import PeftAdapterMixin
            import peft
            assert tuners[peft.PeftType.LILY].__module__ == "lily.tuner.model", tuners
            assert peft.load_peft_weights.__module__ == "lily.tuner.peft_loading"
            assert PeftAdapterMixin.load_adapter.__module__ == "lily.tuner.peft_loading"
            waiting = [finder.name for finder in sys.meta_path if "lily" in type(finder).__module__]
            assert waiting and all(name.startswith(("diffusers.", "trl.")) for name in waiting), waiting
        except BaseException:
            print(code, traceback.format_exc(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

ORDERS = [
    "import peft, lily",
    "import lily; from peft import load_peft_weights as l; assert l.__module__ == 'lily.tuner.peft_loading'",
    "import lily; from transformers import PreTrainedModel; assert 'peft' not in sys.modules",
    # Modules of models, which PEFT imports in turn: none of them may be half-imported then.
    "import lily; from transformers import BloomModel",
    "import lily; from transformers import LlamaForCausalLM",
    "import lily, transformers.modeling_layers",
    "import transformers.modeling_utils, lily; assert 'peft' not in sys.modules",
    # transformers is the first to need PEFT.
    "import lily; from transformers import PreTrainedModel\n"
    "try: PreTrainedModel.load_adapter(None)\n"
    "except Exception as e:\n"
    "  assert 'transformers_load_adapter' in [f.name for f in traceback.extract_tb(e.__traceback__)], e\n"
    "else: raise AssertionError",
    "import lily; import importlib.util as u; u.find_spec('peft'); import peft",
    # Using Lily imports nothing but its own modules, a few of PEFT's and those of the optimizers that it replaces.
    "import peft; before = set(sys.modules); import lily; lily.LilyConfig, lily.LilyModel\n"
    "new = {m for m in set(sys.modules) - before if m.partition('.')[0] != 'lily'}\n"
    "optimizers = {f'peft.optimizers{n}' for n in ('', '.lorafa', '.loraplus', '.riemannian')}\n"
    "more = {'peft.utils.hotswap', 'peft.functional', 'transformers.trainer_pt_utils', *optimizers,\n"
    "        'peft.utils.transformers_weight_conversion'}\n"
    "assert new <= more, new - more",
    # Undone before PEFT is imported.
    "import lily; lily.unregister(); import peft; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners\n"
    "assert tuners[peft.PeftType.LILY].__module__ == 'peft.tuners.lily.model'; lily.register()",
    "from lily.layers.layer import LilyLayer",
    "from lily.plan import LilyConfig",
    "from lily.checkpoint.load import check_fit",
    "from lily.tuner.adapter import find",
    "from lily.optim import create_optimizer",
]


@pytest.mark.parametrize("orders", [ORDERS[1::5], pytest.param(ORDERS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_peft_uses_this_package_whatever_is_imported_first(orders):
    assert run(FORKS.format(cases=orders)) == ""


@pytest.mark.slow
def test_any_module_may_be_the_first_that_is_imported():
    names = [name for name in modules() if name not in ("lily.__main__", "lily.search.worker")]
    assert run(FORKS.format(cases=[f"import {name}; import peft" for name in names])) == ""
