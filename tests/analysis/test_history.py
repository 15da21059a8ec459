"""Expert weights over training: what the callback records is what the layers used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from settling import ROWS, arguments, fresh
from transformers import Trainer, TrainerCallback

import lily
from lily.analysis.history import FILE, SNAPSHOTS, RoutingCallback, RoutingHistory, steps_recorded
from lily.callbacks.router_watch import RouterWatch
from lily.errors import LilyError
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


class Recompute(TrainerCallback):
    """Means of the weights that every step used, straight from each layer's inputs."""

    def __init__(self, model):
        self.found, self.steps, self.seen = find(model), [], {}
        for name, layer in self.found.layers.items():
            layer.register_forward_pre_hook(lambda module, args, name=name: self.note(name, module, args[0]))

    def note(self, name, layer, x):
        with torch.no_grad():
            A, _ = layer.tensors_of("default")
            p = torch.softmax((x @ A.T @ layer.router_of("default").T).double(), -1)
            self.seen.setdefault(name, []).append(p.flatten(0, -2))

    def on_step_end(self, args, state, control, **_):
        self.steps.append({name: torch.cat(parts).mean(0).tolist() for name, parts in self.seen.items()})
        self.seen = {}


def train(folder, callbacks, model=None, resume=None, **options):
    model = model or fresh(routing="token")
    made = callbacks(model)
    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=ROWS, callbacks=made)
    trainer.train(resume_from_checkpoint=resume)
    return model, made


def test_every_step_is_recorded_as_a_direct_recomputation_finds_it(tmp_path):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2}
    model, (callback, truth) = train(tmp_path, lambda m: [RoutingCallback(every=1), Recompute(m)], **options)
    history = RoutingHistory.load(tmp_path / FILE)
    assert history == callback.history
    assert history.steps == (1, 2, 3, 4)
    assert history.tokens == dict.fromkeys(
        find(model).layers, (4 * 8,) * 4
    )  # two micro-batches of two rows of eight tokens
    for name in find(model).layers:
        expected = torch.tensor([step[name] for step in truth.steps])
        assert torch.tensor(history.layers[name]).allclose(expected, atol=1e-6)
        assert torch.tensor(history.accumulated(name)).allclose(expected.mean(0), atol=1e-6)
    assert not any(layer.statistics for layer in find(model).layers.values())


def test_recording_changes_nothing_that_is_learned(tmp_path):
    with_it, _ = train(tmp_path / "a", lambda m: [RoutingCallback(every=1)], max_steps=3)
    without, _ = train(tmp_path / "b", lambda m: [], max_steps=3)
    for (name, p), q in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_by_default_every_second_step_of_a_short_training_is_recorded(tmp_path):
    _, (callback,) = train(tmp_path, lambda m: [RoutingCallback()], max_steps=20)
    assert callback.history.steps == tuple(range(2, 21, 2))


# From 5,000 steps on the health watch looks at every hundredth, so fewer totals tell all.
TOTALS = sorted({*range(1, 5_100), *range(5_100, 20_000, 37), *range(10_000, 10_100), 20_000})


def test_of_any_training_half_to_all_snapshots_are_taken_evenly_and_none_of_the_health_watch():
    for total in TOTALS:
        steps = np.array(steps_recorded(total), int)
        assert not RouterWatch.wants(steps, total).any(), total
        least = SNAPSHOTS // 2 if total >= SNAPSHOTS else total // 2
        assert least <= len(steps) <= SNAPSHOTS, total
        if total > SNAPSHOTS:
            gaps = np.diff(steps, prepend=-1, append=total)
            assert gaps.min() > 0, total
            assert gaps.max() <= total / 33, total


def test_a_resumed_training_goes_on_with_its_checkpoints_record(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, lambda m: [RoutingCallback(every=1)], max_steps=6, **saving)
    assert RoutingHistory.load(tmp_path / "checkpoint-3" / FILE).steps == (1, 2, 3)
    whole = RoutingHistory.load(tmp_path / FILE)
    resume = str(tmp_path / "checkpoint-3")
    train(tmp_path, lambda m: [RoutingCallback(every=1)], resume=resume, max_steps=6, **saving)
    again = RoutingHistory.load(tmp_path / FILE)
    assert again.steps == whole.steps
    for name, rows in whole.layers.items():
        assert torch.tensor(again.layers[name]).allclose(torch.tensor(rows), atol=1e-5)


