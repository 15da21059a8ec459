"""Lily and LoRA of equal size over learning rates and scales: settings, and the runs that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lily.recipes import methods, preflight
from lily.recipes.spec.schema import Recipe
from lily.search import folder
from lily.search.runner import Job, run, side_by_side
from lily.tune.space import changed, rounded


@dataclass(frozen=True)
class Setting:
    """A contestant at one learning rate and scale; the contestant `LoRA` is LoRA, any other Lily.

    Attributes:
        contestant: name in tables.
        rate: learning rate.
        scale: what multiplies the update: Lily's scaling, LoRA's alpha over its rank.
        decay: weight decay.
        dropout: on the adapter's input.
        seed: None: the recipe's.
    """

    contestant: str
    rate: float
    scale: float
    decay: float = 0.0
    dropout: float = 0.0
    seed: int | None = None

    @property
    def name(self) -> str:
        more = f"-decay{self.decay:g}" * bool(self.decay) + f"-dropout{self.dropout:g}" * bool(self.dropout)
        more += "" if self.seed is None else f"-seed{self.seed}"
        method = "lora" if self.contestant == "LoRA" else "lily"
        return f"{method}-rate{self.rate:g}-scale{self.scale:g}{more}"

    def recipe(self, base: Recipe, rank: int) -> Recipe:
        """The recipe with this setting; `rank` is LoRA's."""
        train = {"weight_decay": self.decay}
        seed = {} if self.seed is None else {"seed": self.seed}
        if self.contestant == "LoRA":
            lora = {"learning_rate": self.rate, "alpha": rounded(self.scale * rank)}
            return changed(base, {"lora": lora, "train": train}, method="lora", **seed)
        lily = {"learning_rate": self.rate, "scaling": self.scale, "dropout": self.dropout}
        return changed(base, {"lily": lily, "train": train}, method="lily", **seed)


def lora_rank(base: Recipe) -> int:
    """The rank of the LoRA that is as large as the recipe's Lily."""
    lora: Any = methods.peft_config(changed(base, {}, method="lora"), preflight.prepare(base).meta)
    return int(lora.r)


def train(base: Recipe, rank: int, settings: Sequence[Setting], out: Path, jobs: int) -> dict[Setting, Path]:
    """The settings whose runs are finished, after training those that are not, `jobs` at a time; 0 trains nothing."""
    listed = {s: out / "runs" / s.name for s in settings}
    runs = [Job(s.name, folder.inside(s.recipe(base, rank), at), at, trial=True) for s, at in listed.items()]
    if jobs:
        run_all(runs, out, jobs)
    return {s: at for (s, at), job in zip(listed.items(), runs, strict=True) if job.done}


def run_all(runs: Sequence[Job], out: Path, jobs: int) -> None:
    """Train the runs that are not finished, `jobs` at a time."""
    count, threads = side_by_side(jobs)
    with folder.opened(out, "a benchmark", ("runs", "recipes", "logs")) as lock:
        run(runs, out, count, threads, lock, partial(print, flush=True))
