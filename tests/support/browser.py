"""A page in a real browser: what it looks like, in a wide window, a narrow one and print, and what is complained of."""

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
# The body's padding; nothing but the ground is beside it, unless a page is broader than its window.
MARGIN = 20


def screenshot(page: Path, colours: str, folder: Path, width: int = WIDE) -> Any:
    """The page as a PIL image, `light` or `dark`; fails where the browser writes to its console."""
    from PIL import Image

    preference = {"light": "1", "dark": "0"}[colours]
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


def assert_drawn(shot: Any, colours: str, width: int = WIDE) -> None:
    """The page fills the window, on a ground of the right lightness, and there is something on it, none of it cut off.

    What is broader than the window would reach its right edge; the rows there are those of the ground alone.
    """
    assert shot.size == (width, HEIGHT)
    ground = shot.getpixel((2, 2))
    assert (shot.convert("L").getpixel((2, 2)) < 60) == (colours == "dark")
    assert len(shot.getcolors(1 << 22)) > 50
    edge = shot.crop((width - MARGIN // 2, 0, width, HEIGHT))
    assert edge.getcolors() == [(edge.size[0] * HEIGHT, ground)]


def assert_printed(pdf: bytes) -> None:
    """There are pages in it."""
    assert pdf.startswith(b"%PDF")
    assert b"/Type /Page" in pdf
