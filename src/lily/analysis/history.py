"""Expert weights while an adapter learns: recorded at a few steps, kept in `routing.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily.callbacks.router_watch import RouterWatch
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.layers.routing_statistics import RoutingStatistics, all_reduce
from lily.tuner.adapter import Adapted, find

FILE = "routing.json"
# At most so many steps of a training are looked at unless `every` says otherwise: a router moves slowly, and a recorded
# step projects its inputs twice.
SNAPSHOTS = 100


def steps_looked_at(total: int) -> tuple[int, ...]:
    """The steps of a training that are looked at, counted from 0: none that the watch on the routers' health takes.

    Half to all of `SNAPSHOTS`, evenly spread; of a training of fewer steps than that, every second one.

    Args:
        total: steps of the training.
    """
    size = max(1, -(-total // SNAPSHOTS))
    if size == 1:
        return tuple(step for step in range(total) if not RouterWatch.wants(step, total))
    # the watch takes every second step at most, so the one after is free
    placed = (step + RouterWatch.wants(step, total) for step in range(1, total, size))
    return tuple(step for step in placed if step < total)


@dataclass(frozen=True)
class RoutingHistory:
    """Mean expert weights of the steps that were looked at.

    Attributes:
        steps: their numbers.
        tokens: layer -> tokens that went through it at each step, over all processes, (steps,).
        layers: layer -> mean weights at each step, (steps, E); equal ones where no token did.
    """

    steps: tuple[int, ...]
    tokens: dict[str, tuple[int, ...]]
    layers: dict[str, tuple[tuple[float, ...], ...]]

    def accumulated(self, layer: str) -> tuple[float, ...]:
        """Mean weights of a layer over all its tokens of all recorded steps, (E,); equal ones if it had none."""
        rows, tokens = self.layers[layer], self.tokens[layer]
        experts, total = len(rows[0]), sum(tokens)
        if not total:
            return (1 / experts,) * experts
        return tuple(sum(n * row[e] for n, row in zip(tokens, rows, strict=True)) / total for e in range(experts))

    def largest(self, layer: str) -> tuple[float | None, ...]:
        """Weight of a layer's most used expert at each step; None where no token went through the layer."""
        return tuple(max(row) if n else None for n, row in zip(self.tokens[layer], self.layers[layer], strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, file: str | Path) -> RoutingHistory:
        """Read `routing.json`.

        A file of an earlier version has one number of tokens for each step, which is then taken for every layer's.

        Raises:
            LilyError: if it is none.
        """
        try:
            values = json.loads(Path(file).read_text("utf-8"))
            steps = tuple(int(v) for v in values["steps"])
            layers = {
                str(name): tuple(tuple(float(w) for w in row) for row in rows)
                for name, rows in values["layers"].items()
            }
            counts = values["tokens"]
            counts = dict.fromkeys(layers, counts) if isinstance(counts, list) else counts
            tokens = {name: tuple(int(n) for n in counts[name]) for name in layers}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise LilyError(f"{file}: no record of routing ({type(error).__name__}: {error})") from None
        for name, rows in layers.items():
            widths = {len(row) for row in rows}
            if len(rows) != len(steps) or len(widths) > 1 or not all(math.isfinite(w) for row in rows for w in row):
                raise LilyError(f"{file}: the record of {name} is not one row of finite weights for each step")
            if len(tokens[name]) != len(steps):
                raise LilyError(f"{file}: {len(tokens[name])} numbers of tokens of {name} for {len(steps)} steps")
        return cls(steps, tokens, layers)


class RoutingCallback(TrainerCallback):  # type: ignore[misc]
    """Records the routing of a `Trainer`'s adapter: `Trainer(..., callbacks=[RoutingCallback()])`.

    Every checkpoint folder gets a `routing.json` of what was recorded so far, and `output_dir` one at the end. A
    resumed training goes on with its checkpoint's. Layers with constant weights have nothing to record.

    Args:
        every: look at every so many steps; default: at 50 to 100 of all (of fewer than 100, at every second), none of
            them one at which `lily.HealthCallback` looks.
        adapter: default: the active one.
    """

    def __init__(self, every: int | None = None, adapter: str | None = None) -> None:
        if every is not None and every < 1:
            raise LilyError(f"every={every} is not valid; give a positive number of steps")
        self.every, self.adapter = every, adapter
        self.found: Adapted | None = None
        self.history = RoutingHistory((), {}, {})
        self.recording = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Find the adapter; of a resumed training, what it had recorded.

        Raises:
            LilyError: if there is no adapter, or it is settling, which needs the same record.
        """
        self.found = find(_unwrapped(model), self.adapter)
        if self.found.config.settled is not None:
            raise LilyError("a routing that settles is recorded by SettleCallback already; leave RoutingCallback out")
        steps = range(0, state.max_steps, self.every) if self.every else steps_looked_at(state.max_steps)
        self.looked_at = frozenset(steps)
        self.history = RoutingHistory((), {}, {})
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and kept.is_file():
            self.history = RoutingHistory.load(kept)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before a step that is looked at."""
        if state.global_step not in self.looked_at or self.found is None or not self.found.config.dynamic:
            return
        for layer in self.found.layers.values():
            experts = layer.settings[self.found.name].num_B
            layer.statistics[self.found.name] = RoutingStatistics.empty(experts, training_only=True)
        self.recording = True
        self.found.watch_masks()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After it: note what was recorded."""
        found = self.found
        if found is None or not self.recording:
            return
        self.recording = False
        rows, tokens = dict(self.history.layers), dict(self.history.tokens)
        for name, layer in found.layers.items():
            # taken away by somebody else, perhaps; all processes must reduce alike
            nothing = RoutingStatistics.empty(layer.settings[found.name].num_B)
            seen = layer.statistics.pop(found.name, nothing)
            all_reduce(seen)
            tokens[name] = (*tokens.get(name, ()), int(seen.count.item()))
            rows[name] = (*rows.get(name, ()), tuple(seen.mean.tolist()))
        found.watch_masks()
        self.history = RoutingHistory((*self.history.steps, state.global_step), tokens, rows)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Into the checkpoint's folder."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Beside the checkpoints."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir))

    def write(self, folder: Path) -> None:
        """Put what was recorded so far into a folder; nothing, if that is nothing, or there already."""
        text, file = json.dumps(self.history.to_dict()), folder / FILE
        if self.history.steps and folder.is_dir() and not (file.is_file() and file.read_text("utf-8") == text):
            write_text(file, text)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what distributed training or a compiler put around it."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
