"""Several processes that run one recipe (`accelerate launch`, `torchrun`): who goes first, and how errors end all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lily.distributed import from_first, rank, world_size
from lily.errors import ElsewhereError, LilyError
from lily.recipes.spec.places import located
from lily.recipes.spec.schema import Recipe

T = TypeVar("T")


def join() -> None:
    """Meet the other processes, if a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return rank() == 0


def in_turn(work: Callable[[], T]) -> T:
    """`work()` in every process: first in one of each machine, which fills the caches, then in the others.

    Raises:
        Exception: what `work` raised here.
        ElsewhereError: if it raised in another process; it has not begun here then, or its result is dropped.
    """
    join()
    if world_size() == 1:
        return work()
    found: Any = None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    for turn in (local == 0, local != 0):
        error: Exception | None = None
        if turn:
            try:
                found = work()
            except Exception as raised:
                error = raised
        failed: list[Any] = [None] * world_size()
        dist.all_gather_object(failed, None if error is None else str(error))
        if error is not None:
            raise error
        if any(said is not None for said in failed):
            number = next(i for i, said in enumerate(failed) if said is not None)
            raise ElsewhereError(f"process {number}: {failed[number]}")
    return found  # type: ignore[no-any-return]


def on_first(work: Callable[[], T]) -> T:
    """`work()` in the first process alone; all get what it returns.

    Raises:
        Exception: what `work` raised, in the first process.
        ElsewhereError: then, in the others.
    """
    if world_size() == 1:
        return work()
    found, error = None, None
    if is_first():
        try:
            found = work()
        except Exception as raised:
            error = raised
    found, said = from_first((found, None if error is None else str(error)))
    if error is not None:
        raise error
    if said is not None:
        raise ElsewhereError(f"process 0: {said}")
    return found  # type: ignore[no-any-return]


def check(recipe: Recipe) -> None:
    """Refuse what these processes cannot run.

    Raises:
        LilyError: if they cannot share a batch equally, or FSDP1 is to make one tensor of frozen and trained ones.
    """
    size, world = recipe.train.batch_size, world_size()
    if size % world:
        near = max(world, size - size % world)
        with located(recipe, "train", "batch_size"):
            raise LilyError(
                f"train.batch_size={size} is the batch over all processes, and {world} of them cannot share it "
                f"equally; give a multiple, such as {near}"
            )
    fsdp1 = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") == "1"
    if fsdp1 and os.environ.get("FSDP_USE_ORIG_PARAMS", "true").lower() == "false":
        raise LilyError(
            "fsdp_use_orig_params is false, with which FSDP1 cannot hold trained tensors beside frozen ones; set it to "
            "true in the accelerate configuration, or use fsdp_version: 2 (see docs/distributed.md)"
        )


def to_be_sharded() -> bool:
    """Whether the launcher's engine will put the model, or parts of it, where they belong."""
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or zero3
