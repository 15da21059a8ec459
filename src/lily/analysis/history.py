"""Expert weights during training, recorded at a few steps in `routing.json`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily.callbacks.router_watch import RouterWatch
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.layers.routing_statistics import RoutingStatistics, all_reduce
from lily.tuner.adapter import Adapted, find

FILE = "routing.json"
# Largest number of recorded steps by default: routers change slowly, and a recorded step projects its inputs twice.
SNAPSHOTS = 100


def steps_recorded(total: int) -> tuple[int, ...]:
    """The recorded steps of a training of `total` steps, counted from 0, without those that `RouterWatch` samples.

    Between half of and all `SNAPSHOTS`, evenly spaced; every second step of a shorter training.
    """
    size = max(1, -(-total // SNAPSHOTS))
    if size == 1:
        return tuple(step for step in range(total) if not RouterWatch.wants(step, total))
    # the watch samples at most every second step, so the next one is free
    shifted = (step + RouterWatch.wants(step, total) for step in range(1, total, size))
    return tuple(step for step in shifted if step < total)


@dataclass(frozen=True)
class RoutingHistory:
    """Mean expert weights at the recorded steps.

    Attributes:
        steps: step numbers.
        tokens: layer -> number of its tokens at each step, over all processes, (steps,).
        layers: layer -> mean weights at each step, (steps, E); equal weights if it had no token.
    """

    steps: tuple[int, ...]
    tokens: dict[str, tuple[int, ...]]
    layers: dict[str, tuple[tuple[float, ...], ...]]

    def accumulated(self, layer: str) -> tuple[float, ...]:
        """Mean weights of a layer over its tokens of all recorded steps, (E,); equal weights if it had none."""
        rows, tokens = self.layers[layer], self.tokens[layer]
        experts, total = len(rows[0]), sum(tokens)
        if not total:
            return (1 / experts,) * experts
        return tuple(sum(n * row[e] for n, row in zip(tokens, rows, strict=True)) / total for e in range(experts))

    def largest(self, layer: str) -> tuple[float | None, ...]:
        """Weight of a layer's most used expert at each step; None where the layer had no token."""
        return tuple(max(row) if n else None for n, row in zip(self.tokens[layer], self.layers[layer], strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, file: str | Path) -> RoutingHistory:
        """Read `routing.json`.

        Files of earlier versions have one number of tokens per step, which is used for every layer.

        Raises:
            LilyError: if it is not such a file.
        """
        try:
            values = json.loads(Path(file).read_text("utf-8"))
            steps = tuple(int(v) for v in values["steps"])
            layers = {str(n): tuple(tuple(map(float, row)) for row in rows) for n, rows in values["layers"].items()}
            counts = values["tokens"]
            counts = dict.fromkeys(layers, counts) if isinstance(counts, list) else counts
            tokens = {name: tuple(int(n) for n in counts[name]) for name in layers}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise LilyError(f"{file}: not a routing history ({type(error).__name__}: {error})") from None
        for name, rows in layers.items():
            widths = {len(row) for row in rows}
            if len(rows) != len(steps) or len(widths) > 1 or not all(math.isfinite(w) for row in rows for w in row):
                raise LilyError(f"{file}: the weights of {name} are not one row of finite numbers per step")
            if (count := len(tokens[name])) != len(steps):
                raise LilyError(f"{file}: {count} token counts of {name}, expected {len(steps)}, one per step")
        return cls(steps, tokens, layers)


class RoutingCallback(TrainerCallback):  # type: ignore[misc]
    """Records the routing of a `Trainer`'s adapter: `Trainer(..., callbacks=[RoutingCallback()])`.

    Every checkpoint folder gets a `routing.json` with the steps so far, and `output_dir` one at the end. A resumed
    training continues that of its checkpoint. Layers with constant weights are not recorded.

    Args:
        every: number of steps from one recorded step to the next; default: 50 to 100 steps of the training (every
            second step if it has fewer than 100), without those that `lily.HealthCallback` samples.
        adapter: name of the adapter; default: the active one.
    """

    def __init__(self, every: int | None = None, adapter: str | None = None) -> None:
        if every is not None and every < 1:
            raise LilyError(f"every={every} is not valid; give a positive number of steps")
        self.every, self.adapter = every, adapter
        self.adapted: Adapted | None = None
        self.history = RoutingHistory((), {}, {})
        self.recording = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Find the adapter, and load the history if the training is resumed.

        Raises:
            LilyError: if there is no adapter, or it is settling: SettleCallback records the same statistics.
        """
        self.adapted = find(model, self.adapter)
        if self.adapted.config.settled is not None:
            raise LilyError("a routing that settles is recorded by SettleCallback already; remove RoutingCallback")
        steps = range(0, state.max_steps, self.every) if self.every else steps_recorded(state.max_steps)
        self.recorded_steps = frozenset(steps)
        self.history = RoutingHistory((), {}, {})
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and kept.is_file():
            self.history = RoutingHistory.load(kept)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start recording if this step is recorded."""
        if state.global_step not in self.recorded_steps or self.adapted is None or not self.adapted.config.dynamic:
            return
        for layer in self.adapted.layers.values():
            experts = layer.settings[self.adapted.name].num_B
            layer.statistics[self.adapted.name] = RoutingStatistics.empty(experts, training_only=True)
        self.recording = True
        self.adapted.watch_masks()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the recorded statistics to the history."""
        adapted = self.adapted
        if adapted is None or not self.recording:
            return
        self.recording = False
        rows, tokens = dict(self.history.layers), dict(self.history.tokens)
        for name, layer in adapted.layers.items():
            # another callback may have removed them; all processes must reduce the same tensors
            nothing = RoutingStatistics.empty(layer.settings[adapted.name].num_B)
            statistics = layer.statistics.pop(adapted.name, nothing)
            all_reduce(statistics)
            tokens[name] = (*tokens.get(name, ()), int(statistics.count.item()))
            rows[name] = (*rows.get(name, ()), tuple(statistics.mean.tolist()))
        adapted.watch_masks()
        self.history = RoutingHistory((*self.history.steps, state.global_step), tokens, rows)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the history into the checkpoint's folder."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the history into `output_dir`."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir))

    def write(self, folder: Path) -> None:
        """Write the history into a folder, unless it is empty or the file is up to date."""
        text, file = json.dumps(self.history.to_dict()), folder / FILE
        if self.history.steps and folder.is_dir() and not (file.is_file() and file.read_text("utf-8") == text):
            write_text(file, text)
