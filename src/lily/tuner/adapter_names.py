"""PEFT's argument `adapter_names` of `forward` and `generate`: which adapter each row of the batch uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lily.errors import LilyError
from lily.layers.mixed_batch import check_names, rows_of
from lily.tuner import call_uncalled


@contextmanager
def rows_by_name(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within: the rows of a batch use the adapters that the call names; without names, the active ones.

    Args:
        model: the adapted model.
        arguments: keyword arguments of the call.

    Raises:
        LilyError: if a name is unknown, or the adapters cannot be mixed.
    """
    names = arguments.get("adapter_names")
    if names is None:
        yield
        return
    check_names(model, names)
    if read := call_uncalled.applied(model):
        raise LilyError(
            f"adapter_names: {read} is read without being called, so its rows cannot use different adapters; call "
            "the model once for each adapter"
        )
    given = arguments.get("generation_config")
    counts = (arguments.get(key) or getattr(given, key, None) for key in ("num_beams", "num_return_sequences"))
    copies = max([1, *(count for count in counts if isinstance(count, int))])
    with rows_of(model, names, copies), _saved_modules_of(model, names, copies):
        yield


@contextmanager
def _saved_modules_of(model: nn.Module, names: list[str], copies: int) -> Iterator[None]:
    """Within: what is trained whole beside an adapter gets the names with its input."""

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        n = copies if args and len(args[0]) == copies * len(names) else 1
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(n)]}

    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    handles = [m.register_forward_pre_hook(give, with_kwargs=True) for m in wrappers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
