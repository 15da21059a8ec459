"""Comparisons end to end on a tiny classifier: what is trained, kept, written, and gone on with after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import forked
import pytest
from browser import NARROW, WIDE, assert_drawn, assert_nothing_cut, assert_printed, needs_browser, printed, screenshot
from recipes_helpers import classification, rows, write_jsonl, write_recipe
from rich.console import Console
from typer.testing import CliRunner

from lily.cli.compare import _print
from lily.cli.main import app
from lily.compare import compare as comparing
from lily.compare.contestants import parse, resolve
from lily.compare.page import page as written
from lily.compare.result import read
from lily.compare.tables import costs, quality, summary, verdict, verdicts
from lily.errors import LilyError
from lily.recipes import loader, preflight, train
from lily.recipes.results.result import output_folder
from lily.search import runner, worker
from lily.search.runner import Job, Outcome


def invoke(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def made(folder, encoder, name="tiny", **train):
    values = classification(encoder, write_jsonl(folder / "rows.jsonl", rows()), folder)
    values["train"] |= train
    values["name"] = name
    del values["output"]
    return write_recipe(folder, values, f"{name}.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder):
    """A comparison of two methods with one seed each."""
    folder = tmp_path_factory.mktemp("finished")
    path = made(folder, encoder, epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runner, "subprocess", forked.IN_PLACE)
        result = invoke(path, "train.learning_rate=0.02", "--methods", "lily,lora", "--seeds", 1, "--output", "out")
    assert result.exit_code == 0, result.output + str(result.exception)
    return folder, path, result.output


@pytest.fixture
def done(finished, tmp_path):
    """A copy of it to work in."""
    folder, path, output = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    return tmp_path / "out", path, output


def test_both_methods_train_on_the_same_recipe_at_equal_parameters(done):
    out, _, printed = done
    recipes = {m: loader.load_recipe(str(out / "tiny/runs" / m / "0/recipe.yaml")) for m in ("lily", "lora")}
    same = {"method", "output", "lora", "baselines"}
    assert recipes["lily"].model_dump(exclude=same) == recipes["lora"].model_dump(exclude=same)
    assert recipes["lora"].lora.r == 2
    assert recipes["lily"].train.learning_rate == 0.02
    found = read(out / "tiny")
    assert [e.name for e in found.entries] == ["lily", "lora"]
    assert found.entries[1].parameters <= found.entries[0].parameters
    assert found.entries[1].test.n == found.rows == 12
    assert found.entries[1].test.test == "McNemar, exact"
    lines = ("lily          2,600 parameters, r 4, learning rate 0.02, scale 4", "lora/0  epoch 1/",
             "lora          1,792 parameters, r 2, learning rate 0.02, scale 2")  # fmt: skip
    for said in ("[2/2]", *lines, "McNemar, exact", "LoRA", "untrained", "warning: tiny: scales differ"):
        assert said in printed


@pytest.mark.slow
def test_a_method_at_a_part_of_the_parameters_has_a_line_that_says_so(done):
    out, path, _ = done
    options = ["train.learning_rate=0.02", "--methods", "lily,lora,lily/2", "--seeds", 1, "--output", out]
    printed = invoke(path, *options)
    assert printed.exit_code == 0, printed.output
    whole, _, half = read(out / "tiny").entries
    assert (half.name, half.title) == ("lily/2", "Lily (one B), 1/2")  # the planner's choice at that size
    assert half.parameters <= whole.parameters // 2
    assert half.test is not None
    assert "1/N: an N-th of these parameters" in printed.output
    (out / "tiny/comparison.json").unlink()  # the folders alone say the same
    assert {e.name for e in read(out / "tiny").entries} == {"lily", "lora", "lily/2"}


def test_scales_have_one_unit_for_all_methods(done):
    ours, lora = read(done[0] / "tiny").entries[:2]
    assert ours.factor == ours.scale[1]
    assert lora.factor == lora.scale[1] / lora.rank
    assert replace(lora, name="rslora").factor == lora.scale[1] / lora.rank**0.5
    assert replace(lora, scale=None).factor is None
    assert replace(lora, rank=None).factor is None
    assert [row[4] for row in costs(read(done[0] / "tiny"))[1:3]] == [f"{e.factor:.3g}" for e in (ours, lora)]


@pytest.mark.parametrize(
    ("metric", "difference", "p", "said"),
    [
        ("accuracy", -0.02, 0.01, "Lily (sequence) is better than LoRA by 2.0 accuracy (p 0.01)."),
        ("accuracy", 0.02, 0.01, "LoRA is better than Lily (sequence) by 2.0 accuracy (p 0.01)."),
        ("loss", -0.02, 0.01, "LoRA is better than Lily (sequence) by 0.0200 loss (p 0.01)."),
        ("accuracy", 0.02, 0.3, "LoRA and Lily (sequence) do not differ by more than these rows can show (p 0.3)."),
    ],
)
def test_the_verdict_is_a_sentence(done, metric, difference, p, said):
    found = read(done[0] / "tiny")
    lora = replace(found.entries[1], test=replace(found.entries[1].test, difference=difference, p=p))
    assert verdict(replace(found, metric=metric), lora) == said


def test_a_method_alone_is_compared_with_nothing(done):
    found = read(done[0] / "tiny")
    alone = replace(found, entries=found.entries[:1])
    console = Console(width=200, file=StringIO())
    _print(alone, console)
    for text in (console.file.getvalue(), written(alone)):
        assert "Only Lily (sequence) has results: there is nothing to compare it with." in text
        for absent in ("against Lily", "at equal parameters", "this differs most"):
            assert absent not in text


def test_a_method_that_predicts_one_class_is_told_beside_the_verdict(done):
    out, _, _ = done
    (out / "tiny/comparison.json").unlink()  # which names the seeds
    absent = {"precision": None, "recall": 0.0, "f1": 0.0, "support": 4, "predicted": 0}
    scores = [{**absent, "name": "a"}, {**absent, "name": "b", "predicted": 8}]
    one = {"classes": {"scores": scores, "confusion": None, "confused": []}, "mistakes": []}
    change(out, "lora", 0, review={**one, "classes": {**one["classes"], "scores": scores[:1]}})
    for method, seeds in (("lily", (0,)), ("lora", (1,))):
        for seed in seeds:
            change(out, method, seed, review=one)
    said = " ".join(verdicts(read(out / "tiny")))
    assert "Lily (sequence) predicts one class for every row, so it tells no classes apart." in said
    assert "LoRA predicts one class for every row with 1 of 2 seeds, so it tells no classes apart." in said


def test_the_same_command_again_trains_nothing_and_finds_the_same(done, monkeypatch):
    out, path, _ = done
    before = (out / "tiny/comparison.json").read_bytes()
    monkeypatch.setattr(runner, "_start", None)
    again = invoke(path, "train.learning_rate=0.02", "--methods", "lily,lora", "--seeds", 1, "--output", out)
    assert again.exit_code == 0, again.output
    assert (out / "tiny/comparison.json").read_bytes() == before


def test_runs_on_other_rows_under_the_same_name_are_not_counted(done):
    out, path, _ = done
    data = Path(path).parent / "rows.jsonl"
    before = data.read_text("utf-8")
    data.write_text("".join(reversed(before.splitlines(keepends=True))), "utf-8")
    again = invoke(path, "train.learning_rate=0.02", "--methods", "lily,lora", "--seeds", 1, "--output", out)
    data.write_text(before, "utf-8")
    assert again.exit_code == 1
    assert "runs/lily/0 has other rows of data.test, data.train, data.validation" in again.output


def test_runs_of_another_recipe_are_neither_counted_nor_replaced(done):
    out, path, _ = done
    other = invoke(path, "--methods", "lily", "--seeds", 1, "--output", out)
    assert isinstance(other.exception, LilyError)
    assert "train.learning_rate was 0.02 and is now 0.01" in str(other.exception)
    assert (out / "tiny/runs/lily/0/metrics.json").is_file()


def test_the_table_follows_from_the_runs_files_alone(done):
    out, _, _ = done
    whole = summary([read(out / "tiny")])
    (out / "tiny/comparison.json").unlink()
    shutil.rmtree(out / "tiny/runs/lily/0/best")
    assert invoke("--summary", out).output.strip() == whole
    head = "| task | metric | rows | seeds | untrained | Lily | LoRA | rate (scale) | parameters (Lily) |"
    assert whole.splitlines()[0] == head
    assert "| 0.02 (4), 0.02 (2) |" in whole.splitlines()[2]
    assert whole.splitlines()[2].startswith("| tiny | accuracy | 12 | 1 | ")


def test_a_sweep_beside_comparisons_is_none_of_them(done):
    out, _, _ = done
    whole = summary([read(out / "tiny")])
    shutil.copytree(out / "tiny/runs", out / "tiny-granularity/runs")
    (out / "tiny-granularity/granularity.json").touch()
    assert invoke("--summary", out).output.strip() == whole
    with pytest.raises(LilyError, match="tiny-granularity holds no comparison"):
        raise invoke("--summary", out / "tiny-granularity").exception
    (out / "tiny-granularity/granularity.json").rename(out / "tiny-granularity/settings.json")  # not finished yet
    assert invoke("--summary", out).output.strip() == whole


def change(out, method, seed, **figures):
    """Give a method's run of seed 0 other figures, as a run of another seed."""
    runs = out / "tiny/runs" / method
    if seed:
        shutil.copytree(runs / "0", runs / str(seed))
    file = runs / str(seed) / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": seed, **figures}))


