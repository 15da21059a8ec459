"""Numbers with their nouns, and names in a list, as messages write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def counted(count: float, noun: str, plural: str = "") -> str:
    """A number and its noun: `1 row`, `1,204 rows`, `0.5 epochs`.

    Args:
        count: the number.
        noun: the noun for one.
        plural: the noun for another number; the other with an s if empty.
    """
    shown = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{shown} {noun if count == 1 else plural or f'{noun}s'}"


def joined(names: Sequence[str], last: str = "and") -> str:
    """All names: `a, b and c`."""
    return f" {last} ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are: `a, b, c and 5 more`."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most:,} more" if len(every) > most else "")
