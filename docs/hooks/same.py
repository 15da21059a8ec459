"""Compare a page of the site with its Markdown, where dialects of Markdown disagree.

The site's Markdown wants a blank line before a list and four spaces inside one; other readers of the same page do not.
"""

from __future__ import annotations

import re
from collections import Counter

from markdown_it import MarkdownIt

PARTS = ("h1", "h2", "h3", "h4", "li", "ol", "pre", "table", "td", "ul")


def differences(markdown: str, html: str) -> list[str]:
    """Elements that the site's page has more or fewer of than CommonMark gives: `5 li instead of 7`.

    Args:
        markdown: the page's text.
        html: the site's page.
    """
    plain, site = _count(MarkdownIt().enable("table").render(markdown)), _count(html)
    return [f"{site[part]} {part} instead of {plain[part]}" for part in PARTS if site[part] != plain[part]]


def _count(html: str) -> Counter[str]:
    return Counter(re.findall(rf"<({'|'.join(PARTS)})\b", html))
