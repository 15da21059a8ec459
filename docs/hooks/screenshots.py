"""Pictures of a page of `lily inspect` for the docs: `python docs/hooks/screenshots.py PAGE.html [SECTION]`.

Writes docs/figures/insight-light.png (the page's beginning), insight-dark.png (from SECTION on, by default `rank`), and
insight.json, by which a test sees that pages look different by now. Needs Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[1] / "figures"
WIDTH, HEIGHT = 1000, 1150
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
    (FIGURES / "insight.json").write_text(json.dumps(looks(text), indent=1) + "\n", "utf-8")


def looks(text: str) -> dict[str, Any]:
    """What decides how a page looks, beside its run: the titles of its sections, and its style."""
    style = "".join(re.findall(r"<style>.*?</style>", text, re.S))
    return {
        "sections": re.findall(r"<h2[^>]*>(.*?)</h2>", text, re.S),
        "style": hashlib.sha256(style.encode()).hexdigest(),
    }


def _only_from(section: str) -> str:
    """A style that hides what is before a section."""
    hidden, shown = "header,main>*{display:none!important}", "{display:block!important}"
    return f"<style>{hidden}#{section},#{section}~section{shown}</style>"


if __name__ == "__main__":
    main(*sys.argv[1:])
