"""The page of the first half hour shows the commands of the script that writes it, and what they printed."""

from __future__ import annotations

import importlib
import re

import pytest
from paths import ROOT


@pytest.fixture
def half_hour(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("half_hour")


def test_the_page_shows_every_command_of_the_script_with_its_output(half_hour):
    page = half_hour.PAGE.read_text("utf-8")
    shown = re.search(r"<!-- figures: half-hour -->\n(.*?)<!-- end -->", page, re.DOTALL)[1]
    blocks = re.findall(r"```text\n\$ (.*?)\n(.*?)\n```", shown, re.DOTALL)
    assert tuple(command for command, _ in blocks) == half_hour.COMMANDS
    assert all(output.strip() for _, output in blocks)
    assert str(ROOT) not in shown


def test_a_command_that_fails_ends_the_script_with_what_it_printed(half_hour, tmp_path):
    with pytest.raises(SystemExit, match="echo wrong && false failed:\nwrong"):
        half_hour.run("echo wrong && false", tmp_path)
