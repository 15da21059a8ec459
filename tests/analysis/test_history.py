"""Expert weights over training: what the callback records is what the layers used."""

from __future__ import annotations

import json

import pytest
import torch
from test_settle import ROWS, arguments, fresh
from transformers import Trainer, TrainerCallback

import lily
from lily.adapted import find
from lily.analysis.history import FILE, RoutingCallback, RoutingHistory
from lily.errors import LilyError

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
    assert history.tokens == (4 * 8,) * 4  # two micro-batches of two rows of eight tokens
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


def test_by_default_up_to_a_hundred_steps_are_looked_at_and_none_of_the_health_watch(tmp_path):
    _, (callback,) = train(tmp_path, lambda m: [RoutingCallback()], max_steps=20)
    assert callback.history.steps == tuple(range(2, 21, 2))
    assert callback.step_size == 1
    callback.on_train_begin(arguments(tmp_path), type("S", (), {"max_steps": 1000, "global_step": 0}), None,
                            model=fresh(routing="token"))  # fmt: skip
    assert callback.step_size == 10


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
    with pytest.raises(LilyError, match="leave RoutingCallback out"):
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
    ],
)
def test_a_damaged_record_is_one_error(tmp_path, damage):
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(LilyError, match=FILE):
        RoutingHistory.load(tmp_path / FILE)


def test_a_record_survives_its_file(tmp_path):
    history = RoutingHistory((1, 2), (4, 12), {"x": ((0.25, 0.75), (0.5, 0.5))})
    (tmp_path / FILE).write_text(json.dumps(history.to_dict()))
    assert RoutingHistory.load(tmp_path / FILE) == history
    assert history.accumulated("x") == pytest.approx((0.4375, 0.5625))
