"""What the figures of a run mean, in sentences, and which commands come next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from lily.recipes.loader import change_of, without_placeholders
from lily.recipes.results.card import method_title
from lily.recipes.results.result import Result, output_folder
from lily.recipes.results.standing import spoken
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, SHARES, better, noise, shown
from lily.recipes.scoring.review import only_class
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe

UNTRAINED = "the untrained model"
SEARCHED = ("train.learning_rate", "lily.scaling", "lora.alpha")  # around the recipe's own, not what did not do
WITHOUT = ("majority", "tfidf", "frozen")  # baselines that train no adapter


def verdict(result: Result) -> str:
    """How the adapter does against everything else that was judged on the same rows, in one sentence."""
    metric, own = result.metric, result.final.get(result.metric)
    rows = f"the {result.rows[result.split]:,} {result.split} rows"
    if own is None or math.isnan(own):
        return f"The {metric} on {rows} is not a number; see train.log."
    figure = f"{_title(result)} has {metric} {shown(metric, own)} on {rows}"
    if result.method == "none" and result.best is None:
        return f"{figure}; nothing was trained."
    others = _others(result)
    lora = [spoken("lora")] if spoken("lora") in others else []
    rest = [title for title in others if title not in lora]
    best = rest[:1]
    for title in rest[1:]:
        best = [title] if better(metric, others[title], others[best[0]]) else best
    clauses = [_against(result, own, title, others[title]) for title in (*lora, *best)]
    return f"{', '.join([figure, *clauses[:1]])}{''.join(f'; {clause}' for clause in clauses[1:])}."


def _against(result: Result, own: float, title: str, value: float) -> str:
    """How the adapter does against one other."""
    whom = f"{title} ({shown(result.metric, value)})"
    if own == value:
        return f"equal to {whom}"
    word = "better" if better(result.metric, own, value) else "worse"
    unsure = abs(own - value) < noise(result.metric, own, value, max(result.rows[result.split], 1))
    chance = ", which so few rows cannot tell from chance" if unsure else ""
    return f"{_difference(result.metric, own, value)} {word} than {whom}{chance}"


def how_sure(metric: str, value: float, rows: int) -> str:
    """How far a metric on a number of rows may be from that of all such rows, in a sentence."""
    if metric not in SHARES:
        return f"On {rows:,} rows; {metric}: {'less' if metric in LOWER_IS_BETTER else 'more'} is better."
    error = 2 * math.sqrt(max(value * (1 - value), 1 / (4 * max(rows, 1))) / max(rows, 1))
    return (
        f"{shown(metric, value)}% of {rows:,} rows are right; on other rows of the kind expect "
        f"{shown(metric, max(0.0, value - error))} to {shown(metric, min(1.0, value + error))}."
    )


def advice(result: Result, recipe: Recipe, typed: str, changes: Sequence[str]) -> Iterator[str]:
    """What to try, with the command to paste; nothing if nothing is remarkable."""
    kept = _without_output(changes)
    searched = [change for change in kept if change.partition("=")[0] not in SEARCHED]
    if (share := _cut_short(result, changes)) is not None:
        whole = [change for change in changes if not change.startswith("train.max_steps=")]
        yield (
            f"The training ended after {share:.0%} of the training rows (train.max_steps), so these figures say "
            f"little. All of it:\n  {command('train', typed, [*whole, _elsewhere(recipe, 'whole')])}"
        )
        return
    if still_improving(result):
        yield (
            f"It was still improving: the last evaluation was the best one. More training may help:\n"
            f"  {command('train', typed, [*changes, *_longer(recipe), _elsewhere(recipe, 'longer')])}"
        )
    classes = None if result.review is None else result.review.classes
    if (only := None if classes is None else only_class(classes.scores)) is not None:
        yield f"It predicts {only!r} for every row, so it tells no classes apart."
    ahead = [
        spoken(name, result.metric)
        for name in WITHOUT
        if name in result.baselines and _beats(result, result.baselines[name].get(result.metric))
    ]
    if ahead:
        verb = "is" if len(ahead) == 1 else "are"
        who = " and ".join(ahead)
        yield (
            f"{who[0].upper()}{who[1:]} {verb} ahead without an adapter: the learning rate or the scale does not suit "
            f"these data, or there are too few rows. Search them:\n"
            f"  {command('tune', typed, searched)}"
        )
    elif only is not None or _beats(result, result.before.get(result.metric)):
        why = "The training made the model worse: a lower learning rate" if only is None else "Another learning rate"
        yield f"{why} may help:\n  {command('tune', typed, searched)}"
    if result.method == "lily" and _beats(result, result.baselines.get("lora", {}).get(result.metric)):
        yield (
            "LoRA is ahead in this run. Each method at its own best learning rate and scale, over several seeds:\n"
            f"  {command('compare', typed, kept)} --tune"
        )


def _cut_short(result: Result, changes: Sequence[str]) -> float | None:
    """The share of the training rows that were seen, where the command line ended the training before all were."""
    asked = any(change.startswith("train.max_steps=") for change in changes)
    epoch = result.last["epoch"] if asked and result.last is not None else 1
    return epoch if epoch < 1 else None


def still_improving(result: Result) -> bool:
    """Whether the last evaluation is the best of several, and better than the one before it."""
    values = [entry[result.metric] for entry in result.history if result.metric in entry]
    if len(values) < 2 or result.best is None or result.last is None:
        return False
    last_is_best = result.best["epoch"] == result.last["epoch"]
    return last_is_best and better(result.metric, values[-1], values[-2])


def next_commands(
    result: Result, recipe: Recipe | DreamBooth, typed: str, changes: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Commands to paste, each with what it is for."""
    run = shlex.quote(str(output_folder(recipe)))
    if not isinstance(recipe, DreamBooth) and result.best is not None:
        if recipe.task == "sft":
            yield f"lily generate {run} --prompt 'your prompt'", "answers a prompt"
        else:
            rows = "images" if recipe.task == "image-classification" else "rows.csv"
            yield f"lily predict {run} --input {rows}", f"adds predictions to {rows} of your own"
        yield f"lily inspect {run} --report report.html", "a page: figures, curves, sharing, rank, routers"
    if result.method == "lily":
        dynamic = result.adapter.get("num_B", 1) != 1 and not str(result.adapter.get("routing")).startswith("static")
        if dynamic:
            yield f"lily collapse {run} --out {run}-static", "makes it static, so that it merges and exports"
        else:
            yield f"lily export {run} --to lora --out {run}-lora", "a LoRA for PEFT, vLLM and others"
        if not isinstance(recipe, DreamBooth):
            yield (
                command("compare", typed, _without_output(changes)),
                "against LoRA of equal size over three seeds, with tests",
            )


