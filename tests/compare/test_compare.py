"""Comparisons end to end on a tiny classifier: what is trained, kept, written, and gone on with after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import NARROW, WIDE, assert_drawn, assert_printed, needs_browser, printed, screenshot
from recipes_helpers import classification, rows, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli import app
from lily.compare import compare as comparing
from lily.compare import runner
from lily.compare.contestants import parse, resolve
from lily.compare.page import page as written
from lily.compare.result import read
from lily.compare.runner import Job, Outcome
from lily.compare.tables import summary
from lily.errors import LilyError
from lily.recipes import loader, preflight


def invoke(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def made(folder, encoder, **train):
    values = classification(encoder, write_jsonl(folder / "rows.jsonl", rows()), folder)
    values["train"] |= train
    del values["output"]
    return write_recipe(folder, values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder):
    """A comparison of two methods with one seed each."""
    folder = tmp_path_factory.mktemp("finished")
    path = made(folder, encoder, epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
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
    for said in ("[2/2]", "lily 2,600 (r=4), lora 1,792 (r=2)", "McNemar, exact", "LoRA", "untrained"):
        assert said in printed


def test_the_same_command_again_trains_nothing_and_finds_the_same(done, monkeypatch):
    out, path, _ = done
    before = (out / "tiny/comparison.json").read_bytes()
    monkeypatch.setattr(runner, "_start", None)
    again = invoke(path, "train.learning_rate=0.02", "--methods", "lily,lora", "--seeds", 1, "--output", out)
    assert again.exit_code == 0, again.output
    assert (out / "tiny/comparison.json").read_bytes() == before


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
    assert whole.splitlines()[0] == "| task | metric | rows | seeds | untrained | Lily | LoRA | parameters (Lily) |"
    assert whole.splitlines()[2].startswith("| tiny | accuracy | 12 | 1 | ")


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
        assert "thesis.txt, which no comparison wrote" in str(found.exception)
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
        if self.tags[-1:] == ["th"]:
            self.heads.append(data)


def test_the_page_holds_everything_and_loads_nothing(done):
    out, _, _ = done
    page = Page()
    page.feed((out / "tiny/comparison.html").read_text())
    assert not page.fetched
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4  # against parameters, time and memory; and while it was learned
    assert page.tags.count("title") >= 5  # the page's, and each picture's
    words = " ".join(page.words)
    for said in ("Lily (sequence)", "LoRA", "McNemar, exact", "trained parameters", "peak memory (MB)"):
        assert said in words
    markdown = (out / "tiny/comparison.md").read_text()
    assert "| LoRA |" in markdown
    assert len(page.heads) == page.tags.count("th")  # none is empty


def test_one_seed_has_no_standard_deviation_and_several_have_one(done):
    found = read(done[0] / "tiny")
    one = written(found)
    assert "tandard deviation</th>" in one
    for said in ("Bars:", "the standard deviation tells", "Standard deviation over the seeds", 'class="number">0<'):
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
    assert_printed(printed(page, tmp_path))


def settings(tmp_path, **changes):
    given = {"methods": ("lily", "ia3"), "seeds": 1, "equal": "params", "tune": True, "jobs": 1, "threads": 1}
    return comparing.Wish(**{**given, **changes})


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
    tuned, record = comparing._tuned(chosen, found, settings(tmp_path), tmp_path, None, print)
    assert [(c.name, c.learning_rate) for c in tuned] == [("lily", 0.02), ("ia3", 0.02), ("none", 0.01)]
    assert tuned[0].recipe.lily.scaling == 8.0
    assert record["lily"]["scale"] == 8.0
    assert record["ia3"]["scale"] is None
    assert len(record["ia3"]["trials"]) == 4  # half, once, twice, and beyond the better end
    assert {t["learning_rate"] for t in record["lily"]["trials"]} == {0.005, 0.01, 0.02, 0.04}
    assert len({job.folder for job in asked}) == len(asked)


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
    outcomes = runner.run(jobs, tmp_path, 2, 1, None, lambda job, outcome: told.append(job.name))
    assert sorted(told) == ["lora/0", "lora/1", "lora/2"]
    assert all(o.figures is None and o.error.startswith("it broke (see ") for o in outcomes.values())


def open_log(out, job):
    log = runner._log(out, job)
    log.parent.mkdir(exist_ok=True)
    return log.open("wb")


def command(path, out):
    given = ["--methods", "lily,lora", "--seeds", "2", "--jobs", "1", "--threads", "1", "--output", str(out)]
    return [sys.executable, "-m", "lily", "compare", path, *given]


def workers(process):
    """The runs of a comparison."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition, process):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_comparison_killed_in_the_middle_goes_on_and_finds_what_one_that_was_not_finds(tmp_path, encoder):
    path = made(tmp_path, encoder, epochs=12)
    quiet = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(path, whole), check=True, **quiet)

    def begun(run):
        return lambda: list((killed / "tiny/runs" / run / "checkpoints").glob("checkpoint-*"))

    process = subprocess.Popen(command(path, killed), **quiet)
    wait_for(begun("lora/0"), process)
    (worker,) = workers(process)
    os.kill(worker, signal.SIGKILL)  # one run: the comparison goes on without it
    wait_for(begun("lily/1"), process)
    (worker,) = workers(process)
    process.kill()  # the comparison itself: its run ends too, with a checkpoint
    process.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
    assert not (killed / "tiny/runs/lily/1/metrics.json").exists()

    process = subprocess.Popen(command(path, killed), **quiet)
    wait_for(begun("lora/1"), process)
    process.terminate()  # and politely
    assert process.wait() == 143
    assert b"the same command goes on where this one stopped" in process.stdout.read()

    subprocess.run(command(path, killed), check=True, **quiet)
    a, b = (json.loads((folder / "tiny/comparison.json").read_text()) for folder in (whole, killed))
    for found in (a, b):
        for entry in found["entries"]:
            del entry["seconds"], entry["peak_bytes"]
    assert a == b
    for run in ("lily/0", "lora/0", "lily/1", "lora/1"):
        name = f"tiny/runs/{run}/best/adapter_model.safetensors"
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