def test_forgetting_has_a_column_where_it_was_measured(done):
    out, _, _ = done
    assert "forgetting" not in quality(read(out / "tiny"))[0]
    (out / "tiny/comparison.json").unlink()  # which names the seeds
    for seed, risen in ((1, 0.07), (0, 0.05)):
        change(out, "lily", seed, forgetting={"before": 2.0, "last": 3.0, "after": 2 + risen, "increase": risen})
    found = read(out / "tiny")
    lines = quality(found)
    assert [line[-1] for line in lines] == ["forgetting", "", "0.0600 ± 0.0141", ""]
    comparing.write(found, out / "tiny")
    for file in ("comparison.md", "comparison.html"):
        text = (out / "tiny" / file).read_text()
        assert "0.0600 ± 0.0141" in text
        assert "Forgetting: increase of the loss on general text" in text


def test_what_is_not_a_number_is_shown_as_a_dash_and_not_tested(done):
    out, _, _ = done
    (out / "tiny/comparison.json").unlink()
    nothing = {"final": {"accuracy": float("nan")}, "history": [{"step": 10, "accuracy": float("nan")}]}
    change(out, "lora", 1, **nothing)
    items = json.loads((out / "tiny/runs/lora/0/predictions.json").read_text())
    items["items"]["accuracy"][0] = float("nan")
    (out / "tiny/runs/lora/0/predictions.json").write_text(json.dumps(items))
    found = read(out / "tiny")
    assert [line[1:] for line in quality(found)[2:]][1] == ["-", "-", "-"]
    assert quality(found)[2][-2:] == ["", ""]  # the first method is not tested against itself
    comparing.write(found, out / "tiny")
    assert "-: not tested (no common seed or rows" in (out / "tiny/comparison.md").read_text()
    assert "nan" not in (out / "tiny/comparison.html").read_text()


