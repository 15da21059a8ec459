"""What `make gpu` runs, in which order and time, what it repeats, and what its parts need. Figures need a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import time

import pytest
import torch
from helpers import build
from paths import ROOT
from peft import LoraConfig, get_peft_model

from benchmarks import gpu, gpu_map
from lily import LilyError
from lily.bench.report import Report

SETTINGS = ("llama-1b", "llama-3b", "vit-b")


class Machine:
    """A clock, and commands that take a known time and write their file."""

    def __init__(self, folder, seconds, *, status=0, complete=True):
        self.now, self.folder, self.seconds, self.started = 0.0, folder, seconds, []
        self.status, self.complete = status, complete

    def launch(self, command, limit):
        name = next(name for name in (*SETTINGS, "map", "tests") if any(name in word for word in command[1:]))
        self.started.append(name)
        took = self.seconds.get(name, 10)
        self.now += min(took, limit)
        if took > limit:
            return None
        if name != "tests" and self.status == 0:
            (self.folder / f"{name}.json").write_text(json.dumps({"done": self.complete}))
        elif self.status == 0:
            (self.folder / "tests.xml").write_text(
                '<testsuites><testsuite tests="1" failures="0" errors="0" skipped="0" time="2">'
                '<testcase classname="a" name="b"/></testsuite></testsuites>'
            )
        return self.status

    def run(self, parts=gpu.PARTS, seconds=gpu.SECONDS, again=False):
        jobs = gpu.jobs(parts, self.folder.parent, self.folder, SETTINGS, smoke=False, again=again)
        return gpu.run(jobs, seconds, again, self.launch, lambda: self.now, lambda _: None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "card").mkdir()
    return tmp_path / "card"


def test_all_parts_run_once_and_are_not_repeated_unless_asked(folder):
    machine = Machine(folder, {})
    assert machine.run().done == machine.started == ["tests", "vit-b", "llama-1b", "llama-3b", "map"]
    again = machine.run()
    assert (again.before, again.done, len(machine.started)) == (machine.started, [], 5)
    assert machine.run(["tests", "map"], again=True).done == ["tests", "map"]
    assert gpu.Job("map", "map", folder / "map.json", list, 1, 1).done
    assert json.loads((folder / "tests.json").read_text())["passed"] == 1


def test_the_time_of_all_parts_together_is_kept_and_what_does_not_fit_is_told(folder):
    machine = Machine(folder, {"llama-1b": 999, "llama-3b": 290})
    found = machine.run()
    assert machine.now <= gpu.SECONDS
    assert found.done == ["tests", "vit-b", "llama-3b"]
    assert found.left_out == {"llama-1b": "ended after 240 s", "map": "needs 90 s, 20 s are left"}
    assert "map" not in machine.started
    later = Machine(folder, {"llama-1b": 100})
    assert later.run().done == later.started == ["llama-1b", "map"]


def test_a_part_that_is_not_complete_goes_on_in_the_next_call_and_a_failure_is_one(folder):
    machine = Machine(folder, {}, complete=False)
    assert machine.run(["map"]).left_out == {"map": "not complete after 10 s; run again to go on"}
    machine.complete = True
    assert machine.run(["map"]).done == ["map"]
    assert Machine(folder, {}, status=1).run(["tests", "performance"]).failed == [
        "tests",
        "vit-b",
        "llama-1b",
        "llama-3b",
    ]


def test_the_map_gets_the_time_that_is_left_less_a_margin(folder):
    (job,) = gpu.jobs(["map"], folder.parent, folder, SETTINGS, smoke=False, again=True)
    command = job.command(200)
    assert command[command.index("--seconds") + 1] == str(200 - gpu.MARGIN)
    assert command[-1] == "--again"


def test_failed_tests_are_named_and_are_not_done(folder):
    (folder / "tests.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1" time="2.5">'
        '<testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure/></testcase><testcase classname="t" name="c"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    gpu.record_tests(folder / "tests.json", 1)
    found = json.loads((folder / "tests.json").read_text())
    assert (found["done"], found["passed"], found["failed"], found["skipped"]) == (False, 1, ["t::b"], 1)


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    file = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(file)!r}, 'w').write(str(time.time()))\n    time.sleep(0.05)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.start([sys.executable, "-c", code], 3) is None
    time.sleep(0.3)
    last = file.read_text()
    time.sleep(0.5)
    assert file.read_text() == last
    assert gpu.start([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def test_a_device_s_name_is_a_folder():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import performance

    assert performance.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert set(SETTINGS) == set(performance.CUDA) == set(performance.SMOKE) <= set(gpu.TIMES)
    for name, setting in performance.CUDA.items():
        assert set(performance.SMOKE[name].kinds) == set(setting.kinds)


def test_goals_are_judged_as_the_pages_show_ratios(folder):
    outcome = {"median": 1.0, "ratios": [1.004]}
    step = {
        "LoRA": outcome,
        "Lily token": outcome,
        "Lily static": {**outcome, "ratios": [1.006]},
        "Lily merged": outcome,
    }
    decode = {"Lily token": {**outcome, "ratios": [1.05]}, "frozen": outcome}
    report = Report("a", {}, {}).to_json()
    (folder / "llama-1b.json").write_text(
        json.dumps({**json.loads(report), "results": {"step": step, "decode": decode}})
    )
    assert gpu.goals(folder, SETTINGS) == [
        "met: llama-1b, step, Lily token: 1.00 (at most 1.00)",
        "NOT met: llama-1b, step, Lily static: 1.01 (at most 1.00)",
        "met: llama-1b, decode, Lily token: 1.05 (at most 1.05)",
    ]


def test_missing_and_untested_packages_are_told_with_the_version_that_is_needed():
    wanted = gpu.requirements((ROOT / "pyproject.toml").read_text())
    assert wanted["peft"].startswith("peft>=")
    assert set(gpu.NEEDED) <= set(wanted)

    def version(name):
        if name == "pytest":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"peft": "0.1"}.get(name) or importlib.metadata.version(name)

    absent, other = gpu.lacking(gpu.NEEDED, wanted, version)
    assert absent == [wanted["pytest"]]
    assert other == [f"peft 0.1, expected {wanted['peft']}"]


def test_every_test_that_needs_a_gpu_is_found():
    marked = [
        f for f in (ROOT / "tests").rglob("test_*.py") if "needs_gpu" in f.read_text() and f.name != "test_gpu.py"
    ]
    assert set(marked) <= set(gpu.cuda_tests())
    assert ROOT / "tests" / "test_cuda.py" in gpu.cuda_tests()


# --- the map --------------------------------------------------------------------------------------------------------


def everything(losses, loss_of, **order):
    for point in gpu_map.todo(losses, lambda arm, size: arm != gpu_map.LORA or size >= 1, **order):
        assert point not in losses
        losses[point] = loss_of(point)
    return losses


def test_the_grid_grows_until_the_best_rate_is_inside_and_other_seeds_use_it():
    best = {gpu_map.LORA: 1.6e-2, "one pair": 2.5e-4}

    def loss_of(point):
        return abs(math.log(point.rate / best.get(point.arm, 2e-3)))

    losses = everything({}, loss_of, places=[("pairs", 1.0)], seeds=[0, 1, 2])
    for arm in gpu_map.ARMS:
        tuning = sorted(p.rate for p in losses if p.arm == arm and p.seed == 0)
        (rate,) = {p.rate for p in losses if p.arm == arm and p.seed > 0}
        assert rate == best.get(arm, 2e-3)
        assert tuning[0] < rate < tuning[-1]
    assert len([p for p in losses if p.seed > 0]) == 2 * len(gpu_map.ARMS)


def test_a_stopped_map_goes_on_and_a_grid_that_always_diverges_ends():
    order = {"places": [("pairs", 1.0), ("texts", 0.25)], "seeds": [0, 1]}
    whole = everything({}, lambda point: -point.rate, **order)
    assert max(len({p.rate for p in whole if p.arm == arm}) for arm in gpu_map.ARMS) == gpu_map.MOST_RATES
    assert not [p for p in whole if p.arm == gpu_map.LORA and p.size < 1]
    half = dict(list(whole.items())[: len(whole) // 2])
    assert list(everything(dict(half), lambda point: -point.rate, **order)) == list(whole)
    assert len(everything({}, lambda _: math.inf, **order)) == len(whole)


def test_arms_have_no_more_parameters_than_lora_and_use_them():
    base = build("llama")
    for size in (1, 2, 8):
        lora = gpu_map.configuration(gpu_map.LORA, size, base)
        assert isinstance(lora, LoraConfig)
        budget = _trained(lora)
        for arm in list(gpu_map.ARMS)[1:]:
            config = gpu_map.configuration(arm, size, base)
            if config is None:
                assert (arm, size) == ("own ranks", 1)
                continue
            assert _trained(config) <= budget, (arm, size)
            config.r += 1
            assert _trained(config) > budget, (arm, size)
    assert gpu_map.configuration(gpu_map.LORA, 0.25, base) is None
    quarter = gpu_map.configuration("permuted pair", 0.25, base)
    assert 0 < 4 * _trained(quarter) <= _trained(gpu_map.configuration(gpu_map.LORA, 1, base))


def _trained(config):
    return sum(p.numel() for p in get_peft_model(build("llama"), config).parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    gpu_map.tiny(folder)
    return folder


def test_pieces_give_the_model_and_the_texts_again(pieces, tmp_path):
    model, ids = gpu_map.read_pieces(pieces)
    assert len(list(pieces.glob("model.safetensors.*"))) > 2
    assert max(file.stat().st_size for file in pieces.iterdir()) <= 2**15
    assert model.lm_head.weight is model.model.embed_tokens.weight
    written = gpu_map.write_pieces(tmp_path, model, ids, 2**15)
    assert {file.name for file in written} == {file.name for file in pieces.iterdir()}
    for file in written:
        assert file.name == "config.json" or file.read_bytes() == (pieces / file.name).read_bytes()


def test_a_piece_that_is_missing_or_changed_is_named(pieces, tmp_path):
    with pytest.raises(LilyError, match=r"manifest\.json, config\.json missing; run .*gpu\.py prepare"):
        gpu_map.read_pieces(tmp_path)
    for file in pieces.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    piece = tmp_path / "model.safetensors.01"
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LilyError, match=r"model\.safetensors\.01 not as written"):
        gpu_map.read_pieces(tmp_path)
    piece.unlink()
    with pytest.raises(LilyError, match=r"model\.safetensors\.01 missing"):
        gpu_map.read_pieces(tmp_path)


def test_runs_are_kept_go_on_and_are_not_mixed_with_those_of_other_settings(pieces, tmp_path):
    base, _ = gpu_map.read_pieces(pieces)
    base.requires_grad_(False)
    tasks = {"pairs": gpu_map.Data(*[gpu_map.pairs(8, 200).train] * 2, passes=1)}
    order = {"places": (("pairs", 1.0),), "rates": (1e-3,), "seeds": (0, 1), "most_rates": 1}
    file = tmp_path / "map.json"
    assert gpu_map.run(base, tasks, file, 600, **{**order, "seeds": (0,)})["done"]
    first = json.loads(file.read_text())["rows"]
    assert [row["arm"] for row in first] == [arm for arm in gpu_map.ARMS if arm != "own ranks"]
    assert all(row["loss"] > 0 for row in first)
    stopped = gpu_map.run(base, tasks, file, -1, **order)
    assert stopped["rows"] == first
    whole = gpu_map.run(base, tasks, file, 600, **order)
    assert whole["rows"][: len(first)] == first
    assert len(whole["rows"]) == 2 * len(first)
    table = gpu_map.table(whole["rows"])
    assert "| permuted pair |" in table
    assert " of 1 |" in table
    other = {"pairs": gpu_map.Data(tasks["pairs"].train, tasks["pairs"].judged, passes=2)}
    with pytest.raises(LilyError, match="other settings; give another --out, or --again"):
        gpu_map.run(base, other, file, 600, **order)


@pytest.mark.slow
def test_training_learns_and_the_seed_decides_it(pieces):
    base, _ = gpu_map.read_pieces(pieces)
    base.requires_grad_(False)
    data = gpu_map.Data(*[gpu_map.pairs(8, 200).train] * 2, passes=15)
    config = gpu_map.configuration("permuted pair", 8.0, base)
    point = gpu_map.Point("pairs", 8.0, "permuted pair", 2e-2, 1)
    row, again = (gpu_map.train(base, config, data, point, batch=4) for _ in range(2))
    assert row["loss"] == again["loss"] < 0.97 * gpu_map.judged(base, data, 4)
    assert row["parameters"] == _parameters(base, config)
    assert not any(p.grad is not None for p in base.parameters())


def _parameters(base, config):
    from lily import build_plan, select_modules

    return build_plan(select_modules(base, config), config).parameters.total


def test_only_the_values_have_a_loss_and_the_judged_texts_are_not_trained_on():
    ids, labels = gpu_map.pairs(5, 1000, key=3, value=2).train
    assert (labels[:, :3] == -100).all()
    assert torch.equal(labels[:, 3:], ids[:, 3:])
    padded = torch.arange(40).view(20, 2)
    padded[:, 1] = -1
    found = gpu_map.texts(padded)
    assert not set(found.train[0][:, 0].tolist()) & set(found.judged[0][:, 0].tolist())
    assert (found.train[1][:, 1] == -100).all()
    assert (found.train[0] >= 0).all()
