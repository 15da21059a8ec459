"""Where a recipe's keys were written, so that an error found in the light of data or model still names the line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from lily.errors import LilyError

Key = tuple[str, ...]


@dataclass(frozen=True)
class Places:
    """Where each key was written ("file:line", or an override's text). No part of what a recipe says: all are equal.

    Attributes:
        written: key -> place.
        overridden: the keys that the user gave beside the file, on the command line.
    """

    written: Mapping[Key, str] = field(default_factory=dict, compare=False)
    overridden: frozenset[Key] = field(default=frozenset(), compare=False)

    def of(self, key: Key) -> str | None:
        """Where `key`, or the nearest one above it, was written; None: nowhere, it is a default."""
        while key and key not in self.written:
            key = key[:-1]
        return self.written.get(key)


class LocatedError(LilyError):
    """An error that says already where the recipe is wrong."""


class Placed(Protocol):
    """A recipe of any kind."""

    @property
    def places(self) -> Places:
        """Where its keys were written."""


class located:
    """Within: an error gets the place of the recipe's key in front. The innermost of several such blocks wins.

    Args:
        recipe: knows where its keys were written; one built in code does not, and its errors stay as they are.
        key: path of the key to blame.
    """

    def __init__(self, recipe: Placed, *key: str) -> None:
        self.recipe, self.key = recipe, key

    def __enter__(self) -> located:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, LilyError) or isinstance(error, LocatedError):
            return
        if (place := self.recipe.places.of(self.key)) is not None:
            name, said = ".".join(self.key), str(error)
            raise LocatedError(f"{place}: {said}" if name in said else f"{place}: {name}: {said}") from None
