"""One training run of `benchmarks/structure.py`: an adapter on a small task, and what it learned and forgot."""

from __future__ import annotations

import math
import random
import resource
import time
from dataclasses import dataclass
from typing import Any

import structure_tasks as tasks
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 32
HEAD_RATE = 2e-3  # the head is not what is compared
WARMUP = 0.06
CURVE = 12  # points of the training loss


@dataclass(frozen=True)
class Run:
    """A run; its fields are the key of its row.

    Attributes:
        task: key of `structure_tasks.TASKS`.
        arm: name of the method.
        size: parameters, as the rank of the LoRA that has as many.
        options: of `LilyConfig`, or of `LoraConfig`, with the rank and the scale in it.
        rate: learning rate of the adapter (AdamW).
        seed: of the adapter's start, the head's, and the order of the rows.
    """

    task: str
    arm: str
    size: float
    options: tuple[tuple[str, Any], ...]
    rate: float
    seed: int


def adapt(model: nn.Module, run: Run, targets: list[str]) -> tuple[nn.Module, int]:
    """The model with the run's adapter, and the adapter's parameters."""
    from peft import LoraConfig, get_peft_model

    from lily import LilyConfig

    options = dict(run.options)
    made = LoraConfig if options.pop("method") == "lora" else LilyConfig
    head = ["classifier"] if hasattr(model, "classifier") else None
    adapted = get_peft_model(model, made(target_modules=targets, modules_to_save=head, **options))
    size = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and "classifier" not in n)
    return adapted, size


def train(run: Run) -> dict[str, Any]:
    """Train and judge one run: its row without the key."""
    torch.set_num_threads(1)
    task = tasks.TASKS[run.task]
    rows = task.rows(task.train)
    torch.manual_seed(run.seed)
    model, targets = tasks.load(task.model, rows.classes)
    batches = tasks.Batches(task, BATCH)
    before = tasks.embeddings(model, batches) if batches.text else None
    model, size = adapt(model, run, targets)
    training = batches.encode(rows.train)
    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    own = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    groups = [{"params": own, "lr": run.rate}, {"params": head, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = task.epochs * (len(training) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (WARMUP * steps)) * (steps - step) / steps
    )
    losses: list[float] = []
    order, started = random.Random(run.seed), time.perf_counter()
    model.train()
    for inputs, labels in (batch for _ in range(task.epochs) for batch in batches.epoch(training, order)):
        loss = F.cross_entropy(model(**inputs).logits, labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(own + head, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    every = max(1, len(losses) // CURVE)
    found: dict[str, Any] = {
        "parameters": size,
        "steps": len(losses),
        "curve": [
            round(sum(losses[i : i + every]) / len(losses[i : i + every]), 4) for i in range(0, len(losses), every)
        ],
        "seconds": round(seconds, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "diverged": not math.isfinite(losses[-1]),
    }
    if before is not None:  # 0: nothing is forgotten; as much as sentences may differ: everything
        found["drift"] = round(float(1 - (before * tasks.embeddings(model, batches)).sum(1).mean()), 5)
    if task.probe:
        return found | {"validation": judged(model, batches, training)}
    return found | {
        "validation": judged(model, batches, batches.encode(rows.validation)),
        "test": judged(model, batches, batches.encode(rows.test), keep=True),
    }


@torch.no_grad()
def judged(model: nn.Module, batches: tasks.Batches, rows: list[tuple[Any, int]], keep: bool = False) -> dict[str, Any]:
    """Mean loss and accuracy (%) on rows; with `keep` also which rows are right, as a string of 0 and 1."""
    model.eval()
    losses, right = [], []
    for inputs, labels in batches.all(rows):
        logits = model(**inputs).logits
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(-1) == labels).tolist()
    found: dict[str, Any] = {
        "loss": round(sum(losses) / len(losses), 5),
        "accuracy": round(100 * sum(right) / len(right), 3),
    }
    return found | ({"right": "".join("01"[r] for r in right)} if keep else {})
