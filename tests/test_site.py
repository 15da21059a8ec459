"""The docs' site: what is generated for it, its links, and that its pages load nothing from other hosts."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import yaml
from paths import ROOT

from lily.cli.main import app
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe

BENCHMARKS = {
    "rates",
    "learning-rate",
    "forgetting",
}  # written by benchmarks/, and compared by tests/bench/test_bench.py


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hooks_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


figures, links, reference = hook("figures"), hook("links"), hook("reference")
same, selfcontained = hook("same"), hook("selfcontained")


def test_a_link_out_of_docs_leads_to_the_copy_on_the_site():
    text = "[a](../benchmarks/results/x.json) [b](routing.md#why) [c](../CHANGELOG.md) [d](https://x.org) ![e](f/g.png)"
    assert links.outside(text, "insight.md") == {"benchmarks/results/x.json", "CHANGELOG.md"}
    assert links.rewritten(text, "insight.md") == (
        "[a](files/benchmarks/results/x.json) [b](routing.md#why) [c](changes.md) [d](https://x.org) ![e](f/g.png)"
    )


def test_links_of_a_page_in_a_folder_are_relative_to_it_and_code_is_left_alone():
    text = "[a](../../src/lily/plan/select.py#x)\n```md\n[a](../../src/lily/plan/select.py)\n```\n"
    assert links.rewritten(text, "tutorials/text.md") == (
        "[a](../files/src/lily/plan/select.py#x)\n```md\n[a](../../src/lily/plan/select.py)\n```\n"
    )


def test_a_link_to_a_folder_is_refused():
    with pytest.raises(FileNotFoundError, match="configs/accelerate"):
        links.check(ROOT, "configs/accelerate")


def test_every_command_and_each_of_its_options_is_in_the_reference():
    import typer

    text = reference.filled("<!-- made: command-line -->")
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## `lily {name}`" in text
        part = text.split(f"## `lily {name}`")[1].split("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert (option in part) != parameter.hidden, f"{name} {option}"


@pytest.mark.parametrize(("made", "schema"), [("recipe-keys", Recipe), ("dreambooth-keys", DreamBooth)])
def test_every_key_of_a_recipe_is_in_the_reference_once_and_its_links_lead_somewhere(made, schema):
    text = reference.filled(f"<!-- made: {made} -->")
    schema = schema.model_json_schema()
    sections = [schema, *(d for d in schema["$defs"].values() if "properties" in d)]
    for section in sections:
        for key, value in section["properties"].items():
            assert f"| `{key}` |" in text
            assert value.get("description", "") in text.replace("\\|", "|")
    headings = [line[3:].strip("`") for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings)) == len(sections) - 1
    anchors = {"".join(c for c in h if c.isalnum() or c in "-_").lower() for h in headings}
    assert {part.split(")")[0] for part in text.split("](#")[1:]} <= anchors


def test_values_and_defaults_are_in_words():
    text = reference.keys(Recipe.model_json_schema())
    assert "| `targets` | list of text or text | `all-linear` | Target modules, in PEFT's conventions. |" in text
    assert "| `save_every` | integer or `epoch` |" in text
    assert "| `tests` | by name, [`data.train`](#datatrain) |" in text
    assert "| `deduplicate` | `true`, `false` | `false` |" in text
    assert "| `train` | [`data.train`](#datatrain) | required |" in text


REMOTE = [
    '<script src="https://unpkg.com/x.js"></script>',
    '<link rel="stylesheet" href="//fonts.example/css">',
    '<img src="http://example.org/a.png">',
    "<style>@import url(https://example.org/a.css);</style>",
    '<p style="background: url(https://example.org/a.png)">',
    '<iframe src="https://example.org"></iframe>',
]


@pytest.mark.parametrize("what", REMOTE)
def test_everything_that_a_page_would_load_from_other_hosts_is_found(what):
    assert len(selfcontained.in_page(selfcontained.POLICY + what)) == 1


def test_what_a_reader_may_click_is_no_load():
    page = selfcontained.POLICY + '<a href="https://arxiv.org">paper</a><img src="figures/a.png"><script src="b.js">'
    assert selfcontained.in_page(page) == []


def test_a_page_without_the_policy_is_found():
    assert selfcontained.in_page("<p>") == ["anything: it has no Content-Security-Policy"]


def test_a_list_that_the_site_would_not_show_as_one_is_found():
    assert same.differences("a\n- b\n- c\n", "<h1>t</h1>a - b - c") == [
        "1 h1 instead of 0",
        "0 li instead of 2",
        "0 ul instead of 1",
    ]
    assert same.differences("a\n\n- b\n", "<p>a</p><ul><li>b</li></ul>") == []


def test_the_explanations_show_the_committed_figures():
    shown = [mark for page in figures.PAGES for _, mark, *_ in figures.MARKED.findall(page.read_text())]
    assert sorted(set(shown) - BENCHMARKS) == sorted(figures.FIGURES)
    for page in figures.PAGES:
        assert figures.filled(page.read_text()) == page.read_text(), f"run docs/hooks/figures.py for {page.name}"


def test_figures_of_others_are_left_alone():
    text = "<!-- figures: summary -->\n| a |\n<!-- end -->"
    assert figures.filled(text) == text


def test_the_site_has_every_page_and_no_font_of_others():
    class Loader(yaml.SafeLoader):
        """Knows no Python objects; the one in mkdocs.yml is left out."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert site["theme"]["font"] is False
    assert site["strict"] is True
    # Of the plugin that makes the search work in pages opened as files, the script of another host is replaced.
    assert "offline" in site["plugins"]
    assert all((ROOT / "docs" / script).is_file() for script in site["extra"]["polyfills"])
    listed = {page for part in site["nav"] for entry in part.values() for page in pages(entry)}
    assert listed - {"changes.md"} == {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}


def pages(entry: str | list[dict[str, str]]) -> list[str]:
    return [entry] if isinstance(entry, str) else [page for one in entry for page in one.values()]
