"""Plain English, and one meaning a word: phrases that a reader cannot look up are not in the package or its docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

# What must not be written, and what to write instead. Matched case-insensitively, across line breaks.
REPLACEMENTS = {
    r"\btold of\b": "reported, warned about",
    r"\bheld against\b": "compared with, checked against",
    r"\bcould not be had\b": "could not be downloaded, is not available",
    r"\bstrangers?\b": "untrusted (files), another person's",
    r"\bof its own\b": "its own, separate, private",
    r"\blikewise\b": "also, in the same way",
    r"\bso many\b": "a number: say which",
    r"\bleave (it )?away\b": "drop, omit",
    r"\bfrom (which|where) on\b": "from the step at which, after which",
    r"\bbegin(s|ning)? anew\b": "start again, restart",
    r"\bfor want of\b": "because there is no",
    r"\bnone of its business\b": "ignored",
    r"\bin the light of\b": "after reading, given",
    r"\bwhich the adapter has not\b": "which the adapter lacks",
    r"optimis": "optimiz-",
    r"quantis": "quantiz-",
    r"initialis": "initializ-",
    r"normalis": "normaliz-",
    r"serialis": "serializ-",
    r"synchronis": "synchroniz-",
    r"regularis": "regulariz-",
    r"generalis": "generaliz-",
    r"stabilis": "stabiliz-",
    r"summaris": "summariz-",
    r"(un)?recognis": "recogniz-",
    r"\bcolour": "color-",
    r"\bbehaviours?\b": "behavior",
    r"\bcentred?\b": "center",
    r"\bneighbour": "neighbor-",
    r"\bfavour": "favor-",
    r"\bgrey\b": "gray",
}
SOURCES = sorted(
    path
    for pattern in (
        "src/**/*.py",
        "src/**/*.yaml",
        "docs/**/*.md",
        "docs/**/*.py",
        "benchmarks/*.py",
        "configs/**/*.yaml",
    )
    for path in ROOT.glob(pattern)
)
FILES = [*SOURCES, ROOT / "README.md", ROOT / "mkdocs.yml"]


def written(path: Path) -> list[tuple[int, str, str]]:
    """Line, phrase and replacement of everything in a file that should be written otherwise."""
    text = path.read_text("utf-8")
    return sorted(
        (text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), better)
        for phrase, better in REPLACEMENTS.items()
        for match in re.finditer(phrase.replace(" ", r"[\s#]+"), text, re.IGNORECASE)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_has_no_phrase_that_a_reader_cannot_look_up(path):
    found = [
        f"  {path.relative_to(ROOT)}:{line}: {phrase!r}; write: {better}" for line, phrase, better in written(path)
    ]
    assert not found, "\n" + "\n".join(found)


def test_a_phrase_is_found_across_a_line_break_and_in_capitals(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""One.\n\nTold\nof. Colour."""\n# held\n# against\n')
    assert [(line, phrase) for line, phrase, _ in written(file)] == [
        (3, "Told of"),
        (4, "Colour"),
        (5, "held # against"),
    ]
