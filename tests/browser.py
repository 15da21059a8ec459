"""A page in a real browser: what it looks like, and what the browser complains of."""

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
SIZE = (1200, 3000)


def screenshot(page: Path, colours: str, folder: Path) -> Any:
    """The page as a PIL image, `light` or `dark`; fails where the browser writes to its console."""
    from PIL import Image

    preference = {"light": "1", "dark": "0"}[colours]
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         f"--blink-settings=preferredColorScheme={preference}", f"--window-size={SIZE[0]},{SIZE[1]}",
         "--hide-scrollbars", "--enable-logging=stderr", f"--screenshot={folder / 'shot.png'}", page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(folder / "shot.png") as shot:
        return shot.convert("RGB")


def assert_drawn(shot: Any, colours: str) -> None:
    """The page fills the window, on a ground of the right lightness, and there is something on it."""
    assert shot.size == SIZE
    assert (shot.convert("L").getpixel((2, 2)) < 60) == (colours == "dark")
    assert len(shot.getcolors(1 << 22)) > 50
