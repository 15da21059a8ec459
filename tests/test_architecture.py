"""docs/architecture.md names every file of the package; its walks and every import path of the docs are real."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import textwrap

import pytest
from docs_blocks import PAGES, blocks
from paths import ROOT

from lily.recipes.spec.methods import Lily

PACKAGE = ROOT / "src" / "lily"
PAGE = "docs/architecture.md"
TREE = re.compile(r"^( *)(\S+\.py|\S+/)(?: {2,}(\S.*))?$")


def tree() -> dict[str, str]:
    """Path below src/lily -> its line's text, of the files in the page's tree."""
    text = next(b.text for b in blocks(PAGE) if b.text.startswith("src/lily/"))
    parents: list[tuple[int, str]] = []
    found: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        match = TREE.match(line)
        assert match, f"{PAGE}: not a file, a folder or a description: {line!r}"
        depth, name, description = len(match[1]), match[2], match[3] or ""
        while parents and parents[-1][0] >= depth:
            parents.pop()
        path = "".join(folder for _, folder in parents) + name
        assert path not in found, f"{PAGE} names {path} twice"
        assert description, f"{PAGE}: {path} has no description"
        found[path] = description
        if name.endswith("/"):
            parents.append((depth, name))
    return found


def test_the_tree_names_every_file_of_the_package_and_no_other():
    named = {path for path in tree() if path.endswith(".py")}
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")}
    # A folder's __init__.py is described by the folder's own line.
    files = {f for f in files if f == "__init__.py" or not f.endswith("/__init__.py")}
    assert sorted(files - named) == [], f"not in {PAGE}"
    assert sorted(named - files) == [], f"in {PAGE}, but not in src/lily"


def test_every_file_and_folder_that_the_page_mentions_exists():
    text = re.sub(r"^```.*?^```$", "", PAGES[PAGE].read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w/.]+(?:\.py|/))`", text):
        roots = (ROOT, PACKAGE)
        assert any((root / name).exists() for root in roots), f"{PAGE} mentions {name}, which does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_a_page_mentions_exists(page):
    for name in re.findall(
        r"(?<![\w/])(?:src|tests|benchmarks|configs|docs)/[\w/-]+\.\w+", PAGES[page].read_text("utf-8")
    ):
        assert (ROOT / name).exists(), f"{page} mentions {name}, which does not exist"


def test_the_table_of_lines_has_every_folder_and_adds_up():
    spec = importlib.util.spec_from_file_location("hooks_lines", ROOT / "docs" / "hooks" / "lines.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = PAGES[PAGE].read_text("utf-8")
    rows = re.findall(r"^\| (\S.*?) \| ([\d,]+) \| ([\d,]+) \|$", hook.TABLE.search(text)[2], re.MULTILINE)
    before = {name.strip("`"): int(number.replace(",", "")) for name, number, _ in rows}
    assert sorted(name.strip("`") for name, _, _ in rows) == sorted([*hook.lines(), "**all**"])
    assert before.pop("**all**") == sum(before.values())
    filled = hook.filled(text)
    assert f"| **all** | 28,734 | {sum(hook.lines().values()):,} |" in filled
    assert hook.filled(filled) == filled


# --- import paths in the README and the docs ------------------------------------------------------------------------

DOTTED = re.compile(r"(?<![\w./-])lily(?:\.[A-Za-z_]\w*)+")


def named_paths(page: str) -> set[str]:
    """Every `lily.x.y` in backticks, in `:::` directives and in the imports and calls of Python blocks."""
    text = PAGES[page].read_text("utf-8")
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r"^::: (lily\S*)$", prose, re.MULTILINE))
    for code in re.findall(r"`([^`]+)`", prose):
        # `lily.scaling=4` and `lily.batch_scope: global` are keys of a recipe, and `lily.yaml` would be a file.
        found |= {m[0] for m in DOTTED.finditer(code) if not re.match(r"\s*[=:]", code[m.end() :])}
    for block in blocks(page):
        if block.language == "python":
            found |= python_paths(ast.parse(textwrap.dedent(block.text)))
    return found - RECIPE_KEYS


def python_paths(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lily":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lily"}
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            found |= {path} if DOTTED.fullmatch(path) else set()
    return found


# Keys of a recipe's section `lily`, which pages write as on the command line: `lily.scaling`.
RECIPE_KEYS = {f"lily.{key}" for key in Lily.model_fields}


def resolved(path: str) -> object:
    """The module or the attribute of a dotted path."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            value: object = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("page", PAGES)
def test_every_import_path_of_a_page_works(page):
    wrong = []
    for path in sorted(named_paths(page)):
        try:
            resolved(path)
        except (ModuleNotFoundError, AttributeError) as error:
            wrong.append(f"{path}: {error}")
    assert not wrong, f"{page}:\n" + "\n".join(wrong)


PUBLIC = [
    "lily.functional",
    "lily.budget.choose",
    "lily.distributed.load_weights",
    "lily.export.as_lora",
    "lily.gguf_lora.write_gguf",
    "lily.analysis.factored",
    "lily.analysis.forgetting",
    "lily.analysis.granularity",
    "lily.analysis.history",
    "lily.analysis.plots",
    "lily.analysis.rank",
    "lily.analysis.routing",
    "lily.analysis.scaling",
    "lily.recipes.loader.load_recipe",
    "lily.recipes.train.train",
    "lily.recipes.train.Result",
    "lily.recipes.dreambooth.adapters.load",
    "lily.recipes.dreambooth.standin.standin",
    "lily.recipes.models.local_model",
    "lily.recipes.vision_mamba.VisionMambaConfig",
    "lily.tune.run.tune",
    "lily.cli.main.main",
]


@pytest.mark.parametrize("path", PUBLIC)
def test_paths_that_were_public_before_the_folders_still_import(path):
    assert resolved(path) is not None


def test_every_public_name_of_the_package_resolves():
    import lily

    for name in lily.__all__:
        assert resolved(f"lily.{name}") is not None
