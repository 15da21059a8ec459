"""Render a page in headless Chromium: screenshots of wide and narrow windows, print, and console errors."""

from __future__ import annotations

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
WIDE, NARROW = 1200, 400
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


def _browse(page: Path, folder: Path, *options: str) -> None:
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", *options, page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr


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
