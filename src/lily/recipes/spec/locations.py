"""File and line of a recipe's keys, so that errors about the data or the model name them too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from lily.errors import LilyError

Key = tuple[str, ...]


@dataclass(frozen=True)
class KeyLocations:
    """The location of each key: "file:line", or the text of an override. Recipes compare equal regardless of it.

    Attributes:
        written: key -> location.
        overridden: the keys that were set on the command line.
        files: the recipe's own file, then the one that it extends, and so on; keys from others are inherited. Empty for
            a recipe that was not read from a file.
    """

    written: Mapping[Key, str] = field(default_factory=dict, compare=False)
    overridden: frozenset[Key] = field(default=frozenset(), compare=False)
    files: tuple[str, ...] = field(default=(), compare=False)

    @property
    def file(self) -> str:
        """The recipe's own file; empty for a recipe that was not read from one."""
        return self.files[0] if self.files else ""

    def of(self, key: Key) -> str | None:
        """The location of `key`, or of the nearest key above it; None for a default."""
        while key and key not in self.written:
            key = key[:-1]
        return self.written.get(key)

    def origin(self, key: Key) -> str:
        """The file that a written key is in."""
        return self.written.get(key, "").rpartition(":")[0]


class LocatedError(LilyError):
    """An error whose message already names the location."""


class HasLocations(Protocol):
    """A recipe of any kind."""

    @property
    def locations(self) -> KeyLocations:
        """The locations of its keys."""


@contextmanager
def located(recipe: HasLocations, *key: str) -> Iterator[None]:
    """Within: errors start with the location of a key of the recipe. If nested, the innermost counts.

    Args:
        recipe: one that was built in code has no locations; its errors are not changed.
        key: path of the key.
    """
    try:
        yield
    except LocatedError:
        raise
    except LilyError as error:
        if (location := recipe.locations.of(key)) is None:
            raise
        name, text = ".".join(key), str(error)
        raise LocatedError(f"{location}: {text}" if name in text else f"{location}: {name}: {text}") from None
