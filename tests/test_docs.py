"""Every block of the README and the docs is run, or says in its source why it is not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from docs_blocks import ALL, PAGES, ROOT, SHELLS, SHOWN, Block, Command, blocks, cells, commands
from docs_pages import PREPARED, SMALLER, own_table, symptoms
from docs_world import World
from typer.testing import CliRunner

from benchmarks import vtab
from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader

VTAB = ("python", "benchmarks/vtab.py")
LAUNCHERS = ("lily", "make", "pip", "python", "torchrun", "accelerate")
FEW = ("data.max_train=64", "data.max_validation=64", "data.max_test=64", "train.max_steps=2")
# Those that start processes of their own, each of which imports everything anew.
SLOW = ("compare", "sweep")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# --- what stands there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page):
    for block in blocks(page):
        if block.language in SHELLS and block.reason is None:
            for command in commands(block):
                assert command.words[0] == "lily" or command.words[:2] == VTAB, (
                    f"{block}: nobody runs {command.words[0]!r}; say <!-- not run: why -->"
                )
        known = block.language in (*SHELLS, *SHOWN, "python", "yaml") or block.file is not None
        assert known, f"{block}: a block of {block.language!r} that nothing looks at"


def test_few_blocks_are_not_run(capsys):
    run = [b for b in ALL if b.reason is None and b.language not in SHOWN]
    left = [b for b in ALL if b.reason is not None]
    with capsys.disabled():
        print(f"\n{len(run)} blocks of the docs are run, {len(left)} are not:")
        for block in left:
            print(f"  {block}: {block.reason}")
    assert len(left) < len(run) / 3


@pytest.mark.parametrize("block", [b for b in ALL if b.language in SHELLS], ids=str)
def test_every_command_is_one_that_there_is(block):
    for command in commands(block):
        if command.ours is not None:
            parsed(command.ours)
        elif command.words[0] in LAUNCHERS:
            exists(command)
        else:
            assert block.reason, f"{block}: {command.words[0]} is no program of ours"


def test_every_command_in_the_tables_of_the_readme_is_one_that_there_is():
    shown = [c for row in cells("README.md") for c in re.findall(r"`lily ([^`]+)`", row[0])]
    assert len(shown) > 5
    for command in shown:
        parsed(tuple(shlex.split(command)))


def parsed(arguments: tuple[str, ...]) -> None:
    """Refuse what the command line refuses, running nothing; of recipes, whatever is wrong with them."""
    group = typer.main.get_command(app)
    with group.make_context("lily", list(arguments), resilient_parsing=False) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        values = command.make_context(name, rest, parent=context).params
    target = values.get("recipe") or values.get("target") or values.get("name")
    if name in ("train", "plan", "tune", "sweep", "recipes") and str(target).split(":")[0] in loader.shipped():
        loader.load_any(target, [o for o in values.get("overrides") or () if "=" in o])


def exists(command: Command) -> None:
    """A target of the Makefile, a script with its options, an extra of the package, a configuration."""
    program, *arguments = command.words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if program == "python" and arguments[0].startswith("benchmarks/"):
        script = (ROOT / arguments[0]).read_text()
        assert all(f'"{a}"' in script for a in arguments[1:] if a.startswith("--"))
    for extra in re.findall(r"lily-peft\[(.*?)\]", " ".join(arguments)):
        listed = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{name} = \[", listed, re.MULTILINE) for name in extra.split(","))
    for word in arguments:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


BASES: dict[str, dict[str, Any]] = {
    task: {
        "name": "one",
        "task": task,
        "model": {"path": "model"},
        "data": {"train": {"path": "rows.csv"}, "columns": columns},
    }
    for task, columns in {
        "text-classification": {"text": "text", "label": "label"},
        "image-classification": {},
        "sft": {"prompt": "prompt", "completion": "completion"},
    }.items()
}
BASES["dreambooth"] = {
    "name": "one",
    "task": "dreambooth",
    "model": {"path": "model"},
    "subject": {"images": "images", "prompt": "a photo of sks toy"},
}


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "yaml"], ids=str)
def test_every_recipe_and_every_part_of_one_is_valid(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in blocks(block.page):
        if other.file is not None and other.language == "yaml":
            Path(other.file).write_text(other.text)
    values = yaml.safe_load(block.text)
    Path("part.yaml").write_text(block.text)
    if {"name", "task"} <= values.keys() or "extends" in values:
        for name in loader.names_of("part.yaml"):
            loader.load_any(name)
        return
    refused = []
    for task, base in BASES.items():
        if values.get("task", task) == task:
            Path("base.yaml").write_text(yaml.safe_dump(base))
            Path("part.yaml").write_text(f"extends: base.yaml\n{block.text}")
            try:
                loader.load_any("part.yaml")
                return
            except LilyError as error:
                refused.append(str(error))
    pytest.fail(f"{block}: no recipe has such keys:\n" + "\n".join(refused))


# --- running it -----------------------------------------------------------------------------------------------------


# Minutes, even with what is cut.
HEAVY = (
    "docs/deploy.md",
    "docs/diffusion.md",
    "docs/performance.md",
    "docs/quantization.md",
    "docs/tune.md",
    "docs/tutorials/chat.md",
    "docs/tutorials/diffusion.md",
    "docs/tutorials/vision.md",
)


def slow(block: Block) -> bool:
    return block.language in SHELLS and any(c.ours and c.ours[0] in SLOW for c in commands(block))


def cases() -> list[Any]:
    """Each page, and again in full where some of its commands are slow."""
    found: list[Any] = [
        pytest.param(page, False, id=page, marks=[pytest.mark.slow] if page in HEAVY else [])
        for page in PAGES
        if blocks(page)
    ]
    for page in PAGES:
        if any(slow(b) for b in blocks(page) if b.reason is None):
            found.append(pytest.param(page, True, id=f"{page}, in full", marks=pytest.mark.slow))
    return found


@pytest.mark.filterwarnings("ignore:routing=.* on a causal model")
@pytest.mark.parametrize(("page", "in_full"), cases())
def test_the_blocks_of_a_page_run_in_their_order(page, in_full, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world.enter(monkeypatch)
    scope = PREPARED[page](world) if page in PREPARED else {}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.file is not None:
            Path(block.file).write_text(block.text)
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(PAGES[page]), "exec"), scope)
        elif block.language in SHELLS:
            for command in commands(block):
                if in_full or command.words[1] not in SLOW:
                    run(block, command)


def run(block: Block, command: Command) -> None:
    """Run one command of ours, with less to do where the world is not enough to make it short."""
    if command.words[:2] == VTAB:
        vtab.main(command.words[2:])
        return
    trains_less = SMALLER.get((block.page, command.words[1]), SMALLER.get(command.words[1], ()))
    words = [*command.words[1:], *(() if "--summary" in command.words else trains_less)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command.variables:
            patch.setenv(name, value)
        done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{block}: lily {' '.join(words)}: {done.exception}") from done.exception
    assert done.exit_code == 0, f"{block}: lily {' '.join(words)}:\n{done.output[-3000:]}"


SYMPTOMS = "docs/when-something-looks-wrong.md"
SHOWN_BY = list(
    dict.fromkeys(c for row in cells(SYMPTOMS) for c in re.findall(r"`([^`]+)`", row[2]) if "(" in c or "lily " in c)
)


@pytest.fixture(scope="module")
def wrong(world, tmp_path_factory):
    """A folder with the recipe and the run of the page of symptoms, and the names of its Python."""
    folder = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        world.enter(patch)
        yield symptoms(world)


@pytest.mark.parametrize("shown", SHOWN_BY)
def test_a_command_that_shows_a_cause_runs(wrong, shown):
    if not shown.startswith("lily "):
        eval(shown, dict(wrong))
        return
    words = shlex.split(shown)[1:]
    done = CliRunner().invoke(app, [*words, *SMALLER.get(words[0], ())])
    assert done.exit_code == 0, f"{shown}: {done.output[-2000:]}{done.exception}"


# --- links ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    for link in re.findall(r"\]\(<?([^)\s>]+)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {name}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_anchors_are_those_that_github_makes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`: [c](d.md), e?\n\n```\n# no heading\n```\n## Same\n## Same\n")
    assert anchors(page) == {"a-b-c-e", "same", "same-1"}


# --- the real thing -------------------------------------------------------------------------------------------------


def test_the_readme_starts_with_the_two_commands():
    first = commands(blocks("README.md")[0])
    assert [command.words for command in first] == [("make", "demo"), ("make", "test")]


def test_python_m_lily_works():
    run = subprocess.run([sys.executable, "-m", "lily", "--help"], capture_output=True, text=True, check=True)
    assert "plan" in run.stdout


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/text.md"])
def test_commands_run_on_the_real_packages_with_a_few_steps(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("headlines.csv").write_text('input.1.content\n"area man wins award"\n"parliament passes budget"\n')
    own_table()
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text)
        for command in commands(block) if block.language in SHELLS and block.reason is None else ():
            if any("path/" in word for word in command.words):
                continue
            trains = command.words[1] in ("train", "tune", "sweep", "compare")
            few = [*FEW, "baselines=[]"] if trains else []
            few += SMALLER.get(command.words[1], ())
            words = [sys.executable, "-m", *command.words, *few]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (command, done.stderr[-2000:])
