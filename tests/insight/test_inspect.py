"""`lily inspect` and its page, on runs of tiny models and on folders with untrusted content."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browser import NARROW, WIDE, assert_drawn, assert_nothing_cut, assert_printed, needs_browser, printed, screenshot
from helpers import build
from peft import LoraConfig, get_peft_model
from recipes_helpers import classification, rows, write_jsonl
from runs import invoke, make

from lily import LilyConfig
from lily.analysis.routing import routing_report
from lily.errors import LilyError
from lily.insight.gather import insight
from lily.recipes import data, train
from lily.recipes.results.adapter import Adapter, batches
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")

EVIL = "</title><script>alert('x')</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder):
    """A classifier's run with a LoRA beside it."""
    folder = tmp_path_factory.mktemp("inspected")
    changes = ["baselines=[majority, tfidf, lora]", "train.epochs=3", "lily.routing=token"]
    train.train(make(classification, folder, encoder, changes), quiet=True)
    return folder / "run"


class Page(HTMLParser):
    """A page's tags with their attributes, unclosed and mismatched tags, and empty table headers."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.wrong, self.empty, self.said = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.said = ""
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_data(self, data):
        self.said += data

    def handle_endtag(self, tag):
        if tag == "th" and not self.said.strip():
            self.empty.append(tag)
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def page_of(folder, tmp_path, *options):
    invoke("inspect", folder, "--report", tmp_path / "page.html", *options)
    return (tmp_path / "page.html").read_text("utf-8")


def test_a_run_is_shown_with_its_metrics_its_routing_over_held_out_rows_and_the_lora_beside_it(run):
    said = invoke("inspect", run)
    for words in ("who shares what", "rank of the updates", "routing (token), over 12 rows of test",
                  "The LoRA trained for comparison has numerical rank", "majority: accuracy"):  # fmt: skip
        assert words in " ".join(said.split()), words
    analysis = json.loads(invoke("inspect", run, "--json"))
    assert analysis["routing"]["samples"] == 12
    assert set(analysis["routing"]["labels"]) == {"0", "1"}
    assert analysis["run"]["final"] == json.loads((run / "metrics.json").read_text())["final"]
    assert len(analysis["rank"]["layers"]) == len(analysis["lora"]["layers"]) == 13
    assert analysis["history"]["steps"][0] == 2  # the routers are checked in the steps between
    assert analysis["notes"] == []
    assert insight(str(run / "best"), rows=0).lora is not None


def test_the_pictures_of_the_docs_show_a_page_as_it_is_written_now(run, tmp_path):
    hooks = Path(__file__).parents[2] / "docs" / "hooks" / "screenshots.py"
    looks = runpy.run_path(str(hooks))["looks"]
    shown = json.loads((hooks.parents[1] / "figures" / "insight.json").read_text("utf-8"))
    assert looks(page_of(run, tmp_path)) == shown, "docs/insight.md, Results on the quickstart, has the commands"


def test_no_layers_name_is_cut_in_a_terminal_of_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = invoke("inspect", run)
    assert max(map(len, (line for line in said.splitlines() if line.startswith("│")))) <= 80
    routers = said[said.index("routers that depend most on the data") :]
    assert "…" not in routers
    assert "bert.encoder.layer." in routers
    assert "share: class" in routers


def test_the_routing_is_measured_on_the_held_out_rows_with_their_labels(run):
    analysis = insight(str(run)).routing
    used = Adapter(str(run))
    held_out = used.splits.held_out
    for name in ("0", "1"):
        chosen = [row for row in held_out if row["label"] == name]
        alone = routing_report(used.model, batches(chosen, used.recipe, used.tokenizer, torch.device("cpu")))
        for layer, other in zip(analysis.layers, alone.layers, strict=True):
            assert torch.tensor(layer.labels[name]).allclose(torch.tensor(other.mean), atol=1e-5)
    assert [layer.name for layer in analysis.layers] == list(find(used.model).layers)


def test_rows_of_a_file_are_read_with_and_without_labels(run, tmp_path):
    labelled = write_jsonl(tmp_path / "a.jsonl", rows(10))
    plain = write_jsonl(tmp_path / "b.jsonl", [{"text": r["text"]} for r in rows(10)])
    analysis = insight(str(run), file=str(labelled), rows=6)
    assert (analysis.routing.samples, analysis.read) == (6, f"6 rows of {labelled}")
    analysis = insight(str(run), file=str(plain))
    assert (analysis.routing.samples, analysis.routing.labels) == (10, ())
    assert "labels are not used" in analysis.notes[0]
    with pytest.raises(LilyError, match="nowhere"):
        insight(str(run), file=str(tmp_path / "nowhere.jsonl"))


def sorted_rows(count=40):
    return sorted(rows(count), key=lambda row: row["label"])


def test_of_rows_sorted_by_class_a_sample_of_all_is_read(run, tmp_path):
    analysis = insight(str(run), file=str(write_jsonl(tmp_path / "a.jsonl", sorted_rows())), rows=12)
    assert (analysis.routing.samples, set(analysis.routing.labels)) == (12, {"0", "1"})
    again = insight(str(run), file=str(tmp_path / "a.jsonl"), rows=12)
    assert again.routing == analysis.routing


def test_a_sample_of_rows_is_fixed_keeps_their_order_and_takes_from_all_parts():
    whole = list(range(1000))
    found = data.drawn(whole, 100)
    assert found == data.drawn(whole, 100) == sorted(set(found))
    assert len(found) == 100
    assert all(any(part <= i < part + 250 for i in found) for part in (0, 250, 500, 750))
    assert data.drawn(whole, 100, seed=1) != found
    assert data.drawn(whole, None) == data.drawn(whole, 1000) == whole


def test_rows_of_one_class_do_not_split_the_variance_by_class(run, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [row for row in rows(20) if row["label"] == "1"])
    text = page_of(run, tmp_path, "--data", one)
    assert "What the weights depend on" in text
    assert "sample within its class" not in text
    assert "Routing by class" not in text
    said = invoke("inspect", run, "--data", one)
    assert "share: sample" in said
    assert "share: class" not in said


@pytest.fixture
def alone(run, tmp_path):
    """The adapter without its recipe, and without a hint of where its base model is."""
    folder = tmp_path / "alone"
    shutil.copytree(run / "best", folder)
    (folder / "recipe.yaml").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/base"}))
    return folder


def test_with_its_base_an_adapter_without_a_recipe_has_the_same_routing_over_texts(run, alone, encoder, tmp_path):
    file = str(write_jsonl(tmp_path / "a.jsonl", sorted_rows()))
    analysis, with_recipe = (insight(str(folder), file=file, base=str(encoder)) for folder in (alone, run))
    assert analysis.read == f"40 rows of {file}"
    assert analysis.routing.labels == with_recipe.routing.labels == ("0", "1")
    for layer, other in zip(analysis.routing.layers, with_recipe.routing.layers, strict=True):
        assert torch.tensor(layer.mean).allclose(torch.tensor(other.mean), atol=1e-6)
        for name, weights in layer.labels.items():
            assert torch.tensor(weights).allclose(torch.tensor(other.labels[name]), atol=1e-6)
    assert not analysis.rank.assumed


def test_texts_without_a_recipe_need_a_base_with_a_tokenizer_and_a_column_of_texts(alone, encoder, tmp_path):
    file = str(write_jsonl(tmp_path / "a.jsonl", [{"headline": "good"}]))
    with pytest.raises(LilyError, match=r"row 1: no text in a column 'text'.*--recipe FILE.*headline"):
        insight(str(alone), file=file, base=str(encoder))
    file = str(write_jsonl(tmp_path / "b.jsonl", [{"text": "good"}]))
    with pytest.raises(LilyError, match="name it with --base"):
        insight(str(alone), file=file)
    shutil.copytree(encoder, tmp_path / "mute", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(LilyError, match="no tokenizer"):
        insight(str(alone), file=file, base=str(tmp_path / "mute"))


def test_a_recipes_base_model_may_have_moved(run, encoder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for recipe in (tmp_path / "run").rglob("recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(str(encoder), "/no/such/base"))
    assert "no routing over data" in insight(str(tmp_path / "run")).notes[0]
    assert insight(str(tmp_path / "run"), base=str(encoder)).routing == insight(str(run)).routing


def test_without_data_ranks_are_at_equal_weights_and_say_so(run):
    said = " ".join(invoke("inspect", run, "--rows", "0").split())
    assert "ranks are at equal weights" in said
    assert "routing (" not in said


def test_the_page_is_well_formed_accessible_and_loads_nothing(run, tmp_path):
    text = page_of(run, tmp_path)
    page = Page(text)
    assert (page.open, page.wrong, page.empty) == ([], [], [])
    assert page.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in page.found if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    pictures = page.all("svg")
    assert len(pictures) > 8
    ids = [a["id"] for _, a in page.found if "id" in a]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(ids)
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= set(ids)
    assert not any(tag in ("script", "link", "img", "iframe", "object") for tag, _ in page.found)
    assert not re.search(r"https?://|url\(|@import|\bon\w+=", text)
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    assert len(page.all("caption")) == len(page.all("table"))
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    assert "NaN" not in text
    assert page_of(run, tmp_path, "--overwrite") == text


def test_the_page_shows_sharing_rank_routers_training_and_sizes(run, tmp_path):
    text = page_of(run, tmp_path)
    titles = ("Was it worth it?", "What is shared", "Numerical rank by layer", "Spectrum", "What sharing did",
              "What the weights depend on", "While it learned", "accuracy on the validation rows", "Sizes")  # fmt: skip
    for title in titles:
        assert title in text, title
    assert "What becoming static cost" not in text


def test_the_page_leads_with_the_verdict_then_curves_then_what_is_wrong(run, tmp_path):
    text = page_of(run, tmp_path)
    lead = re.search('<p class="lead">([^<]*)</p>', text)[1]
    final = json.loads((run / "metrics.json").read_text())["final"]["accuracy"]
    assert lead.startswith(f"Lily {100 * final:.1f}, ")
    assert "LoRA" in lead
    assert "TF-IDF" in lead
    sections = re.findall('<section id="([a-z]+)"', text)
    assert sections[:6] == ["result", "training", "wrong", "sharing", "rank", "overlap"]
    curves = text[text.index("accuracy on the validation rows</h3>") :].partition("</figure>")[0]
    assert len(re.findall('<polyline[^>]*class="curve (lily|lora)"', curves)) == 2
    assert len(re.findall('class="level"', curves)) == 1  # TF-IDF, which has no steps


def test_groups_of_layers_are_panels_of_one_figure(run, tmp_path):
    text = page_of(run, tmp_path)
    for title in ("Who shares what, by group of layers", "Which experts each layer uses", "How the routers decide"):
        figure = text[text.index(title) :].partition("</figure>")[0]
        assert figure.count("<svg") == figure.count("<h4>") == 6
        assert figure.count("<figcaption>") == 1


def test_confusion_scores_and_mistakes_are_those_of_the_run(run, tmp_path):
    review = json.loads((run / "metrics.json").read_text())["review"]
    text = page_of(run, tmp_path)
    counts = re.findall('class="incell"[^>]*>([0-9,]+)<', text[text.index("Confusion on the test rows") :])
    assert counts[: len([c for line in review["classes"]["confusion"] for c in line if c])] == [
        str(count) for line in review["classes"]["confusion"] for count in line if count
    ]
    assert "F1 of LoRA" in text
    for mistake in review["mistakes"]:
        assert f"row {mistake['row']}: {mistake['expected']}, predicted {mistake['predicted']}" in text
        assert mistake["input"] in text


def test_figures_of_an_earlier_version_give_a_page_without_the_later_parts(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "run/lora"):
        metrics = json.loads((folder / "metrics.json").read_text())
        del metrics["review"]
        for values in metrics["baselines"].values():
            values.pop("validation", None)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    text = page_of(tmp_path / "run", tmp_path, "--rows", "0")
    assert "What it gets wrong" not in text
    assert 'class="level"' not in text[text.index("accuracy on the validation rows</h3>") :].partition("</figure>")[0]
    assert '<p class="lead">Lily ' in text


def test_a_collapsed_adapter_shows_its_drift(run, tmp_path):
    invoke("collapse", run, "--out", tmp_path / "static")
    text = page_of(tmp_path / "static", tmp_path)
    report = json.loads((tmp_path / "static" / "collapse.json").read_text())
    assert Page(text).empty == []
    assert "What becoming static cost" in text
    assert f"{report['drift']['relative_error']:.4g}" in text
    assert "token routing became static" in text


def test_a_chat_models_page_has_no_classes(tmp_path, chat_run):
    text = page_of(chat_run.run, tmp_path)
    assert "Routing by class" not in text
    assert "token within the sample" in text
    assert "What it gets wrong" not in text
    metrics = json.loads((chat_run.run / "metrics.json").read_text())
    answers = text[text.index('<section id="answers"') :].partition("</section>")[0]
    for sample in metrics["samples"]:
        for name in ("prompt", "expected", "before", "after"):
            assert f"<p>{escape(sample[name])}</p>" in answers
    assert f"generation.max_new_tokens is {metrics['review']['answers']['limit']}" in answers


@pytest.mark.parametrize(("num_B", "said"), [(1, "one B, nothing is routed"), (2, "sequence routing")])
def test_the_page_names_a_routing_only_where_something_is_routed(tmp_path, num_B, said):
    config = LilyConfig(r=2, num_A=1, num_B=num_B, routing="sequence", target_modules=["query"])
    get_peft_model(build("bert"), config).save_pretrained(tmp_path / "lily")
    assert f"LILY adapter, {said}: " in page_of(tmp_path / "lily", tmp_path)


def test_a_lora_and_an_adapter_without_its_base_are_shown_as_far_as_possible(alone, tmp_path):
    get_peft_model(build("bert"), LoraConfig(r=3, target_modules=["query"], init_lora_weights=False)).save_pretrained(
        tmp_path / "lora"
    )
    assert "numerical rank 3" in " ".join(invoke("inspect", tmp_path / "lora").split())
    assert "Numerical rank by layer" in page_of(tmp_path / "lora", tmp_path)
    dora = LoraConfig(r=3, target_modules=["query"], use_dora=True)
    get_peft_model(build("bert"), dora).save_pretrained(tmp_path / "dora")
    assert "note: no rank" in " ".join(invoke("inspect", tmp_path / "dora").split())
    assert "note: who shares what" in " ".join(invoke("inspect", alone).split())
    with pytest.raises(LilyError, match="is a LORA adapter; --data is for Lily"):
        insight(str(tmp_path / "lora"), file="rows.jsonl")


def test_markup_in_the_files_of_an_untrusted_folder_becomes_text(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics.update(name=EVIL, metric="accuracy", split=EVIL, baselines={EVIL: {"accuracy": 0.5}})
    metrics["final"] = {"accuracy": 0.5, EVIL: 0.1}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    layer = {"name": EVIL, "weights": [0.5], "uniformity": 0.0, "variance": 0.0, "update_error": None}
    report = {"routing": EVIL, "tokens": 3, "drift": {"kl": None, "relative_error": 0.1, "positions": 2},
              "drift_before_refit": None, "refit_steps": 0, "metrics": {}, "layers": [layer]}  # fmt: skip
    (tmp_path / "run" / "best" / "lily_provenance.json").write_text(json.dumps({EVIL: EVIL, "collapse": report}))
    text = page_of(tmp_path / "run", tmp_path, "--rows", "0")
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert "<script" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("damage", [{"classes": 3}, {"mistakes": []}, "x"])
def test_a_damaged_review_is_one_error(run, tmp_path, damage):
    shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({**metrics, "review": damage}))
    with pytest.raises(LilyError, match=r"metrics\.json is not in the format"):
        insight(str(tmp_path / "run"), rows=0)


@pytest.mark.parametrize(
    "damage", ["[1]", "{", '{"name": "x"}', '{"name": 1, "method": "l", "metric": "m", "split": "s", "seed": "x"}']
)
def test_damaged_figures_are_one_error_and_leave_no_page(run, tmp_path, damage):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(damage)
    with pytest.raises(LilyError, match=r"metrics\.json"):
        invoke("inspect", tmp_path / "run", "--report", tmp_path / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("report", ['{"drift": 3}', '{"routing": "token"}', "[1]"])
def test_a_damaged_collapse_report_is_one_error(run, tmp_path, report):
    shutil.copytree(run / "best", tmp_path / "adapter")
    (tmp_path / "adapter" / "collapse.json").write_text(report)
    with pytest.raises(LilyError, match="not what `lily collapse` writes"):
        invoke("inspect", tmp_path / "adapter")


def test_bad_options_are_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(LilyError, match="exists"):
        invoke("inspect", run, "--report", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"
    with pytest.raises(LilyError, match="there is no folder"):
        invoke("inspect", run, "--report", tmp_path / "no" / "page.html")
    with pytest.raises(LilyError, match="--threshold 2"):
        invoke("inspect", run, "--threshold", "2")
    with pytest.raises(LilyError, match="--rows 0"):
        invoke("inspect", run, "--rows", "0", "--data", "x.csv")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_browser_renders_the_page_without_complaint(run, tmp_path, colours, width):
    page_of(run, tmp_path)
    assert_drawn(screenshot(tmp_path / "page.html", colours, tmp_path, width), colours, width)
    assert_nothing_cut(tmp_path / "page.html", tmp_path, width)


@pytest.mark.slow
@needs_browser
def test_a_browser_prints_the_page_with_its_broad_pictures_scaled_to_the_paper(run, tmp_path):
    text = page_of(run, tmp_path)
    assert_printed(printed(tmp_path / "page.html", tmp_path))
    assert ".wide svg{min-width:0}" in text.partition("@media print")[2]
