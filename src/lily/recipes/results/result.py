"""The result of a run (`Result`), and the folder that it is written to."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lily.io.atomic import write_text
from lily.recipes.data.summary import Summary
from lily.recipes.models.precision import precision_of
from lily.recipes.scoring import test_sets
from lily.recipes.scoring.review import Review
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe


@dataclass
class Result:
    """The result of a run, as written to `metrics.json`.

    Attributes:
        metric: the main metric, which chose the best checkpoint.
        split: that `before` and `final` are measured on: test, or validation where there is no test.
        before: all metrics of the untrained model on that split.
        final: all metrics of the best adapter on that split.
        tests: the same two for each further test set, and their mean: name -> before or final -> metrics.
        best: epoch and value of the main metric on the validation rows.
        last: the same after the last epoch.
        parameters: trainable ones of the adapter and of a new head, and those of the frozen model.
        quantization: of the frozen model.
        base_bytes: of the frozen model in memory.
        seconds: training alone, and the whole run.
        peak_bytes: peak memory of the whole run; see `lily.recipes.trainer.memory`.
        baselines: name -> metrics (and parameters and seconds, where it was trained).
        history: all evaluations on the validation rows.
        rows: part -> number of rows that train or are judged; `data` has those that are left out.
        data: rows, classes, lengths and repeats of each part; None for dreambooth.
        router: the last sample of `lily.callbacks.router_watch`.
        new_head: the message printed where the model's head was replaced by one of another size.
        forgetting: mean loss per token of general text `before` training, after it (`last`), with the best adapter
            (`after`) and the difference (`increase`); empty: not measured.
        samples: prompts with the expected answer and the answers before and after training.
        review: what is wrong on that split with the best adapter: by class, the worst mistakes, answers that were cut;
            None where it was not evaluated there.
    """

    name: str
    method: str
    task: str
    seed: int
    metric: str
    split: str
    labels: list[str] | None
    before: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    tests: test_sets.Figures = field(default_factory=dict)
    best: dict[str, float] | None = None
    last: dict[str, float] | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    adapter_bytes: int = 0
    quantization: str = "none"
    base_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    data: Summary | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    precision: str = ""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    router: dict[str, Any] = field(default_factory=dict)
    new_head: str | None = None
    forgetting: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    review: Review | None = None

    def write(self, path: Path) -> None:
        """Write `metrics.json` atomically."""
        write_text(path, json.dumps(asdict(self), indent=2))


def started(recipe: Recipe | DreamBooth, metric: str, split: str, packages: Sequence[str] = ()) -> Result:
    """A result without figures: of which recipe, and on what device, precision and versions of packages it runs."""
    import torch

    result = Result(recipe.name, recipe.method, recipe.task, recipe.seed, metric, split, None)
    result.device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    result.precision = precision_of(recipe)
    names = ("lily-peft", "peft", "torch", "transformers", *packages)
    result.versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return result


def output_folder(recipe: Recipe | DreamBooth) -> Path:
    """The run's folder, with the placeholders replaced."""
    return Path(recipe.output.format(name=recipe.name, method=recipe.method, seed=recipe.seed)).expanduser()
