"""`lily train` for text and images: from a recipe to an adapter, its metrics and its model card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.distributed import load_weights, save_adapter
from lily.io.atomic import write_text
from lily.progress.display import standard
from lily.progress.progress import Progress
from lily.recipes import loader, models, preflight, work
from lily.recipes.begun import as_begun
from lily.recipes.data.rows import Splits, fingerprints
from lily.recipes.methods import other_peft, terms
from lily.recipes.models.precision import precision_of
from lily.recipes.preflight import Prepared
from lily.recipes.results import card, data_table, model_card
from lily.recipes.results.header import header, settings
from lily.recipes.results.result import Result, output_folder, started
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring import test_sets
from lily.recipes.scoring.inference import place
from lily.recipes.scoring.metrics import figures
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer import checkpoints, memory, processes
from lily.recipes.trainer.signals import Signals

PREDICTIONS, LOG = "predictions.json", "train.log"

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
    told: Progress | None = None,
    who: str | None = None,
) -> Result:
    """Train, evaluate and write a recipe's adapter.

    Everything that can be checked without weights is checked first, so a mistake costs seconds and writes nothing.

    Args:
        recipe: model, data, method and schedule.
        resume: continue from the run's last complete checkpoint.
        overwrite: replace the run's folder.
        quiet: show warnings alone.
        watch: may stop the training early; a resumed run continues from there.
        validation_only: do not evaluate the test rows or the untrained model: a trial of a search.
        told: the progress of a command that this run is part of; `quiet` is its own then. Default: a bar on standard
            error in a terminal, and plain lines elsewhere.
        who: what the run is called in its lines. Default: its method.

    Returns:
        The result, also written to the run's folder: `metrics.json`, `recipe.yaml`, `best/` and `last/` (adapters),
        `predictions.json` (the prediction and score of each held-out row) and `train.log`.

    Raises:
        LilyError: for anything wrong with recipe, data, model or folder, and for a loss that is not finite.
        OSError: naming a path, when the disk is full; the last checkpoint is intact.
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM; within training after a checkpoint.
    """
    if told is None:
        processes.join()
        with Progress(standard(quiet or not processes.is_first())) as told, told.active():
            return train(recipe, resume=resume, overwrite=overwrite, watch=watch, validation_only=validation_only,
                         told=told, who=who)  # fmt: skip
    begin = time.perf_counter()
    output = output_folder(recipe)
    recipe = as_begun(recipe, output) if resume else recipe
    run = Run(recipe, output, told, who or work.contestant(recipe), validation_only, alone=who is None)

    def checked() -> tuple[Prepared, Any, Result]:
        processes.check(recipe)
        preflight.check_folder(recipe, output, resume, overwrite)
        prepared = preflight.prepare(recipe)
        if resume:
            preflight.check_rows(prepared.splits, output)
        if processes.is_first():
            for warning in prepared.data.warnings:
                told.warn(f"warning: {warning}")
            for warning in () if validation_only else terms.warnings_of(recipe, prepared.meta):
                told.warn(f"warning: {warning}")
        # before the folder is touched, so that unreadable weights write nothing
        return prepared, *_load(run, prepared)

    def begun() -> Path | None:
        checkpoint = checkpoints.last(output) if resume else None
        if overwrite and not resume:
            checkpoints.clear(output)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "recipe.yaml", loader.dump_recipe(recipe))
        write_text(output / checkpoints.ROWS, json.dumps(fingerprints(prepared.splits)))
        checkpoints.restore(output, checkpoint)
        told.log_to(output / LOG)
        return checkpoint

    told.restart()
    with other_peft.implementation(recipe), told.stage(run.who, "loading"):
        prepared, model, result = processes.in_turn(checked)
        run.expect(prepared)
        told.advance(1, "load")
    checkpoint = processes.on_first(begun)
    if processes.is_first():
        if run.alone:
            for line in header(recipe, result, output, None if checkpoint is None else checkpoint.name):
                told.tell(line)
            told.keep(data_table.text(prepared.data))
        elif not validation_only:
            told.evaluated(run.who, "begins", [settings(result)])
    with other_peft.implementation(recipe), Signals() as signals:
        _run(run, prepared, model, result, checkpoint, signals, watch)
        told.end(run.who)
        # written before the baselines too, so that an error there does not lose it
        _write(result, recipe, output, begin)
        if recipe.baselines:
            result.baselines = _baselines(run, prepared.splits, resume)
            _write(result, recipe, output, begin)
    return result


@dataclass(frozen=True)
class Run:
    """What the parts of a run have in common.

    Attributes:
        output: the run's folder.
        told: the command's progress.
        who: what the run is called there.
        validation_only: see `train`.
        alone: whether the command is about this run; else it is a baseline, or one of many.
    """

    recipe: Recipe
    output: Path
    told: Progress
    who: str
    validation_only: bool
    alone: bool

    def expect(self, prepared: Prepared) -> None:
        """Announce what the run will do."""
        recipe, splits = self.recipe, prepared.splits
        self.told.announce(work.names_of(recipe) if self.alone else [self.who])
        own = work.work_of(
            recipe, splits, len(prepared.train), len(prepared.general), validation_only=self.validation_only
        )
        for stage, units in own.items():
            self.told.expect(self.who, stage, units)
        for (who, stage), units in work.baselines_of(recipe, splits, own).items():
            self.told.expect(who, stage, units)

    def evaluated(self, what: str, values: Mapping[str, float]) -> None:
        """Show the main figures of the run at a moment other than an evaluation of the training."""
        if processes.is_first():
            self.told.evaluated(self.who, what, figures(values))


def _write(result: Result, recipe: Recipe, output: Path, begin: float) -> None:
    result.seconds["total"] = time.perf_counter() - begin
    result.peak_bytes = max(result.peak_bytes, memory.peak_bytes())
    if not processes.is_first():
        return
    result.write(output / "metrics.json")
    for name in ("best", "last"):
        if (output / name).is_dir():
            model_card.finish_adapter(output / name, recipe, result)


def _load(run: Run, prepared: Prepared) -> tuple[Any, Result]:
    """The untrained model with its adapter, and the result with what is known before training."""
    from peft import get_peft_model
    from transformers import set_seed

    recipe = run.recipe
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
        run.told.warn(line)
    result.quantization, result.base_bytes = recipe.model.quantization, base.get_memory_footprint()
    result.new_head, total = next(iter(messages), None), base.num_parameters()
    set_seed(recipe.seed)
    _, revision = models.reference(recipe.model)
    model = base if prepared.config is None else get_peft_model(base, prepared.config, revision=revision)
    result.parameters, result.adapter = _parameters(model, total), card.adapter_summary(model, recipe)
    return model if processes.to_be_sharded() else place(model), result


def _run(
    run: Run,
    prepared: Prepared,
    model: Any,
    result: Result,
    checkpoint: Path | None,
    signals: Signals,
    watch: Watch | None,
) -> None:
    from lily.recipes.scoring import evaluate, forgetting
    from lily.recipes.trainer import trainer as runner

    recipe, output, validation_only = run.recipe, run.output, run.validation_only
    splits, processor, config = prepared.splits, prepared.processor, prepared.config
    names = metric_tools.metrics_of(recipe)
    if validation_only:
        result.split = "validation"
    judge = evaluate.Judge(recipe, processor, splits.labels)
    scored = recipe.task == "sft" and any(name in metric_tools.SCORED for name in names)

    def judge_untrained(m: Any) -> None:
        with run.told.stage(run.who, "untrained"):
            judge_it(m)
        measured = run.told.estimate.done(run.who, "untrained")
        if config is not None and not validation_only:  # the trained model is judged on the same rows
            run.told.expect(run.who, "test", measured)
        if result.before:
            run.evaluated("untrained", result.before)

    def judge_it(m: Any) -> None:
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
        run.told,
        run.who,
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
    with run.told.stage(run.who, "training"):
        trainer.resume(checkpoint)
    run.told.end(run.who, "training")
    result.seconds["train"], result.peak_bytes = trainer.seconds, trainer.peak_bytes
    result.router = {name: value for name, value in trainer.health.routers.state.items() if name != "in_a_row"}
    model = trainer.usable
    save_adapter(model, output / "last", overwrite=True)
    result.adapter = card.adapter_summary(model, recipe)
    progress, metric = trainer.progress, names[0]
    if not progress.history or progress.history[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    run.told.end(run.who, "evaluation")
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
        with run.told.stage(run.who, "test"):
            load_weights(model, output / "best")
            result.final, review = judge(model, splits.held_out), judge.review
            _write_predictions(judge, result.split, output)
            tests = {name: judge(model, rows) for name, rows in splits.tests.items()}
            result.tests = test_sets.noted(tests, "final", result.tests)
            result.samples, lengths = evaluate.samples(
                model, processor, splits.held_out, recipe, "after", result.samples
            )
            result.review = review.with_answers(lengths)
        run.told.end(run.who, "test")
        run.evaluated(f"{result.split} rows", result.final)
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


def _baselines(run: Run, splits: Splits, resume: bool) -> dict[str, dict[str, float]]:
    from lily.recipes.scoring import baselines

    found: dict[str, dict[str, float]] = {}
    recipe, output, told = run.recipe, run.output, run.told
    for name in recipe.baselines:
        if name == "lora":
            if recipe.method == "lora":
                continue
            other = recipe.model_copy(update={"method": "lora", "baselines": [], "output": str(output / "lora")})
            begun = resume and processes.on_first((output / "lora" / "recipe.yaml").is_file)
            lora = train(other, resume=begun, overwrite=not begun, told=told, who=work.title(name, recipe))
            found[name] = {
                **lora.final,
                **card.adapter_costs(lora),
                **({"forgetting": lora.forgetting["increase"]} if lora.forgetting else {}),
            }
        else:
            who = work.title(name, recipe)
            with told.stage(who, "baseline"):
                found[name] = processes.on_first(partial(baselines.run, name, recipe, splits))
                if name != "frozen":
                    told.advance(len(splits.train) + len(splits.held_out), "fit")
            told.end(who)
            if processes.is_first():
                shown = {metric: value for metric, value in found[name].items() if metric != "seconds"}
                told.evaluated(who, f"{'test' if splits.test else 'validation'} rows", figures(shown))
    return found
