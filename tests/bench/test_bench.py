"""The benchmarks measure what they say; how fast anything is, no test asks."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from paths import ROOT
from typer.testing import CliRunner

from lily import LilyError
from lily.bench import measure, report, subjects
from lily.bench.contestants import LORA, MERGED, NAMES, STOCK, STRUCTURES, contestants
from lily.bench.subjects import Shape
from lily.cli.main import app

OPTIONS = {"r": 8, "num_A": 2, "num_B": 2}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def subject():
    return subjects.llama(Shape(64, 4, 2, 8), "cpu", torch.float32, vocabulary=50)


def test_contestants_share_the_frozen_weights_and_lora_has_no_more_parameters(subject):
    made = {c.name: c for c in contestants(subject, OPTIONS)}
    assert tuple(made) == NAMES
    base = {p.data_ptr() for p in subject.base.parameters()}
    for c in made.values():
        frozen = {p.data_ptr() for p in c.model.parameters() if not p.requires_grad}
        assert (frozen == base) == (c.name != MERGED)
    ours = made["Lily token"]
    assert 0.5 * ours.parameters < made[LORA].parameters <= ours.parameters
    assert made[LORA].rank < ours.rank == made["LoRA, equal rank"].rank
    assert type(made[STOCK].model.base_model).__module__.startswith("peft.")
    assert type(ours.model.base_model).__module__.startswith("lily.")


def test_structures_are_measured_at_no_more_parameters_than_lora_has(subject):
    made = {c.name: c for c in contestants(subject, {"r": 16, "num_A": 2, "num_B": 2}, [LORA, *STRUCTURES])}
    budget = made.pop(LORA).parameters
    assert list(made) == list(STRUCTURES)
    assert all(0.85 * budget < c.parameters <= budget for c in made.values())
    assert made["Lily pair"].rank == made["Lily permuted"].rank > made["Lily own"].rank


def test_the_frozen_models_step_goes_through_all_of_it(subject):
    (frozen,) = contestants(subject, OPTIONS, ["frozen"])
    seen = []
    first = frozen.model.model.layers[0].mlp.down_proj
    first.register_full_backward_hook(lambda *_: seen.append(1))
    measure.training_step(subject, frozen)(0)
    assert seen == [1]


def test_every_round_starts_with_another_contestant_and_ratios_are_within_a_round():
    order = []

    def run(name, value):
        return lambda turn: order.append((turn, name)) or value * (turn + 10)

    found = measure.interleave({"a": run("a", 1.0), "b": run("b", 3.0)}, "a", rounds=3)
    assert found["b"].ratios == pytest.approx([3.0] * 3)
    assert found["b"].median == pytest.approx(33.0)
    assert [name for turn, name in order if turn == 0] == ["a", "b"]
    assert [name for turn, name in order if turn == 1] == ["b", "a"]
    assert len([1 for turn, _ in order if turn < 0]) == 2


def test_peak_memory_counts_what_is_held_at_once():
    def work():
        a = torch.empty(1000, 1000)
        b = a + 1
        del a
        return b + 1

    assert 8e6 <= measure.peak(work, torch.device("cpu")) < 8.1e6


def test_an_unknown_contestant_or_measurement_is_named(subject):
    with pytest.raises(LilyError, match="'DoRA' is unknown"):
        contestants(subject, OPTIONS, ["DoRA"])
    with pytest.raises(LilyError, match="'speed' is unknown"):
        report.run(subject, OPTIONS, ["speed"], 1)


def test_the_command_measures_writes_and_reads_back(tmp_path):
    arguments = ["bench", "llama", "--width", "64", "--depth", "4", "--tokens", "8", "--batch", "2", "--rounds", "1"]
    names = "LoRA;stock Lily;Lily token;Lily merged"
    done = CliRunner().invoke(app, [*arguments, "--r", "8", "--contestants", names, "--out", str(tmp_path / "[v2]")])
    assert done.exit_code == 0, done.output
    assert f"written to {tmp_path}/[v2]\n" in done.output
    found = report.Report.read(tmp_path / "[v2]" / "results.json")
    assert set(found.results) == {"step", "memory", "prefill", "decode"}
    assert "ratio to LoRA at equal parameters" in (tmp_path / "[v2]" / "ratios.svg").read_text()
    assert set(found.results["step"]) == {"LoRA", "stock Lily", "Lily token"}
    assert set(found.results["decode"]) == {"LoRA", "stock Lily", "Lily token", "Lily merged"}
    assert found.results["step"]["LoRA"].ratios == [1.0]
    assert found.files["stock Lily"]["bytes"] > 1.5 * found.files["Lily token"]["bytes"]
    assert json.loads(found.to_json())["machine"]["versions"]["torch"]


def test_structures_and_rows_of_several_adapters_are_measured(subject):
    found = report.run(subject, OPTIONS, ["step", "mixed"], 1, ["frozen", "Lily token", "Lily merged", "Lily own"])
    assert set(found.results["step"]) == {"LoRA", "frozen", "Lily token", "Lily own"}
    assert set(found.results["mixed"]) == {"LoRA", "Lily token", "Lily own"}
    assert all(outcome.ratio > 0 for outcome in found.results["mixed"].values())


def test_what_is_measured_with_rows_of_several_adapters_leaves_the_contestant_as_it_was(subject):
    (one,) = contestants(subject, OPTIONS, ["Lily token"])
    before = {name: p.data_ptr() for name, p in one.model.named_parameters()}
    assert measure.mixed_time(subject, one)(0) > 0
    assert {name: p.data_ptr() for name, p in one.model.named_parameters()} == before
    assert list(one.model.peft_config) == ["default"]


def test_a_model_of_ones_own_is_measured_from_its_config_alone(tmp_path):
    from helpers import build

    build("gpt2").config.save_pretrained(tmp_path)
    arguments = ["bench", str(tmp_path), "--measure", "step", "--tokens", "8", "--rounds", "1", "--r", "4"]
    done = CliRunner().invoke(app, [*arguments, "--targets", "c_attn", "--contestants", "LoRA;Lily token"])
    assert done.exit_code == 0, done.output
    assert "Lily token" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["llama", "--width", "100"], "multiple of 64"),
        (["llama", "--dtype", "int8"], "int8 is not known"),
        (["vit", "--measure", "speed"], "'speed' is unknown"),
        (["no/such/model"], "no/such/model"),
        (["llama", "--depth", "2", "--width", "64", "--contestants", "VeRA"], "'VeRA' is unknown"),
    ],
)
def test_a_wrong_option_is_one_error(options, message, capsys, monkeypatch):
    from lily.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["lily", "bench", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["offline", "scaling", "forgetting"])
def test_the_pages_show_the_committed_figures_of_long_benchmarks(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import performance

    benchmark = importlib.import_module(name)
    assert performance.shown(benchmark.PAGE)[benchmark.MARKER] == benchmark.kept()


def test_the_pages_show_the_committed_figures():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import performance

    made = {}
    for folder in performance.RESULTS.iterdir():
        made.update(performance.tables(folder))
    for page in performance.PAGES:
        for marker, shown in performance.shown(page).items():
            assert made[marker] == shown, f"{page.name}: {marker}"
