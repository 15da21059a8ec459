"""The measurements. Results are ratios within a round, in which each contestant is measured once."""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import nn

import lily
from lily.bench.contestants import STOCK, Contestant, sharing_weights
from lily.bench.subjects import Subject

Run = Callable[[int], float]  # round -> seconds, or bytes
INPUTS = 4  # number of different inputs; they alternate, so that no cache holds the last round's


@dataclass(frozen=True)
class Outcome:
    """The measurements of one contestant."""

    median: float  # over the rounds
    ratios: list[float]  # to the reference contestant, round by round

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)


def interleave(runs: Mapping[str, Run], reference: str, rounds: int, warm_up: int = 1) -> dict[str, Outcome]:
    """Measure all contestants in every round; each round starts with another one.

    Args:
        runs: contestant -> function that measures it once.
        reference: the contestant whose ratio is 1.
        rounds: number of rounds that count.
        warm_up: number of rounds before them.
    """
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = runs[name](turn)
            if turn >= 0:
                found[name].append(value)
    base = found[reference]
    return {
        name: Outcome(statistics.median(values), [v / b for v, b in zip(values, base, strict=True)])
        for name, values in found.items()
    }


@contextlib.contextmanager
def clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Measures the work on a device inside the block; the yielded function returns its seconds afterwards."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield lambda: start.elapsed_time(end) / 1000
        end.record()
        torch.cuda.synchronize(device)
        return
    started = time.perf_counter()
    taken = [0.0]
    yield lambda: taken[0]
    taken[0] = time.perf_counter() - started


def training_step(subject: Subject, contestant: Contestant) -> Callable[[int], None]:
    """Forward, backward and an AdamW step of the trainable parameters."""
    model = contestant.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6) if trainable else None
    batches = [subject.inputs(seed) for seed in range(INPUTS)]

    def step(turn: int) -> None:
        model(**batches[turn % INPUTS]).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def step_time(subject: Subject, contestant: Contestant) -> Run:
    """Seconds of a training step."""
    step = training_step(subject, contestant)

    def run(turn: int) -> float:
        with clock(subject.device) as seconds:
            step(turn)
        return seconds()

    return run


def step_memory(subject: Subject, contestant: Contestant) -> Run:
    """Peak bytes of a training step besides the frozen weights: adapter, optimizer state, activations."""
    step = training_step(subject, contestant)
    trainable = sum(p.numel() * p.element_size() for p in contestant.model.parameters() if p.requires_grad)

    def run(turn: int) -> float:
        if turn < 0:
            step(turn)  # creates the optimizer's state
        return 3 * trainable + peak(lambda: step(turn), subject.device)

    return run


def peak(work: Callable[[], None], device: torch.device) -> int:
    """Peak bytes of what `work` allocates, as the allocator counts them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    changes = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def prefill_time(subject: Subject, contestant: Contestant) -> Run:
    """Seconds of reading a prompt, or an image, without gradients."""
    model = contestant.model
    batches = [{k: v for k, v in subject.inputs(seed).items() if k != "labels"} for seed in range(INPUTS)]

    @torch.inference_mode()
    def run(turn: int) -> float:
        with _evaluating(model), clock(subject.device) as seconds:
            model(**batches[turn % INPUTS])
        return seconds()

    return run


def mixed_time(subject: Subject, contestant: Contestant) -> Run:
    """Seconds of a forward without gradients in which rows use an adapter, another one and the base model in turn."""
    frozen = {id(p): p for p in contestant.model.parameters() if not p.requires_grad}
    model: Any = copy.deepcopy(contestant.model, memo=frozen)  # what else is measured has one adapter
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.eval()
    batches = [{k: v for k, v in subject.inputs(seed).items() if k != "labels"} for seed in range(INPUTS)]
    rows = len(next(iter(batches[0].values())))
    names = list(itertools.islice(itertools.cycle(("default", "second", "__base__")), rows))

    @torch.inference_mode()
    def run(turn: int) -> float:
        with clock(subject.device) as seconds:
            model(**batches[turn % INPUTS], adapter_names=names)
        return seconds()

    return run


def decode_time(subject: Subject, contestant: Contestant, steps: int = 16) -> Run:
    """Seconds per token of decoding with a KV cache after a prompt; one sample."""
    model = contestant.model

    @torch.inference_mode()
    def run(turn: int) -> float:
        with _evaluating(model):
            ids = subject.inputs(turn % INPUTS)["input_ids"][:1]
            cache = model(input_ids=ids, use_cache=True).past_key_values
            last = ids[:, -1:]
            model(input_ids=last, past_key_values=cache, use_cache=True)
            with clock(subject.device) as seconds:
                for _ in range(steps):
                    model(input_ids=last, past_key_values=cache, use_cache=True)
            return seconds() / steps

    return run


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def files(subject: Subject, contestants: Sequence[Contestant], rounds: int) -> dict[str, dict[str, float]]:
    """Bytes of each adapter's weights file, and seconds that loading the adapter takes (median)."""
    found: dict[str, dict[str, float]] = {}
    for c in contestants:
        if not isinstance(c.model, peft.PeftModel):
            continue
        with TemporaryDirectory() as folder, _stock_registered(c.name == STOCK):
            c.model.save_pretrained(folder)
            seconds = []
            for _ in range(rounds):
                base = sharing_weights(subject.base)
                started = time.perf_counter()
                peft.PeftModel.from_pretrained(base, folder)
                seconds.append(time.perf_counter() - started)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        found[c.name] = {"bytes": float(size), "load_seconds": statistics.median(seconds)}
    return found


@contextlib.contextmanager
def _stock_registered(stock: bool) -> Iterator[None]:
    if stock:
        lily.unregister()
    try:
        yield
    finally:
        lily.register()
