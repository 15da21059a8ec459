"""Every command and every Python block of the README and the docs works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers import build
from typer.testing import CliRunner

import lily
from lily.cli import app
from lily.recipes import loader

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, pages: list[Path] = PAGES) -> list[str]:
    return [b for page in pages for b in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lily ")]


def test_the_readme_starts_with_the_two_commands():
    first = blocks("sh")[0].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-all", "lint", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_python_example_runs(tmp_path, monkeypatch):
    import transformers

    (code,) = blocks("python", [ROOT / "README.md"])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: build("llama"))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert isinstance(scope["config"], lily.LilyConfig)


@pytest.mark.filterwarnings("ignore:routing=.* on a causal model")
def test_the_examples_of_deploying_run(tmp_path, monkeypatch):
    from test_settle import ROWS, adapted, arguments, fresh, inputs

    monkeypatch.chdir(tmp_path)
    settle, *others = blocks("python", [ROOT / "docs" / "deploy.md"])
    exec(compile(settle, "settle", "exec"), {"lily": lily, "model": fresh(), "args": arguments(tmp_path), "rows": ROWS})
    batches = [inputs("llama")]
    scope = {
        "lily": lily,
        "peft_model": adapted("llama", routing="token"),
        "calibration_batches": batches,
        "held_out_batches": batches,
    }
    for code in others:
        exec(compile(code, "deploy.md", "exec"), scope)
    assert (tmp_path / "merged-folder" / "model.safetensors").is_file()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found: Counter[str] = Counter()
    out = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        out.add(slug if not found[slug] else f"{slug}-{found[slug]}")
        found[slug] += 1
    return out


def links() -> list[tuple[Path, str]]:
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    found = [(p, link) for p in pages for link in re.findall(r"\]\(<?([^)\s>]+)", p.read_text())]
    return [(p, link) for p, link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize(("page", "link"), links(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page, link):
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    assert target.exists(), f"{page.name} links to {name}, which does not exist"
    if anchor:
        assert anchor in anchors(target), f"{page.name} links to #{anchor} of {target.name}, which has no such heading"


def test_anchors_are_those_that_github_makes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`: [c](d.md), e?\n\n```\n# no heading\n```\n## Same\n## Same\n")
    assert anchors(page) == {"a-b-c-e", "same", "same-1"}


def test_the_recipe_in_the_docs_is_valid(tmp_path):
    for i, block in enumerate(blocks("yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(block)
        assert loader.load_any(str(path)).name == yaml.safe_load(block)["name"]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_exists_with_its_options(command):
    name, *arguments = command[1:]
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in shown.stdout, argument
    if name in ("train", "plan", "tune", "sweep") and not arguments[0].startswith(("path", "runs")):
        loader.load_any(arguments[0], [a for a in arguments[1:] if "=" in a])


@pytest.mark.parametrize("command", [c for c in commands() if c[1] in ("recipes", "schema")], ids=" ".join)
def test_commands_that_need_nothing_run(command):
    assert CliRunner().invoke(app, command[1:]).exit_code == 0


def test_python_m_lily_works():
    run = subprocess.run([sys.executable, "-m", "lily", "--help"], capture_output=True, text=True, check=True)
    assert "plan" in run.stdout


@pytest.mark.slow
@pytest.mark.network
def test_the_readmes_commands_run_in_their_order(tmp_path, monkeypatch):
    """On the real packages, with a few steps only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "headlines.csv").write_text('input.1.content\n"area man wins award"\n"parliament passes budget"\n')
    for command in commands():
        # The offline recipes of images train a model first: their own tests run them.
        if any("path/" in word or word.startswith("offline/") for word in command):
            continue
        trains = command[1] in ("train", "tune", "sweep")
        few = ["data.max_train=64", "train.max_steps=2", "baselines=[]"] if trains else []
        few += {
            "tune": ["--trials", "1"],
            "sweep": ["--points", "2", "--seeds", "1", "--overwrite"],
            "bench": ["--width", "64", "--depth", "2", "--tokens", "16", "--rounds", "1"],
        }.get(command[1], [])
        done = subprocess.run([sys.executable, "-m", *command, *few], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr[-2000:])
