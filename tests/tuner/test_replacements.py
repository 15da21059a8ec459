"""What `import lily` replaces in other libraries is what the tables say, and `lily.unregister` puts it back."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from paths import ROOT

import lily
from lily import _after_import
from lily.tuner.replacements import REPLACEMENTS

# Every attribute of the modules and classes of other libraries, in a process of its own.
COMPARED = """
import contextlib, importlib, sys
def attributes():
    found = {}
    for key, module in list(sys.modules.items()):
        if key.partition(".")[0] not in ("peft", "transformers", "diffusers", "trl", "accelerate"):
            continue
        for name, value in list(vars(module).items()):
            found[f"{key}.{name}"] = value
            if isinstance(value, type) and value.__module__ == key:
                found.update({f"{key}.{name}.{own}": what for own, what in vars(value).items()})
    return found
for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
before = attributes()
import lily
lily.register()
during = attributes()
lily.unregister()
after = attributes()
print("REPLACED", *sorted(key for key, value in before.items() if during[key] is not value))
print("LEFT", *sorted(key for key, value in before.items() if after[key] is not value))
"""
MODULES = (
    "peft", "peft.helpers", "peft.functional", "peft.optimizers", "peft.utils.hotswap",
    "transformers.integrations.peft", "transformers.models.auto.modeling_auto",
    "diffusers.loaders.peft", "diffusers.loaders.lora_base",
    "diffusers.utils.state_dict_utils",
)  # fmt: skip


def path(owner, name):
    module = owner.__name__ if not isinstance(owner, type) else f"{owner.__module__}.{owner.__name__}"
    return f"{module}.{name}"


def test_exactly_the_listed_attributes_are_replaced_and_all_are_restored():
    script = f"MODULES = {MODULES!r}\n{COMPARED}"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    lines = {line.split()[0]: set(line.split()[1:]) for line in out.splitlines() if line.startswith(("REPL", "LEFT"))}
    assert lines["LEFT"] == set()
    listed = {path(owner, r.name) for r in REPLACEMENTS for owner in r.owners}
    listed |= {name for name in _after_import.REPLACED if not name.startswith("trl.")}
    assert listed <= lines["REPLACED"]
    # transformers copies the function into every Auto class
    copies = {key for key in lines["REPLACED"] if re.fullmatch(r"transformers\.models\.auto\..*\.from_pretrained", key)}
    lines["REPLACED"] -= copies - listed
    # Modules of diffusers import its functions by their names.
    names = {name.rpartition(".")[2] for name in listed if name.startswith("diffusers.")}
    by_name = {key for key in lines["REPLACED"] if key.startswith("diffusers.") and key.rpartition(".")[2] in names}
    assert lines["REPLACED"] == listed | by_name


@pytest.mark.parametrize("trainer", _after_import.SYNCING)
def test_the_functions_of_trls_trainers_are_replaced_and_restored(trainer):
    reason = "this version of trl does not have it, or needs a package that is not installed"
    module = pytest.importorskip(f"trl.experimental.{trainer}", reason=reason)
    names = [name.rpartition(".")[2] for name in _after_import.REPLACED if name.startswith(module.__name__)]
    during = [getattr(module, name) for name in names]
    lily.unregister()
    try:
        stock = [getattr(module, name) for name in names]
        assert all(hasattr(ours, "__wrapped__") for ours in during)
        assert [ours.__wrapped__ for ours in during] == stock
    finally:
        lily.register()
    assert _after_import.replaced() >= {f"{module.__name__}.{name}" for name in names}


def test_the_docs_list_the_replacements_and_their_reasons():
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8").partition("## What `import lily` replaces")[2]
    shown = {tuple(row) for row in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.MULTILINE)}
    listed = {(replacement.name, replacement.why) for replacement in REPLACEMENTS}
    assert shown == listed | {(name.rpartition(".")[2], why) for name, why in _after_import.REPLACED.items()}