def command(verb: str, typed: str, changes: Sequence[str]) -> str:
    """A command about the same recipe."""
    last = {change.partition("=")[0]: change for change in changes}  # of two with one key the last counts
    return shlex.join(["lily", verb, typed, *last.values()])


def _without_output(changes: Sequence[str]) -> list[str]:
    """The changes for a command that writes elsewhere."""
    return [change for change in changes if not change.startswith("output=")]


def _longer(recipe: Recipe) -> list[str]:
    t = recipe.train
    return [f"train.max_steps={2 * t.max_steps}"] if t.max_steps else [f"train.epochs={2 * t.epochs:g}"]


def _elsewhere(recipe: Recipe, word: str) -> str:
    """A change of the output folder."""
    return change_of("output", f"{without_placeholders(output_folder(recipe))}-{word}")


def _title(result: Result) -> str:
    return {"lora": "LoRA", "none": "The model with a new head"}.get(result.method, method_title(result))


def _others(result: Result) -> dict[str, float]:
    """What else was judged on the same rows, by title."""
    named = {spoken(name, result.metric): values for name, values in result.baselines.items()}
    judged = {UNTRAINED: result.before, **named}
    values = {title: figures.get(result.metric) for title, figures in judged.items()}
    return {title: value for title, value in values.items() if value is not None and not math.isnan(value)}


def _beats(result: Result, value: float | None) -> bool:
    """Whether a value is better than the adapter's."""
    own = result.final.get(result.metric)
    return value is not None and own is not None and better(result.metric, value, own)


def _difference(metric: str, one: float, other: float) -> str:
    size = abs(one - other)
    return f"{size:.4f}" if metric in LOWER_IS_BETTER else f"{100 * size:.1f} points"
