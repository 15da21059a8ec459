"""What the site has and the plain pages do not: generated reference, files of the repository that pages link to."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import figures
import links
import reference
import same
import selfcontained
from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks")  # whose warnings end a strict build
SAVED = re.compile(r"^( *)<!-- file: (\S+) -->\n *```(\w+)$", re.MULTILINE)  # the file name of a block
ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Copy the files outside docs/ that pages link to, and the changelog."""
    wanted = {"CHANGELOG.md"}
    for file in files.documentation_pages():
        wanted |= links.outside(file.content_string, file.src_uri)
    for target in sorted(wanted):
        place, path = links.place(target), links.check(ROOT, target)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that work on the site; generated parts inserted."""
    if page.is_homepage:  # which leads to everything itself
        page.meta["hide"] = ["navigation", "toc"]
    if page.file.generated_by:
        return markdown
    markdown = SAVED.sub(r'\1```\3 title="\2"', markdown)
    return reference.filled(figures.filled(links.rewritten(markdown, page.file.src_uri)))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Warn of lists and blocks that the site renders differently from GitHub."""
    if ":::" not in page.markdown:  # what is made from docstrings
        for difference in same.differences(page.markdown, html):
            log.warning("%s: %s; put a blank line before a list, four spaces inside", page.file.src_uri, difference)
    return html


def on_post_page(output: str, **_: Any) -> str:
    """Forbid the browser to load anything from other hosts."""
    return output.replace("<head>", f"<head>\n{selfcontained.POLICY}", 1)


def on_post_template(output: str, template_name: str, **_: Any) -> str:
    """The same for the 404 page."""
    return on_post_page(output) if template_name.endswith(".html") else output
