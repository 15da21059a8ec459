"""The methods of transformers' `Trainer` that our trainer overrides or calls: a release that changes one fails here.

`Trainer` gives no promise for its private methods. Each is in `DEPENDS` with the parameters that our code was written
for and the file that depends on it, and the table is compared with the source of our classes, so it stays complete.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import lily.recipes.trainer

FOLDER = Path(lily.recipes.trainer.__file__).parent
# Classes of ours that are mixed into a Trainer, by file.
CLASSES = {"parallel.py": "Parallel", "resumable.py": "Resumable", "trainer.py": "RecipeTrainer"}

# Method -> (the file that overrides or calls it, its parameters after `self`).
DEPENDS: dict[str, tuple[str, str]] = {
    # overridden
    "_evaluate": ("resumable.py", "trial ignore_keys_for_eval skip_scheduler"),
    "_get_num_items_in_batch": ("parallel.py", "batch_samples device"),
    "_get_output_dir": ("resumable.py", "trial"),
    "_load_from_checkpoint": ("parallel.py", "resume_from_checkpoint model"),
    "_load_optimizer_and_scheduler": ("resumable.py", "checkpoint"),
    "_load_rng_state": ("resumable.py", "checkpoint"),
    "_load_scaler": ("resumable.py", "checkpoint"),
    "_maybe_log_save_evaluate": (
        "resumable.py",
        "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    ),
    "_prepare_for_training": ("parallel.py", "max_steps train_dataloader resume_from_checkpoint"),
    "_run_epoch": (
        "resumable.py",
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    ),
    "_save": ("resumable.py", "output_dir state_dict"),
    "_save_checkpoint": ("resumable.py", "model trial"),
    "_save_optimizer_and_scheduler": ("resumable.py", "output_dir"),
    "_save_rng_state": ("resumable.py", "output_dir"),
    "_save_scaler": ("resumable.py", "output_dir"),
    "compute_loss": ("parallel.py", "model inputs return_outputs num_items_in_batch"),
    "create_model_card": (
        "resumable.py",
        "language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
    ),
    "create_optimizer": ("parallel.py", "model"),
    "evaluate": ("trainer.py", "eval_dataset ignore_keys metric_key_prefix"),
    "get_eval_dataloader": ("parallel.py", "eval_dataset"),
    "get_train_dataloader": ("parallel.py", ""),
    "save_model": ("parallel.py", "output_dir _internal_call"),
    "training_step": ("trainer.py", "model inputs num_items_in_batch"),
    # called
    "_get_collator_with_removed_columns": ("parallel.py", "data_collator description"),
    "_remove_unused_columns": ("parallel.py", "dataset description"),
}


def changes(trainer: type) -> list[str]:
    """What differs from the table in a Trainer class: one message for each method."""
    found = []
    for name, (file, parameters) in DEPENDS.items():
        method = getattr(trainer, name, None)
        where = f"Trainer.{name}, which lily/recipes/trainer/{file} depends on,"
        if method is None:
            found.append(f"{where} is gone; was it renamed?")
            continue
        now, before = " ".join(list(inspect.signature(method).parameters)[1:]), parameters
        if now != before:
            found.append(f"{where} takes ({now}) and took ({before})")
    return found


def our_methods() -> dict[str, str]:
    """Methods of `Trainer` that our classes define, and private ones that they call -> our file."""
    found: dict[str, str] = {}
    for file, kind in CLASSES.items():
        tree = ast.parse((FOLDER / file).read_text("utf-8"))
        (ours,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind]
        defined = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)}
        called = {
            node.func.attr
            for node in ast.walk(ours)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("_")
        }
        names = {name for name in defined | called if hasattr(Trainer, name) and not name.startswith("__")}
        found |= {name: file for name in names - found.keys()}
        found |= {name: file for name in names & defined}  # who overrides it, not who calls it
    return found


def test_the_methods_that_we_depend_on_are_as_they_were():
    assert not changes(Trainer), "\n".join(changes(Trainer))


def test_trls_trainer_takes_what_ours_passes_on():
    trl = pytest.importorskip("trl")
    for name, (_, parameters) in DEPENDS.items():
        if name == "create_model_card":  # ours takes anything and passes nothing on
            continue
        signature = inspect.signature(getattr(trl.SFTTrainer, name))
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        assert inspect.Parameter.VAR_POSITIONAL in kinds or " ".join(list(signature.parameters)[1:]) == parameters, name


def test_the_table_names_every_method_that_our_classes_override_or_call():
    assert our_methods() == {name: file for name, (file, _) in DEPENDS.items()}


def test_every_class_that_is_mixed_into_a_trainer_is_looked_at():
    from lily.recipes.trainer.trainer import _with_best

    ours = [kind for kind in _with_best(Trainer).__mro__ if kind.__module__.startswith("lily.")]
    assert {kind.__name__ for kind in ours} == set(CLASSES.values())
    overridden = {
        name for kind in ours for name, value in vars(kind).items() if callable(value) and hasattr(Trainer, name)
    }
    assert {name for name in overridden if not name.startswith("__")} <= DEPENDS.keys()


def doctored(**methods: Any) -> type:
    """A class with Trainer's methods, some replaced; None removes one."""
    known = {name: getattr(Trainer, name) for name in DEPENDS}
    return type("Doctored", (), {k: v for k, v in {**known, **methods}.items() if v is not None})


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"_run_epoch": None}, "Trainer._run_epoch, which lily/recipes/trainer/resumable.py depends on, is gone"),
        (
            {"_load_rng_state": lambda self, folder, strict: None},
            "Trainer._load_rng_state, which lily/recipes/trainer/resumable.py depends on, takes (folder strict) and "
            "took (checkpoint)",
        ),
    ],
)
def test_a_renamed_method_and_a_changed_signature_are_named(methods, message):
    assert changes(doctored()) == []
    (found,) = changes(doctored(**methods))
    assert found.startswith(message)
