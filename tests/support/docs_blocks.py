"""The docs' pages, their blocks, and the commands in them as a shell reads them."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from dataclasses import dataclass

from paths import ROOT

PAGES = {p.relative_to(ROOT).as_posix(): p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (not run|file): (.+?) -->$")

SHELLS = ("sh", "bash")
SHOWN = ("", "text")  # diagrams, and what a program prints


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: as in `PAGES`.
        line: of the fence.
        language: after the fence.
        text: without the page's indentation.
        reason: why it is not run, from the comment above it.
        file: the file that the reader saves it as, from the comment above it.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    file: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a shell block, and the variables that are set for it."""

    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]

    @property
    def ours(self) -> tuple[str, ...] | None:
        """The arguments of `lily`, or None. A launcher's `-m lily` counts."""
        if self.words[0] == "lily":
            return self.words[1:]
        for i, pair in enumerate(zip(self.words, self.words[1:], strict=False)):
            if pair == ("-m", "lily"):
                return self.words[i + 2 :]
        return None


def cells(page: str) -> list[tuple[str, ...]]:
    """The rows of a page's tables, without their headers."""
    rows = re.findall(r"^\|(.*)\|$", PAGES[page].read_text("utf-8"), re.MULTILINE)
    headers = [i - 1 for i, row in enumerate(rows) if set(row) <= set("-| ")]
    kept = [row for i, row in enumerate(rows) if i not in headers and i - 1 not in headers]
    return [tuple(cell.strip() for cell in row.split("|")) for row in kept]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, found = PAGES[page].read_text("utf-8"), []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1].strip()
        comment = COMMENT.match(before)
        note = {comment[1]: comment[2]} if comment else {}
        line = text.count("\n", 0, match.start()) + 1
        body = textwrap.dedent(match[3])
        found.append(Block(page, line, match[2], body, note.get("not run"), note.get("file")))
    return found


ALL = [block for page in PAGES for block in blocks(page)]

# With an empty PATH the shell passes every command to this handler, after expanding quotes, variables,
# comments and loops.
READER = """
command_not_found_handle() {
    { printf '%s\\0' "$@"; printf '\\1'; for name in $(compgen -e); do printf '%s=%s\\0' "$name" "${!name}"; done
      printf '\\2'; } >&3
}
PATH=/nowhere
"""


def commands(block: Block) -> list[Command]:
    """The commands of a shell block."""
    reader, writer = os.pipe()
    own = {"HOME": "/home/reader", "LILY_DATA": "$LILY_DATA"}
    try:
        done = subprocess.run(
            ["bash", "-c", f"exec 3>&{writer}\n{READER}{block.text}"],
            pass_fds=[writer],
            env=own,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as file:
        output = file.read()
    assert done.stderr == "", f"{block}: {done.stderr}"
    found = []
    for one in output.split("\2")[:-1]:
        words, _, variables = one.partition("\1")
        pairs = [tuple(pair.split("=", 1)) for pair in variables.split("\0")[:-1]]
        kept = [pair for pair in pairs if pair[0] not in {*own, "PATH", "PWD", "OLDPWD", "SHLVL", "_"}]
        found.append(Command(tuple(words.split("\0")[:-1]), tuple(kept)))
    return found