def test_a_static_adapter_has_nothing_to_record(tmp_path):
    train(tmp_path, lambda m: [RoutingCallback(every=1)], model=fresh(routing="static"), max_steps=2)
    assert not (tmp_path / FILE).exists()


def test_what_settles_already_is_refused(tmp_path):
    with pytest.raises(LilyError, match="remove RoutingCallback"):
        train(tmp_path, lambda m: [lily.SettleCallback(0.4, 0.7), RoutingCallback()], max_steps=2)
    with pytest.raises(LilyError, match="every=0"):
        RoutingCallback(every=0)


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "{",
        '{"steps": [1], "tokens": [4], "layers": {"x": [["a"]]}}',
        '{"steps": [1, 2], "tokens": [4, 4], "layers": {"x": [[0.5, 0.5]]}}',
        '{"steps": [1], "tokens": [4], "layers": {"x": [[NaN, 0.5]]}}',
        '{"steps": [1], "tokens": [], "layers": {"x": [[0.5, 0.5]]}}',
        '{"steps": [1], "tokens": {"x": [4, 4]}, "layers": {"x": [[0.5, 0.5]]}}',
        '{"steps": [1], "tokens": {"y": [4]}, "layers": {"x": [[0.5, 0.5]]}}',
        '{"steps": [1], "tokens": {"x": [Infinity]}, "layers": {"x": [[0.5, 0.5]]}}',
    ],
)
def test_a_damaged_record_is_one_error(tmp_path, damage):
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(LilyError, match=FILE):
        RoutingHistory.load(tmp_path / FILE)


def test_a_record_survives_its_file_and_counts_each_layers_own_tokens(tmp_path):
    rows = ((0.25, 0.75), (0.5, 0.5))
    history = RoutingHistory((1, 2), {"x": (4, 12), "y": (4, 0), "z": (0, 0)}, dict.fromkeys("xyz", rows))
    (tmp_path / FILE).write_text(json.dumps(history.to_dict()))
    assert RoutingHistory.load(tmp_path / FILE) == history
    assert history.accumulated("x") == pytest.approx((0.4375, 0.5625))
    assert history.accumulated("y") == (0.25, 0.75)
    assert history.accumulated("z") == (0.5, 0.5)
    assert [history.largest(name) for name in "xyz"] == [(0.75, 0.5), (0.75, None), (None, None)]


class Skipping(TrainerCallback):
    """Has a layer's forward left out in the first step."""

    def __init__(self, model):
        (_, self.layer), *_ = find(model).layers.items()

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self.layer.forward = self.layer.base_layer.forward

    def on_step_end(self, args, state, control, **_):
        vars(self.layer).pop("forward", None)


def test_a_layer_that_did_not_run_in_a_step_has_no_tokens_there(tmp_path):
    model, _ = train(tmp_path, lambda m: [RoutingCallback(every=1), Skipping(m)], max_steps=2)
    history = RoutingHistory.load(tmp_path / FILE)
    first, second, *_ = find(model).layers
    assert history.tokens[first] == (0, 16)
    assert history.tokens[second] == (16, 16)
    assert history.accumulated(first) == history.layers[first][1]


def test_a_training_goes_on_with_the_record_of_an_earlier_version(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    model, _ = train(tmp_path, lambda m: [RoutingCallback(every=1)], max_steps=2, **saving)
    kept = tmp_path / "checkpoint-1" / FILE
    values = json.loads(kept.read_text())
    kept.write_text(json.dumps({**values, "tokens": [16]}))
    whole = RoutingHistory.load(tmp_path / FILE)
    train(tmp_path, lambda m: [RoutingCallback(every=1)], resume=str(kept.parent), max_steps=2, **saving)
    again = RoutingHistory.load(tmp_path / FILE)
    assert (again.steps, again.tokens) == (whole.steps, whole.tokens)
    assert again.tokens == dict.fromkeys(find(model).layers, (16, 16))
