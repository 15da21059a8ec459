"""Lines of Python by folder, for docs/architecture.md: `python docs/hooks/lines.py` writes the table's last column."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lily"
PAGE = ROOT / "docs" / "architecture.md"
TABLE = re.compile(r"(<!-- lines -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def lines() -> Counter[str]:
    """Folder below src/lily -> lines of its Python files. The folders of recipes/ count separately."""
    counted: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts[:-1]
        folder = "/".join(parts[:2] if parts[:1] == ("recipes",) else parts[:1])
        counted[f"{folder}/" if folder else "files in lily/"] += len(path.read_text("utf-8").splitlines())
    return counted


def filled(markdown: str) -> str:
    """The page with the last column of its table computed again."""
    counted = lines()
    counted["**all**"] = sum(counted.values())

    def row(match: re.Match[str]) -> str:
        return f"| {match[1]} | {match[2]} | {counted[match[1].strip('`')]:,} |"

    def table(match: re.Match[str]) -> str:
        return match[1] + re.sub(r"^\| (\S.*?) \| ([\d,]+) \| [^|\n]*\|$", row, match[2], flags=re.MULTILINE) + match[3]

    return TABLE.sub(table, markdown)


def main() -> None:
    """Write the column into the page."""
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
