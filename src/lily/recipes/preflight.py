"""Checks of a run before a weight is read or a file is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.recipes import data, loader, methods, models
from lily.recipes.begun import as_begun
from lily.recipes.data.images import Preprocess
from lily.recipes.data.rows import Splits
from lily.recipes.packages import check_packages
from lily.recipes.results.run_files import changed_rows
from lily.recipes.scoring import answers
from lily.recipes.scoring.metrics import metrics_of
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer import checkpoints
from lily.recipes.trainer.processes import is_first

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

    from lily.recipes.data.summary import Summary
    from lily.recipes.data.tables import Row
    from lily.recipes.data.tasks import Example, Processor
    from lily.recipes.spec.dreambooth import DreamBooth

# Keys that a resumed run may change, since the finished part does not depend on them.
FREE = ("description", "chosen_by", "output", "baselines", "generation", "train.epochs", "train.max_steps",
        "train.save_every", "train.early_stopping", "train.eval_batch_size", "train.report_to")  # fmt: skip

# Keys that no run depends on.
CARD_ONLY = ("package.hub", "package.license")

# Modules of absolute position embeddings, which limit the length; rotary ones do not.
POSITIONS = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True)
class Prepared:
    """A checked run, ready to start.

    Attributes:
        config: of the adapter; None where there is none (method none).
        meta: the model on the meta device.
        general: encoded texts of other kinds than the task, to measure forgetting on.
        calibration: encoded texts that A is kept out of.
        data: what the data are.
        first: the first row with an example that trains.
    """

    splits: Splits
    processor: Processor
    train: list[Example]
    validation: list[Example]
    config: PeftConfig | None
    meta: PreTrainedModel
    general: list[Example]
    calibration: list[Example]
    data: Summary
    first: Row


def prepare(recipe: Recipe) -> Prepared:
    """Load and check everything that a run needs besides the weights.

    Raises:
        LilyError: for anything wrong with packages, data, tokenizer, targets or lengths.
    """
    check_packages(recipe)
    splits = data.load_splits(recipe)
    if splits.unseen and is_first():
        print(f"warning: {unseen_message(splits)}", file=sys.stderr)

    from lily.recipes.data import tasks
    from lily.recipes.data.summary import summarize
    from lily.recipes.scoring import answer_lengths, choices, forgetting

    with located(recipe, "model", recipe.model.kind):
        meta = models.meta_model(recipe.model, recipe.task, tasks.num_labels(recipe, splits))
        processor = models.load_processor(recipe, meta.config)
    config = methods.peft_config(recipe, meta)
    if isinstance(processor, Preprocess):
        with located(recipe, "data", "image", "size"):
            check_size(processor.size, meta)
    else:
        with located(recipe, "data", "max_length"):
            check_length(recipe, meta)
    encoded, too_long = {}, list[str]()
    for name, rows in splits.parts.items():
        if recipe.task == "sft" or name in ("train", "validation"):  # for sft, to check that no answer is cut away
            title = "training" if name == "train" else name.removeprefix("tests.")
            encoded[name] = tasks.encode_rows(rows, recipe, processor, splits.labels, f"the {title} rows")
        if name == "train":
            continue
        if recipe.task == "sft" and "exact_match" in metrics_of(recipe):
            answers.expected_answers(rows, recipe)
            too_long += answer_lengths.unreachable(rows, name, recipe, tasks.text_processor(processor))
        for row in rows if recipe.data.choices is not None else ():
            choices.scored_choices(0, row, recipe, processor)  # for its check of their length
    general = forgetting.general_text(recipe, processor, recipe.forgetting, "forgetting")
    kept = recipe.lily.null_space if recipe.method == "lily" else None
    calibration = forgetting.general_text(recipe, processor, kept, "lily", "null_space")
    seen = summarize(recipe, splits, encoded, processor)
    seen = replace(seen, warnings=(*seen.warnings, *too_long))
    train, first = encoded["train"].examples, splits.train[encoded["train"].rows[0]]
    return Prepared(
        splits, processor, train, encoded["validation"].examples, config, meta, general, calibration, seen, first
    )


def unseen_message(splits: Splits) -> str:
    """The warning about classes without training rows."""
    shown = ", ".join(splits.unseen[:3]) + (", ..." if len(splits.unseen) > 3 else "")
    return (
        f"no training image is of {len(splits.unseen)} of the {len(splits.labels or ())} classes ({shown}); the head "
        "keeps an output for each, but it is never trained, so their held-out images will be misclassified"
    )


def check_length(recipe: Recipe, model: nn.Module) -> None:
    """Check that examples are not longer than the model's absolute positions.

    Raises:
        LilyError: names the limit.
    """
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(POSITIONS):
            # RoBERTa's positions start after the padding index, OPT's at an offset.
            start = getattr(module, "offset", 0) + (0 if module.padding_idx is None else module.padding_idx + 1)
            limit = module.num_embeddings - start
            if recipe.data.max_length > limit:
                raise LilyError(
                    f"data.max_length={recipe.data.max_length}: the model reads at most {limit} tokens; lower it"
                )


def check_size(size: int, model: PreTrainedModel) -> None:
    """Check that the model takes images of this size: some models interpolate their positions, others fail.

    Args:
        size: height and width in pixels.
        model: on the meta device.

    Raises:
        LilyError: names the model's own size.
    """
    import torch

    own = models.image_size(model.config)
    if size == own:
        return
    try:
        with torch.no_grad():
            model(pixel_values=torch.empty(1, 3, size, size, device="meta"))
    except (ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LilyError(f"the model reads images of {own} x {own} pixels, not {size} ({why}); remove the key") from None


def check_output(recipe: Recipe | DreamBooth, output: Path) -> None:
    """Check that an output folder which a recipe's file names is below the working directory.

    Raises:
        LilyError: if it is not, also through a link. The command line may name any folder.
    """
    key = ("output",)
    if key not in recipe.locations.written or key in recipe.locations.overridden:
        return
    home = Path.cwd()
    if not output.resolve().is_relative_to(home.resolve()):
        with located(recipe, *key):
            raise LilyError(
                f"output {output} is outside the working directory {home}; a recipe's file may only write below it. "
                f"If you want that, say so: output={output}"
            )


def check_folder(recipe: Recipe | DreamBooth, output: Path, resume: bool, overwrite: bool) -> None:
    """Check that a run may write to its folder.

    Raises:
        LilyError: if the folder exists and neither flag is given; to resume, if it holds no run or another one; to
            overwrite, if it holds files that no run wrote.
    """
    check_output(recipe, output)
    if output.exists() and not output.is_dir():
        raise LilyError(f"output {output} is a file; name a folder")
    names = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
    # a run that was killed before it wrote its recipe left temporary files only
    if not all(checkpoints.is_leftover(name) for name in names) and not (resume or overwrite):
        raise LilyError(
            f"output {output} exists; --resume continues it, --overwrite replaces it, output=... names another"
        )
    foreign = [name for name in names if name not in checkpoints.OWN and not checkpoints.is_leftover(name)]
    if overwrite and foreign:
        raise LilyError(
            f"output {output} holds {foreign[0]}, which no run wrote; move it away, or name another folder with output="
        )
    if resume:
        if not (output / "recipe.yaml").is_file():
            raise LilyError(f"output {output} holds no run, so there is nothing to resume; drop --resume")
        changed = list(changes(as_begun(loader.load_any(str(output / "recipe.yaml")), output), recipe))
        if changed:
            raise LilyError(
                f"--resume: {'; '.join(changed)}. Give the same recipe again, or start again with --overwrite"
            )


def check_rows(splits: Splits, output: Path) -> None:
    """Check that a run that is resumed has the rows with which it began, if its folder tells.

    Raises:
        LilyError: if not: rows that it was trained on could be among those that judge it.
    """
    if other := changed_rows(splits, output):
        raise LilyError(
            f"--resume: the rows of {', '.join(other)} are not those with which {output} began, so held-out rows may "
            "have been trained on; bring the files back, or start again with --overwrite"
        )


def changes(then: Recipe | DreamBooth, now: Recipe | DreamBooth, free_keys: Sequence[str] = FREE) -> Iterator[str]:
    """The keys that differ between two recipes, except `free_keys`, each as a phrase."""
    before, after = (flat(recipe.model_dump(mode="json")) for recipe in (then, now))
    for key in sorted(before.keys() | after.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in free_keys)
        if not free and before.get(key) != after.get(key):
            yield f"{key} was {before.get(key)!r} and is now {after.get(key)!r}"


def flat(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested values by dotted names, without those that only model cards have."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if f"{at}{key}".endswith(CARD_ONLY) or f"{at}{key}" in ("license", "recipe.license"):
            continue
        flattened |= flat(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return flattened
