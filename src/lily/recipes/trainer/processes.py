"""Several processes for one recipe (`accelerate launch`, `torchrun`): their order, and errors that end all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from lily.errors import ElsewhereError, LilyError
from lily.recipes.spec.locations import located
from lily.recipes.spec.schema import Recipe

T = TypeVar("T")


def alone() -> bool:
    """Whether there is one process only, found without importing torch where nothing else has."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    if "torch" not in sys.modules:
        return True
    from lily.distributed import world_size

    return world_size() == 1


def join() -> None:
    """Initialize the process group, if a launcher started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    if alone():
        return True
    from lily.distributed import rank

    return rank() == 0


def in_turn(work: Callable[[], T]) -> T:
    """Call `work` in every process: first in one of each machine, which fills the caches, then in the others.

    Raises:
        Exception: from `work` in this process.
        ElsewhereError: if it failed in another process; here it has not started then, or its result is dropped.
    """
    if alone():
        return work()
    import torch.distributed as dist

    from lily.distributed import world_size

    join()
    result: Any = None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    for turn in (local == 0, local != 0):
        result, error = _attempt(work) if turn else (result, None)
        errors: list[str | None] = [None] * world_size()
        dist.all_gather_object(errors, None if error is None else str(error))
        _raise(error, errors)
    return result  # type: ignore[no-any-return]


def on_first(work: Callable[[], T]) -> T:
    """Call `work` in the first process alone and return its result in all.

    Raises:
        Exception: from `work`, in the first process.
        ElsewhereError: then, in the others.
    """
    if alone():
        return work()
    from lily.distributed import from_first

    result, error = _attempt(work) if is_first() else (None, None)
    result, message = from_first((result, None if error is None else str(error)))
    _raise(error, [message])
    return result  # type: ignore[no-any-return]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _raise(error: Exception | None, errors: list[str | None]) -> None:
    """Raise the error of this process, or else one that names another process and its message."""
    if error is not None:
        raise error
    for index, message in enumerate(errors):
        if message is not None:
            raise ElsewhereError(f"process {index}: {message}")


def check(recipe: Recipe) -> None:
    """Check that these processes can run the recipe.

    Raises:
        LilyError: if they cannot split a batch equally, FSDP1 would flatten frozen and trained tensors into one, or
            the adapter starts from data on a sharded model.
    """
    from lily.distributed import world_size

    size, processes = recipe.train.batch_size, world_size()
    if size % processes:
        near = max(processes, size - size % processes)
        with located(recipe, "train", "batch_size"):
            raise LilyError(
                f"train.batch_size={size} is the batch over all processes, and {processes} of them cannot share it "
                f"equally; give a multiple, such as {near}"
            )
    fsdp1 = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") == "1"
    if fsdp1 and os.environ.get("FSDP_USE_ORIG_PARAMS", "true").lower() == "false":
        raise LilyError(
            "fsdp_use_orig_params is false, with which FSDP1 cannot hold trained tensors beside frozen ones; set it to "
            "true in the accelerate configuration, or use fsdp_version: 2 (see docs/distributed.md)"
        )
    if recipe.method == "lily" and recipe.lily.init_weights == "data" and to_be_sharded():
        with located(recipe, "lily", "init_weights"):
            raise LilyError(
                "data needs the whole model in each process, but the launcher shards it; use true or orthonormal, or "
                "train without FSDP and ZeRO-3"
            )

    if recipe.method == "lily" and recipe.lily.null_space is not None and to_be_sharded():
        with located(recipe, "lily", "null_space"):
            raise LilyError(
                "needs whole tensors, but the launcher shards them; remove it, or train without FSDP and ZeRO-3"
            )


def to_be_sharded() -> bool:
    """Whether the launcher's engine moves the model, or parts of it, to devices."""
    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or zero3
