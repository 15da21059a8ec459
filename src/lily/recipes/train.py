"""`lily train` for text and images: from a recipe to an adapter, its metrics and its model card."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lily.distributed import load_weights, save_adapter
from lily.io.atomic import write_text
from lily.recipes import loader, models, preflight
from lily.recipes.begun import as_begun
from lily.recipes.data.rows import Splits
from lily.recipes.methods import other_peft, terms
from lily.recipes.models.precision import precision_of
from lily.recipes.preflight import Prepared
from lily.recipes.results import card, model_card
from lily.recipes.results.data_table import print_data
from lily.recipes.results.result import Result, output_folder, started
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring import test_sets
from lily.recipes.scoring.inference import place
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer import checkpoints, memory, processes
from lily.recipes.trainer.signals import Signals

PREDICTIONS = "predictions.json"

if TYPE_CHECKING:
    from lily.recipes.scoring.evaluate import Judge

# Called with the evaluations so far after each of them; True stops the training.
Watch = Callable[[Sequence[dict[str, float]]], bool]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    watch: Watch | None = None,
    validation_only: bool = False,
) -> Result:
    """Train, evaluate and write a recipe's adapter.

    Everything that can be checked without weights is checked first, so a mistake costs seconds and writes nothing.

    Args:
        recipe: model, data, method and schedule.
        resume: continue from the run's last complete checkpoint.
        overwrite: replace the run's folder.
        quiet: no progress bar.
        watch: may stop the training early; a resumed run continues from there.
        validation_only: do not evaluate the test rows or the untrained model: a trial of a search.

    Returns:
        The result, also written to the run's folder: `metrics.json`, `recipe.yaml`, `best/` and `last/` (adapters), and
        `predictions.json` (the prediction and score of each held-out row).

    Raises:
        LilyError: for anything wrong with recipe, data, model or folder, and for a loss that is not finite.
        OSError: naming a path, when the disk is full; the last checkpoint is intact.
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM; within training after a checkpoint.
    """
    begin = time.perf_counter()
    output = output_folder(recipe)
    recipe = as_begun(recipe, output) if resume else recipe

    def checked() -> tuple[Prepared, Any, Result]:
        processes.check(recipe)
        preflight.check_folder(recipe, output, resume, overwrite)
        prepared = preflight.prepare(recipe)
        if processes.is_first():
            print_data(prepared.data, Console(stderr=True), warnings_only=quiet)
        if processes.is_first() and not validation_only:
            for warning in terms.warnings_of(recipe, prepared.meta):
                print(f"warning: {warning}", file=sys.stderr)
        # before the folder is touched, so that unreadable weights write nothing
        return prepared, *_load(recipe, prepared)

    def begun() -> Path | None:
        checkpoint = checkpoints.last(output) if resume else None
        if overwrite and not resume:
            checkpoints.clear(output)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "recipe.yaml", loader.dump_recipe(recipe))
        checkpoints.restore(output, checkpoint)
        return checkpoint

    with other_peft.implementation(recipe):
        prepared, model, result = processes.in_turn(checked)
    checkpoint = processes.on_first(begun)
    with other_peft.implementation(recipe), Signals() as signals:
        _run(recipe, prepared, model, result, output, checkpoint, signals, quiet, watch, validation_only)
        # written before the baselines too, so that an error there does not lose it
        _write(result, recipe, output, begin)
        if recipe.baselines:
            result.baselines = _baselines(recipe, prepared.splits, output, resume, quiet)
            _write(result, recipe, output, begin)
    return result


def _write(result: Result, recipe: Recipe, output: Path, begin: float) -> None:
    result.seconds["total"] = time.perf_counter() - begin
    result.peak_bytes = max(result.peak_bytes, memory.peak_bytes())
    if not processes.is_first():
        return
    result.write(output / "metrics.json")
    for name in ("best", "last"):
        if (output / name).is_dir():
            model_card.finish_adapter(output / name, recipe, result)


def _load(recipe: Recipe, prepared: Prepared) -> tuple[Any, Result]:
    """The untrained model with its adapter, and the result with what is known before training."""
    from peft import get_peft_model
    from transformers import set_seed

    splits = prepared.splits
    result = started(recipe, metric_tools.metrics_of(recipe)[0], "test" if splits.test else "validation")
    result.labels = None if splits.labels is None else list(splits.labels)
    result.rows = {"train": 0, "validation": 0, "test": 0, **{part.name: part.used for part in prepared.data.parts}}
    result.data = prepared.data
    set_seed(recipe.seed)
    messages: list[str] = []
    with located(recipe, "model", recipe.model.kind):
        base = models.load_model(
            recipe.model,
            recipe.task,
            prepared.splits.labels,
            precision=precision_of(recipe),
            announce=messages.append,
        )
    for line in messages if processes.is_first() else ():
        print(line, file=sys.stderr)
    result.quantization, result.base_bytes = recipe.model.quantization, base.get_memory_footprint()
    result.new_head, total = next(iter(messages), None), base.num_parameters()
    set_seed(recipe.seed)
    _, revision = models.reference(recipe.model)
    model = base if prepared.config is None else get_peft_model(base, prepared.config, revision=revision)
    result.parameters, result.adapter = _parameters(model, total), card.adapter_summary(model, recipe)
    return model if processes.to_be_sharded() else place(model), result


def _run(
    recipe: Recipe,
    prepared: Prepared,
    model: Any,
    result: Result,
    output: Path,
    checkpoint: Path | None,
    signals: Signals,
    quiet: bool,
    watch: Watch | None,
    validation_only: bool,
) -> None:
    from lily.recipes.scoring import evaluate, forgetting
    from lily.recipes.trainer import trainer as runner

    splits, processor, config = prepared.splits, prepared.processor, prepared.config
    names = metric_tools.metrics_of(recipe)
    if validation_only:
        result.split = "validation"
    judge = evaluate.Judge(recipe, processor, splits.labels)
    scored = recipe.task == "sft" and any(name in metric_tools.SCORED for name in names)

    def judge_untrained(m: Any) -> None:
        if not validation_only:
            result.before, review = judge(m, splits.held_out), judge.review
            if config is None:  # the untrained model is also the final one
                _write_predictions(judge, result.split, output)
            result.tests = test_sets.noted({name: judge(m, rows) for name, rows in splits.tests.items()}, "before")
            result.samples, lengths = evaluate.samples(m, processor, splits.held_out, recipe, "before")
            if config is None:
                result.review = review.with_answers(lengths)
        result.forgetting = forgetting.of(before=general_loss(m)) if prepared.general else {}

    def general_loss(m: Any) -> float:
        return evaluate.token_loss(m, prepared.general, recipe, processor)

    if config is None:
        judge_untrained(model)
        result.final = result.before
        result.tests = {name: {**figures, "final": figures["before"]} for name, figures in result.tests.items()}
        return

    trainer = runner.build_trainer(
        recipe,
        model,
        processor,
        prepared.train,
        prepared.validation,
        output,
        partial(judge.beyond_loss, rows=splits.validation) if scored else None,
        quiet,
    )

    if config is not None and getattr(config, "init_weights", None) == "data" and checkpoint is None:
        with located(recipe, "lily", "init_weights"):
            trainer.start_from_data()

    if config is not None and prepared.calibration:
        with located(recipe, "lily", "null_space"):
            trainer.keep_out(prepared.calibration)

    def look(m: Any) -> None:
        judge_untrained(m)
        if recipe.forgetting is not None and recipe.forgetting.limit is not None:
            trainer.progress.max_general_loss = result.forgetting["before"] + recipe.forgetting.limit

    if trainer.shards:  # unsharded, the model may not fit into one device
        trainer.on_sharded = look
    else:
        look(model)
    trainer.signals, trainer.watch = signals, watch
    trainer.general = general_loss if prepared.general else None
    trainer.resume(checkpoint)
    result.seconds["train"], result.peak_bytes = trainer.seconds, trainer.peak_bytes
    result.router = {name: value for name, value in trainer.health.routers.state.items() if name != "in_a_row"}
    model = trainer.usable
    save_adapter(model, output / "last", overwrite=True)
    result.adapter = card.adapter_summary(model, recipe)
    progress, metric = trainer.progress, names[0]
    if not progress.history or progress.history[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    result.history = progress.history
    result.last, result.best = (
        {"epoch": evaluation["epoch"], "value": evaluation[metric]}
        for evaluation in (progress.history[-1], progress.best)
    )
    if prepared.general:
        last, after = (h[forgetting.LOSS] for h in (progress.history[-1], progress.best))
        result.forgetting = forgetting.of(result.forgetting["before"], last, after)
    if validation_only:
        result.final = {name: progress.best[name] for name in names}
    else:
        load_weights(model, output / "best")
        result.final, review = judge(model, splits.held_out), judge.review
        _write_predictions(judge, result.split, output)
        tests = {name: judge(model, rows) for name, rows in splits.tests.items()}
        result.tests = test_sets.noted(tests, "final", result.tests)
        result.samples, lengths = evaluate.samples(model, processor, splits.held_out, recipe, "after", result.samples)
        result.review = review.with_answers(lengths)
    result.adapter_bytes = processes.on_first(lambda: (output / "best" / "adapter_model.safetensors").stat().st_size)


def _write_predictions(judge: Judge, split: str, output: Path) -> None:
    """Write the judge's last predictions, so that two runs on the same rows can be compared row by row."""
    if processes.is_first():
        write_text(output / PREDICTIONS, json.dumps({"split": split, "items": judge.items}))


def _parameters(model: Any, total: int) -> dict[str, int]:
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in trainable.items() if "modules_to_save" in name)
    adapted = hasattr(model, "peft_config")
    return {"adapter": sum(trainable.values()) - head if adapted else 0, "head": head, "base": total}


def _baselines(recipe: Recipe, splits: Splits, output: Path, resume: bool, quiet: bool) -> dict[str, dict[str, float]]:
    from lily.recipes.scoring import baselines

    figures: dict[str, dict[str, float]] = {}
    for name in recipe.baselines:
        if name == "lora":
            if recipe.method == "lora":
                continue
            other = recipe.model_copy(update={"method": "lora", "baselines": [], "output": str(output / "lora")})
            begun = resume and processes.on_first((output / "lora" / "recipe.yaml").is_file)
            lora = train(other, resume=begun, overwrite=not begun, quiet=quiet)
            figures[name] = {
                **lora.final,
                **card.adapter_costs(lora),
                **({"forgetting": lora.forgetting["increase"]} if lora.forgetting else {}),
            }
        else:
            figures[name] = processes.on_first(partial(baselines.run, name, recipe, splits))
    return figures
