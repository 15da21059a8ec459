"""Pictures of a page of `lily inspect` for the docs: `python docs/hooks/screenshots.py PAGE.html [SECTION]`.

Writes docs/figures/insight-light.png (the page's beginning) and insight-dark.png (from SECTION on, by default `rank`).
Needs Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "figures"
WIDTH, HEIGHT = 900, 1150
SCHEMES = {"light": "1", "dark": "0"}


def main(page: str, section: str = "rank") -> None:
    """Draw the page twice."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("there is no chromium on this machine (Debian: apt-get install chromium)")
    text = Path(page).read_text("utf-8")
    for scheme, start in (("light", None), ("dark", section)):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "page.html"
            copy.write_text(text if start is None else text.replace("</head>", f"{_only_from(start)}</head>"), "utf-8")
            subprocess.run(
                [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--user-data-dir={folder}/profile", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
                 f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={FIGURES / f'insight-{scheme}.png'}",
                 copy.as_uri()],
                check=True, capture_output=True, timeout=180,
            )  # fmt: skip


def _only_from(section: str) -> str:
    """A style that hides what is before a section."""
    hidden, shown = "header,main>*{display:none!important}", "{display:block!important}"
    return f"<style>{hidden}#{section},#{section}~section{shown}</style>"


if __name__ == "__main__":
    main(*sys.argv[1:])
