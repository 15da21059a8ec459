"""No page of the site loads anything from other hosts: the policy that forbids it, and a check.

python docs/hooks/selfcontained.py site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# `file:` for pages that are opened without a server; the scripts and styles inside the pages are the theme's.
ALLOWED = "'self' 'unsafe-inline' data: blob: file:"
POLICY = f'<meta http-equiv="Content-Security-Policy" content="default-src {ALLOWED}">'

# Attributes that a browser fetches by itself. `href` of a link that a reader may click is none.
FETCHED = {"src", "srcset", "poster", "data", "action", "formaction", "ping"}
REMOTE = re.compile(r"^\s*(?:[a-z]+:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        fetched = FETCHED | ({"href", "imagesrcset"} if tag in ("link", "base", "use", "image") else set())
        if values.get("rel") == "canonical":
            fetched = set()
        self.found += [
            f"<{tag} {name}={values[name]}>" for name in fetched & values.keys() if REMOTE.match(values[name])
        ]
        self.found += [f"<{tag} style: {url}>" for url in IN_STYLE.findall(values.get("style", ""))]


def in_page(html: str) -> list[str]:
    """What a page would load from other hosts."""
    parser = _Resources()
    parser.feed(html)
    if POLICY not in html:
        parser.found.append("anything: it has no Content-Security-Policy")
    styles = re.findall(r"<style.*?>(.*?)</style>", html, re.DOTALL | re.IGNORECASE)
    return parser.found + [url for style in styles for url in IN_STYLE.findall(style)]


def in_site(folder: Path) -> list[str]:
    """What any page or style sheet of a built site would load from other hosts."""
    found = [f"{p}: {what}" for p in sorted(folder.rglob("*.html")) for what in in_page(p.read_text("utf-8"))]
    styles = sorted(folder.rglob("*.css"))
    return found + [f"{p}: {url}" for p in styles for url in IN_STYLE.findall(p.read_text("utf-8"))]


def main() -> None:
    """Print the findings; exit code 1 if there are any, or no site."""
    folder = Path(sys.argv[1])
    pages = len(list(folder.rglob("*.html")))
    found = in_site(folder)
    print(*found, f"{pages} pages load {len(found)} things from other hosts", sep="\n")
    sys.exit(bool(found) or not pages)


if __name__ == "__main__":
    main()
