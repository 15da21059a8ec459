"""Render a page in headless Chromium: screenshots of wide and narrow windows, print, and console errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
HEIGHT = 3000
WIDE, NARROW = 1280, 390
# The body's padding, which shows only background unless the page is wider than its window.
MARGIN = 20


def screenshot(page: Path, colors: str, folder: Path, width: int = WIDE) -> Any:
    """The page as a PIL image, `light` or `dark`; fails if the browser writes to its console."""
    from PIL import Image

    preference = {"light": "1", "dark": "0"}[colors]
    _browse(page, folder, f"--blink-settings=preferredColorScheme={preference}", f"--window-size={width},{HEIGHT}",
            "--hide-scrollbars", f"--screenshot={folder / 'shot.png'}")  # fmt: skip
    with Image.open(folder / "shot.png") as shot:
        return shot.convert("RGB")


def printed(page: Path, folder: Path) -> bytes:
    """The page as a PDF."""
    _browse(page, folder, "--no-pdf-header-footer", f"--print-to-pdf={folder / 'page.pdf'}")
    return (folder / "page.pdf").read_bytes()


# Run in a copy of the page: what sticks out of the window, of its scroll box or of its picture.
MEASURE = """
const wide = [];
for (const box of document.querySelectorAll("details")) box.open = true;
const edge = document.documentElement.clientWidth;
for (const e of document.querySelectorAll("main *, header *")) {
  if (e.closest("svg") && e.tagName !== "svg") continue;
  if (e.closest(".scroll, .wide") && !e.matches(".scroll, .wide")) continue;
  const r = e.getBoundingClientRect();
  if (r.width && (r.right > edge + 1 || r.left < -1)) wide.push("window: " + e.tagName + " " + e.className);
}
for (const e of document.querySelectorAll(".scroll, .wide"))
  if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "auto") wide.push("box: " + e.innerText);
for (const svg of document.querySelectorAll("svg")) {
  const v = svg.viewBox.baseVal, own = svg.getBoundingClientRect();
  for (const t of svg.querySelectorAll("text")) {
    const r = t.getBoundingClientRect();
    const across = r.left < own.left - 1 || r.right > own.right + 1;
    const down = r.top < own.top - 1 || r.bottom > own.bottom + 1;
    if (r.width && (across || down)) wide.push("picture: " + t.textContent);
  }
}
if (window.innerWidth != WIDTH) wide.push("the window has " + window.innerWidth);
parent.postMessage(JSON.stringify(wide), "*");
"""


def assert_nothing_cut(page: Path, folder: Path, width: int) -> None:
    """Nothing is wider than the window, but in a box that scrolls; and no text is outside of its picture."""
    text = re.sub("<meta http-equiv[^>]*>", "", page.read_text("utf-8"))  # which forbids scripts
    script = f"<script>const WIDTH = {width};{MEASURE}</script>"
    (folder / "measured.html").write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    # a window has at least 500 pixels, a frame may have fewer
    frame = folder / "frame.html"
    frame.write_text(
        "<pre id=found></pre><script>onmessage = e => { found.textContent = e.data }</script>"
        f'<iframe src="measured.html" width="{width}" height="{HEIGHT}" style="border:0"></iframe>'
    )
    found = _browse(frame, folder, f"--window-size={WIDE + 100},{HEIGHT}", "--virtual-time-budget=5000", "--dump-dom")
    cut = re.search('<pre id="found">(.*?)</pre>', found, re.DOTALL)
    assert cut is not None, found[-2000:]
    assert cut[1] == "[]", cut[1]


def _browse(page: Path, folder: Path, *options: str) -> str:
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", *options, page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def assert_drawn(shot: Any, colors: str, width: int = WIDE) -> None:
    """The page fills the window, with a background of the right lightness, content, and nothing cut off.

    Content wider than the window would reach its right edge, so the columns there must be background only.
    """
    assert shot.size == (width, HEIGHT)
    background = shot.getpixel((2, 2))
    assert (shot.convert("L").getpixel((2, 2)) < 60) == (colors == "dark")
    assert len(shot.getcolors(1 << 22)) > 50
    edge = shot.crop((width - MARGIN // 2, 0, width, HEIGHT))
    assert edge.getcolors() == [(edge.size[0] * HEIGHT, background)]


def assert_printed(pdf: bytes) -> None:
    """The PDF contains pages."""
    assert pdf.startswith(b"%PDF")
    assert b"/Type /Page" in pdf
