"""Links that lead out of docs/: the site has no repository beside it, so the linked files are copied."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"(\]\(<?)([^)\s>#]+)(#[^)\s>]*)?(>?\))")
FENCED = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)

# Pages of the repository that have a page of the site.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changes.md"}


def outside(markdown: str, page: str) -> set[str]:
    """The files of the repository, outside docs/, that a page links to, as paths from the repository's root.

    Args:
        markdown: the page's text.
        page: its path below docs/.
    """
    found = {_target(m[2], page) for part in _prose(markdown) for m in LINK.finditer(part)}
    return {target for target in found if target is not None}


def rewritten(markdown: str, page: str) -> str:
    """The page's text with its links out of docs/ leading to the copies."""
    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(lambda m: _link(m, page), part) for part in parts)


def place(target: str) -> str:
    """The path of a file of the repository on the site."""
    return PAGES.get(target, f"files/{target}")


def _prose(markdown: str) -> Iterator[str]:
    return (part for part in FENCED.split(markdown) if not part.startswith("```"))


def _target(link: str, page: str) -> str | None:
    if re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _link(match: re.Match[str], page: str) -> str:
    target = _target(match[2], page)
    if target is None:
        return match[0]
    to = posixpath.relpath(place(target), posixpath.dirname(page) or ".")
    return f"{match[1]}{to}{match[3] or ''}{match[4]}"


def check(root: Path, target: str) -> Path:
    """The linked file.

    Raises:
        FileNotFoundError: if it does not exist or is a folder.
    """
    path = root / target
    if not path.is_file():
        raise FileNotFoundError(f"a page links to {target}, which is not a file of the repository")
    return path