def test_a_folder_of_runs_on_different_rows_is_no_comparison(done):
    out, _, _ = done
    file = out / "tiny/runs/lora/0/metrics.json"
    figures = json.loads(file.read_text())
    file.write_text(json.dumps({**figures, "rows": {**figures["rows"], "test": 13}}))
    with pytest.raises(LilyError, match="holds runs of different recipes or rows"):
        read(out / "tiny")
    file.write_text("{}")
    with pytest.raises(LilyError, match="are not what `lily train` writes"):
        read(out / "tiny")


def test_another_folder_is_never_written_into(tmp_path, recipe):
    (tmp_path / "mine/tiny").mkdir(parents=True)
    (tmp_path / "mine/tiny/thesis.txt").write_text("all of it")
    for more in ([], ["--overwrite"]):
        found = invoke(recipe, "--output", tmp_path / "mine", *more)
        assert "thesis.txt, which `lily compare` does not write" in str(found.exception)
    assert os.listdir(tmp_path / "mine/tiny") == ["thesis.txt"]


class Page(HTMLParser):
    """Tags, text, and what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.tags, self.words, self.fetched, self.heads = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href") and not (v or "").startswith("#")]

    def handle_data(self, data):
        self.words.append(data)
        if self.tags[-1:] == ["th"] and data.strip():  # not the line break after a header
            self.heads.append(data)


def test_the_page_holds_everything_and_loads_nothing(done):
    out, _, _ = done
    page = Page()
    page.feed((out / "tiny/comparison.html").read_text())
    assert not page.fetched
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2  # while it was learned, and quality against one cost
    assert page.tags.count("title") >= 3  # the page's, and each picture's
    words = " ".join(page.words)
    for said in ("Lily (sequence)", "LoRA", "McNemar, exact", "this differs most"):
        assert said in words
    verdict, table, curves, costs = map(
        words.index, ("do not differ by more", "On 12 test rows", "on the validation rows", "Of one run")
    )
    assert verdict < table < curves < costs
    markdown = (out / "tiny/comparison.md").read_text()
    assert "| LoRA |" in markdown
    assert len(page.heads) == page.tags.count("th")  # none is empty


@pytest.mark.parametrize(
    ("cheaper", "title"),
    [
        ({"parameters": 10}, "Quality against trained parameters"),
        ({"seconds": 0.001}, "Quality against seconds of training"),
        ({"peak_bytes": 1e3}, "Quality against peak memory"),
    ],
)
def test_quality_is_drawn_against_the_cost_in_which_the_methods_differ_most(done, cheaper, title):
    found = read(done[0] / "tiny")
    text = written(replace(found, entries=(found.entries[0], replace(found.entries[1], **cheaper))))
    assert re.findall("<h3>(Quality against [^<]*)</h3>", text) == [title]


@pytest.mark.parametrize("width", [60, 80])
def test_no_cell_of_the_terminals_tables_is_cut_or_wrapped(done, width):
    found = read(done[0] / "tiny")
    large = {"parameters": 1_234_567, "seconds": 12_345.0, "peak_bytes": 12.3e9, "adapter_bytes": 4.94e6}
    found = replace(found, entries=tuple(replace(e, **large, learning_rate=0.00125) for e in found.entries))
    console = Console(width=width, file=StringIO())
    _print(found, console)
    text = console.file.getvalue()
    for value in ("1,234,567", "12345", "12,300", "4.94", "0.00125", "+0.0 (+0.0 to +0.0)"):
        assert value in text
    boxes = [line for line in text.splitlines() if line.startswith(("┃", "│"))]
    assert max(map(len, boxes)) <= width
    assert not any("…" in line for line in boxes)
    assert all(line.split(line[0])[1].strip() for line in boxes if line[0] == "│")  # each line names its method


def test_one_seed_has_no_standard_deviation_and_several_have_one(done):
    found = read(done[0] / "tiny")
    # a fast machine trains in 0 seconds
    found = replace(found, entries=tuple(replace(e, seconds=7.0) for e in found.entries))
    one = written(found)
    assert "tandard deviation</th>" in one
    for said in ("Bars:", "see the standard deviation", "Standard deviation over the seeds", 'class="number">0<'):
        assert said not in one
    entries = [replace(e, seeds=(0, 1), values={m: (0.5, 0.75) for m in e.values}) for e in found.entries]
    several = written(replace(found, entries=tuple(entries)))
    assert "Bars: one standard deviation." in several
    assert 'class="number">18<' in several
    assert "A difference that is not much larger than it may be chance." in several


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("colours", "width"), [("light", WIDE), ("dark", WIDE), ("light", NARROW)])
def test_a_browser_renders_the_page_without_complaint(done, tmp_path, colours, width):
    page = done[0] / "tiny/comparison.html"
    assert_drawn(screenshot(page, colours, tmp_path, width), colours, width)
    assert_nothing_cut(page, tmp_path, width)
    assert_printed(printed(page, tmp_path))


def settings(tmp_path, **changes):
    given = {"methods": ("lily", "ia3"), "seeds": 1, "equal": "params", "tune": True, "jobs": 1, "threads": 1}
    return comparing.CompareOptions(**{**given, **changes})


def test_tuning_searches_for_every_method_alike_on_validation_rows(tmp_path, recipe, monkeypatch):
    chosen = loader.load_recipe(recipe)
    found = resolve(chosen, parse("lily,ia3,none"), "params", preflight.prepare(chosen).meta)
    asked = []

    def run(jobs, *_):
        outcomes = {}
        for job in jobs:
            asked.append(job)
            assert job.trial
            rate = job.recipe.lily.learning_rate or job.recipe.peft.learning_rate or job.recipe.train.learning_rate
            best = -abs(rate - 0.02) - abs(job.recipe.lily.scaling - 8.0) * (job.recipe.method == "lily")
            outcomes[job.name] = Outcome({"best": {"value": best}})
        return outcomes

    monkeypatch.setattr(comparing, "run", run)
    tuned, record, failed = comparing._tuned(chosen, found, settings(tmp_path), tmp_path, None, print)
    assert failed == {}
    assert [(c.name, c.learning_rate) for c in tuned] == [("lily", 0.02), ("ia3", 0.02), ("none", 0.01)]
    assert tuned[0].recipe.lily.scaling == 8.0
    assert record["lily"]["scale"] == 8.0
    assert record["ia3"]["scale"] is None
    assert len(record["ia3"]["trials"]) == 4  # half, once, twice, and beyond the better end
    assert {t["learning_rate"] for t in record["lily"]["trials"]} == {0.005, 0.01, 0.02, 0.04}
    assert len({job.folder for job in asked}) == len(asked)


def test_a_method_whose_search_finds_nothing_is_told_and_the_others_go_on(done, monkeypatch):
    out, path, _ = done
    trained = json.loads((out / "tiny/runs/lily/0/metrics.json").read_text())
    for method in ("lily", "lora"):
        (out / "tiny/tuning" / method).mkdir(parents=True)  # of a search that was interrupted

    def run(jobs, *_):
        assert all(job.trial or job.name == "lily/0" for job in jobs)
        outcomes = {}
        for job in jobs:
            rate = job.recipe.train.learning_rate if job.recipe.lily.learning_rate is None else 0.0
            figures = {**trained, "best": {"value": -abs(rate - 0.02)}} if job.trial else trained
            lost = job.recipe.method == "lora"
            outcomes[job.name] = Outcome(None, "the loss is nan (see x.log)") if lost else Outcome(figures)
        return outcomes

    monkeypatch.setattr(comparing, "run", run)
    command = [path, "train.learning_rate=0.02", "--methods", "lily,lora", "--seeds", 1, "--tune", "--output", out]
    found = invoke(*command)
    assert found.exit_code == 1, found.output + str(found.exception)
    why = "lora failed: at every learning rate that was tried, the last time because: the loss is nan (see x.log)"
    kept = json.loads((out / "tiny/comparison.json").read_text())
    assert [entry["name"] for entry in kept["entries"]] == ["lily"]  # the runs that LoRA has from before are no result
    assert kept["failed"].keys() == {"lora"}
    assert [trial["accuracy"] for trial in kept["setting"]["tuning"]["lora"]["trials"]] == [None] * 7
    page = (out / "tiny/comparison.html").read_text()
    for said in (found.output, (out / "tiny/comparison.md").read_text(), page):
        assert why in said
    assert "lora: 7 runs" in page
    assert len(read(out / "tiny").entries) == 1


def test_a_recipe_that_fails_does_not_hold_up_the_next_one(done, encoder, tmp_path, monkeypatch):
    path, out = done[1], done[0].rename(tmp_path / "[v2]")

    def compare(recipe, *_):
        if recipe.name == "first":
            raise LilyError("all runs of first failed: it broke")
        return read(out / "tiny")

    monkeypatch.setattr(comparing, "compare", compare)
    command = [made(tmp_path, encoder, "first"), path, "train.learning_rate=0.02", "train.epochs=2"]
    found = invoke(*command, "--methods", "lily,lora", "--seeds", 1, "--output", out)
    assert found.exit_code == 1, found.output + str(found.exception)
    assert "McNemar, exact" in found.output
    assert f"written to {out / 'tiny'}" in found.output
    assert found.stderr.endswith("\nerror: first: all runs of first failed: it broke\n")


def test_runs_of_all_recipes_are_checked_before_the_first_is_trained(done, encoder, tmp_path, monkeypatch):
    out, path, _ = done
    monkeypatch.setattr(runner, "_start", None)
    found = invoke(made(tmp_path, encoder, "first"), path, "--methods", "lily", "--seeds", 1, "--output", out)
    assert isinstance(found.exception, LilyError)
    assert "was trained by another recipe" in str(found.exception)
    assert not (out / "first").exists()


def test_before_a_search_runs_are_checked_but_for_what_it_chooses(done, tmp_path, monkeypatch):
    out, path, _ = done

    def check(*changes, **wish):
        recipe = loader.load_recipe(path, changes)
        given = settings(tmp_path, methods=("lily",), **wish)
        comparing.check(recipe, comparing.resolved(recipe, given), given, out / "tiny")

    other = ["train.learning_rate=0.02", "lily.learning_rate=0.5"]
    with pytest.raises(LilyError, match="was trained without --tune"):  # it would fail at the end of the search
        check(*other)
    monkeypatch.setattr(comparing.folder, "is_begun", lambda _: False)
    check(*other)  # what the finished runs have instead may be what the search chooses
    check(*other, "train.weight_decay=0.5", overwrite=True)
    with pytest.raises(LilyError, match=r"train\.weight_decay was"):
        check(*other, "train.weight_decay=0.5")
    with pytest.raises(LilyError, match=r"lily\.learning_rate was"):
        check(*other, tune=False)


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, recipe, monkeypatch):
    chosen = loader.load_recipe(recipe)
    code = "import sys; print('error: it broke'); sys.exit(2)"
    monkeypatch.setattr(
        runner, "_start", lambda job, out, threads, lock: subprocess.Popen(
            [sys.executable, "-c", code], stdout=open_log(out, job)
        ),
    )  # fmt: skip
    jobs = [Job(f"lora/{i}", chosen, tmp_path / "runs" / str(i)) for i in range(3)]
    told = []
    outcomes = runner.run(jobs, tmp_path, 2, 1, None, told.append)
    assert sorted(line.split()[1] for line in told) == ["lora/0", "lora/1", "lora/2"]
    assert all(o.figures is None and o.error.startswith("it broke (see ") for o in outcomes.values())


def test_a_run_is_a_process_of_its_own_whose_refusal_is_told(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(loader, "dump_recipe", lambda _: "name: tiny\nmodle: small\n")
    job = Job("lora/0", loader.load_recipe(recipe), tmp_path / "run")
    with open(tmp_path / "lock", "w") as lock:
        outcomes = runner.run([job], tmp_path, 1, 1, lock, lambda *_: None)
    assert "lora-0.yaml:2: modle: unknown key" in outcomes["lora/0"].error


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, often: out of memory (see "),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV (see "),
        ("sys.exit(143)", "killed by SIGTERM (see "),  # a run that had time for its checkpoint
        ("sys.exit(2)", "epoch 3 of 4 (see "),
    ],
)
def test_a_run_that_was_killed_is_not_blamed_on_its_last_line(tmp_path, recipe, monkeypatch, ending, said):
    code = f"import os, sys; print('epoch 3 of 4', flush=True); {ending}"
    monkeypatch.setattr(
        runner, "_start", lambda job, out, threads, lock: subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=open_log(out, job)
        ),
    )  # fmt: skip
    job = Job("lora/0", loader.load_recipe(recipe), tmp_path / "run")
    outcomes = runner.run([job], tmp_path, 1, 1, None, lambda *_: None)
    assert outcomes["lora/0"].error.startswith(said)


def open_log(out, job):
    log = runner._log(out, job)
    log.parent.mkdir(exist_ok=True)
    return log.open("wb")


def command(paths, out):
    given = ["--methods", "lily,lora", "--seeds", "2", "--jobs", "1", "--threads", "1", "--output", str(out)]
    return [sys.executable, "-m", "lily", "compare", *paths, *given]


def workers(process):
    """The runs of a comparison."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition, process):
    end = time.monotonic() + 3600
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_comparison_of_two_recipes_killed_in_the_middle_goes_on_and_finds_what_one_that_was_not_finds(
    tmp_path, encoder
):
    paths = [made(tmp_path, encoder, name, epochs=6) for name in ("first", "second")]
    quiet = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(paths, whole), check=True, **quiet)

    def begun(run):
        recipe, method, seed = run.split("/")
        return lambda: list((killed / recipe / "runs" / method / seed / "checkpoints").glob("checkpoint-*"))

    process = subprocess.Popen(command(paths, killed), **quiet)
    wait_for(begun("first/lora/0"), process)
    (worker,) = workers(process)
    os.kill(worker, signal.SIGKILL)  # one run: the comparison goes on without it
    wait_for(begun("second/lora/0"), process)
    first = json.loads((killed / "first/comparison.json").read_text())
    assert first["failed"].keys() == {"lora/0"}
    assert first["failed"]["lora/0"].startswith("killed by SIGKILL")
    (worker,) = workers(process)
    process.kill()  # the comparison itself: its run ends too, with a checkpoint
    process.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
    assert not (killed / "second/runs/lora/0/metrics.json").exists()

    process = subprocess.Popen(command(paths, killed), **quiet)
    wait_for(begun("second/lily/1"), process)  # which only this process begins
    process.terminate()  # and politely
    assert process.wait() == 143
    assert b"repeat the same command to continue" in process.stdout.read()

    subprocess.run(command(paths, killed), check=True, **quiet)
    for recipe in ("first", "second"):
        a, b = (json.loads((folder / recipe / "comparison.json").read_text()) for folder in (whole, killed))
        for found in (a, b):
            assert [entry["seeds"] for entry in found["entries"]] == [[0, 1]] * 2
            for entry in found["entries"]:
                del entry["seconds"], entry["peak_bytes"]
        assert a == b
        for run in ("lily/0", "lora/0", "lily/1", "lora/1"):
            for name in ("best/adapter_model.safetensors", "predictions.json"):
                ours, theirs = (folder / recipe / "runs" / run / name for folder in (whole, killed))
                assert ours.read_bytes() == theirs.read_bytes(), f"{recipe} {run} {name}"


def test_a_run_is_written_into_its_folder_also_with_braces_in_the_name(recipe, tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(worker, "end_with", lambda parent: None)
    monkeypatch.setattr(train, "train", lambda chosen, **_: folders.append(output_folder(chosen)))
    for folder in ("runs/{x}/0", "runs/{name} #2/0"):
        worker.main(recipe, folder, 0, str(tmp_path / "events"))
        assert folders.pop() == Path(folder)
