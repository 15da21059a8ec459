"""Collapse: the mean is the mean, the reported drift is the drift, and a failure leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import adapted, config_for, layers
from helpers import build, inputs, predict, processes, randomise
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForQuestionAnswering

import lily
from lily import LilyError, export
from lily.functional import route

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model", "ignore:The last batches")


def padded(seed=1, tokens=9, left=False):
    """A batch whose samples have different lengths."""
    batch = inputs("llama", tokens=tokens, seed=seed)
    for row, length in enumerate((tokens, tokens - 3, tokens - 5)):
        empty = slice(0, tokens - length) if left else slice(length, tokens)
        batch["attention_mask"][row, empty] = 0
    return batch


def seen_by_layers(model, batches):
    """Every layer's inputs at unmasked tokens, (tokens, in), by hooks of one's own."""
    seen = {}
    handles = []
    for name, layer in layers(model).items():

        def keep(_, args, __, name=name):
            seen.setdefault(name, []).append(args[0][mask].detach())

        handles.append(layer.register_forward_hook(keep))
    for batch in batches:
        mask = batch["attention_mask"].bool()
        predict(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(x) for name, x in seen.items()}


@pytest.mark.parametrize("left", [False, True])
def test_the_static_weights_are_the_mean_over_unmasked_tokens(left):
    model = adapted("llama", routing="token")
    batches = [padded(1, left=left), padded(2, tokens=12, left=left)]
    expected = {}
    for name, x in seen_by_layers(model, batches).items():
        layer = layers(model)[name]
        A, _ = layer.tensors_of("default")
        p = route((x @ A.T).double(), layer.router_of("default").double())
        expected[name] = (p.mean(0), p.var(0, correction=0).sum())
    report = lily.collapse(model, batches)
    assert report.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    assert {f"base_model.model.{layer.name}" for layer in report.layers} == set(expected)
    for layer in report.layers:
        mean, variance = expected[f"base_model.model.{layer.name}"]
        assert torch.allclose(torch.tensor(layer.weights, dtype=torch.float64), mean, atol=1e-6)
        assert layer.variance == pytest.approx(float(variance), rel=1e-4)
        assert layer.uniformity == pytest.approx(float((mean - 1 / 3).abs().sum() / 2), abs=1e-6)
        found = layers(model)[f"base_model.model.{layer.name}"]
        assert torch.allclose(torch.softmax(found.logits_of("default").double(), 0), mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "plain", "t5"])
@pytest.mark.parametrize("routing", ["token", "sequence", "batch"])
def test_the_reported_drift_is_that_of_the_exported_adapter(kind, routing, tmp_path):
    model = adapted(kind, routing=routing)
    held_out = [inputs(kind, seed=5), inputs(kind, batch=2, seed=6)]
    before = [predict(model, batch) for batch in held_out]
    report = lily.collapse(model, [inputs(kind, seed=3), inputs(kind, seed=4)], held_out)
    assert model.peft_config["default"].routing == "static"
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(build(kind), tmp_path / "lora").eval()
    old = torch.cat([out.reshape(-1, out.shape[-1]) for out in before]).double()
    new = torch.cat([predict(lora, batch).reshape(-1, old.shape[-1]) for batch in held_out]).double()
    assert report.drift.positions == old.shape[0]
    assert report.drift.relative_error == pytest.approx(float((old - new).norm() / old.norm()), abs=1e-4)
    assert report.drift.relative_error > 1e-4
    if kind == "plain":
        assert report.drift.kl is None
    else:
        p, q = old.log_softmax(-1), new.log_softmax(-1)
        assert report.drift.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)


def test_the_reported_drift_of_a_trained_adapter_is_that_of_its_export(tmp_path):
    model = adapted("llama", routing="token").train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(80):
        batch = inputs("llama", batch=8)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    held_out = [inputs("llama", seed=5)]
    old = predict(model.eval(), held_out[0]).double().log_softmax(-1)
    report = lily.collapse(model, [inputs("llama", seed=3)], held_out)
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(build("llama"), tmp_path / "lora").eval()
    new = predict(lora, held_out[0]).double().log_softmax(-1)
    assert report.drift.kl == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), abs=1e-4)
    assert report.drift.kl > 1e-3


def test_a_collapsed_adapter_saves_and_loads_as_a_static_one(tmp_path):
    model = adapted("llama", routing="token")
    lily.collapse(model, [inputs("llama")])
    assert not any("lily_router.default" in name for name, _ in model.named_parameters())
    assert str(model.base_model.model.lily_bank.plans["default"].routing) == "static"
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))
    model.merge_adapter()


def test_a_layer_that_ignores_the_data_has_no_variance_and_no_drift():
    model = adapted("llama", routing="token")
    with torch.no_grad():
        for layer in layers(model).values():
            layer.router_of("default").zero_()
    report = lily.collapse(model, [inputs("llama")])
    assert all(layer.variance < 1e-12 and layer.uniformity < 1e-6 for layer in report.layers)
    assert report.drift.kl < 1e-9


def test_the_task_metric_is_measured_before_and_after():
    model = adapted("llama", routing="token")
    seen = []

    def metric(m):
        seen.append(predict(m, inputs("llama")))
        return {"calls": float(len(seen))}

    report = lily.collapse(model, [inputs("llama")], metric=metric)
    assert report.metrics == {"before": {"calls": 1.0}, "after": {"calls": 2.0}}
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)
    assert report.to_dict()["metrics"]["after"] == {"calls": 2.0}


def test_a_refit_repairs_drift_and_is_kept_only_if_it_does():
    batches = [inputs("llama", seed=s) for s in range(3, 7)]
    first = adapted("llama", routing="token", scaling=0.5)
    plain = lily.collapse(copy.deepcopy(first), batches, [inputs("llama", seed=9)])
    trainable = {n: p.requires_grad for n, p in first.named_parameters()}
    report = lily.collapse(first, batches, [inputs("llama", seed=9)], refit_steps=40, refit_learning_rate=3e-3)
    assert report.drift_before_refit == plain.drift
    assert report.refit_steps == 40
    assert report.drift.kl < plain.drift.kl
    assert all(p.requires_grad == trainable.get(n, True) for n, p in first.named_parameters())
    second = adapted("llama", routing="token", scaling=0.5)
    worse = lily.collapse(second, batches, [inputs("llama", seed=9)], refit_steps=3, refit_learning_rate=30.0)
    assert worse.refit_steps == 0
    assert worse.drift == plain.drift
    reference = adapted("llama", routing="token", scaling=0.5)
    lily.collapse(reference, batches)
    assert torch.allclose(predict(second, inputs("llama")), predict(reference, inputs("llama")), atol=1e-6)


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_of_an_encoder_and_a_decoder_the_decoders_mask_says_what_counts(length, masked):
    batch = inputs("t5")
    batch["decoder_input_ids"] = batch["input_ids"][:, :length]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 2:] = 0
    if masked:
        batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
        batch["decoder_attention_mask"][1, 3:] = 0
    report = lily.collapse(adapted("t5", routing="token"), [batch])
    assert report.drift.positions == (int(batch["decoder_attention_mask"].sum()) if masked else 3 * length)


def test_a_loss_among_the_outputs_is_not_what_is_compared():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForQuestionAnswering(BertConfig(vocab_size=61, **sizes)).eval()
    model = randomise(get_peft_model(base, config_for("bert", routing="sequence", task_type="QUESTION_ANS")))
    batch = inputs("bert")
    plain = lily.collapse(copy.deepcopy(model), [batch])
    spans = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([1, 2, 3])}
    assert lily.collapse(model, [batch | spans]).drift == plain.drift
    with pytest.raises(LilyError, match="a list holds no outputs to compare"):
        lily.collapse(adapted("llama", routing="token"), [inputs("llama")], forward=lambda m, b: [m(**b).logits.sum()])


def test_tuples_tensors_and_ones_own_forward_are_batches_too():
    expected = None
    batch = inputs("llama")
    for batches, forward in (
        ([batch], None),
        ([(batch["input_ids"], batch["attention_mask"])], None),
        ([batch["input_ids"]], None),
        ([{"ids": batch["input_ids"]}], lambda model, b: model(b["ids"])),
    ):
        report = lily.collapse(adapted("llama", routing="token"), batches, forward=forward)
        expected = expected or report.layers[0].weights
        assert report.layers[0].weights == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "batches", "message"),
    [
        ({"routing": "static"}, 1, r"is static already; merge or export it directly"),
        ({"routing": "token", "num_B": 1}, 1, "num_B=1.* is static already"),
        (
            {"routing": "token", "activation": "relu"},
            1,
            "activation='relu': even with static weights",
        ),
        ({"routing": "token"}, 0, "needs calibration data, but there is no batch"),
        ({"routing": "token", "settled": 0.5}, 1, "was saved while settling"),
    ],
)
def test_what_cannot_be_collapsed_is_refused(options, batches, message):
    with pytest.raises(LilyError, match=message):
        lily.collapse(adapted("llama", **options), [inputs("llama")] * batches)


def test_a_failure_half_way_leaves_the_dynamic_adapter_as_it_was():
    model = adapted("llama", routing="token").train()
    expected, names = predict(model.eval(), inputs("llama")), [n for n, _ in model.named_parameters()]
    model.train()
    with pytest.raises(IndexError):
        lily.collapse(model, [inputs("llama")], [inputs("llama"), {"input_ids": torch.full((1, 3), 10**6)}])
    assert model.training
    assert [n for n, _ in model.named_parameters()] == names
    assert torch.equal(predict(model.eval(), inputs("llama")), expected)
    assert model.peft_config["default"].routing == "token"


def test_a_failing_refit_leaves_the_dynamic_adapter_as_it_was():
    model = adapted("llama", routing="token")
    expected = predict(model, inputs("llama"))
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    calls = []

    def forward(m, batch):
        calls.append(1)
        if len(calls) > 9:
            raise RuntimeError("the machine is on fire")
        return m(**batch)

    with pytest.raises(RuntimeError, match="on fire"):
        lily.collapse(model, [inputs("llama")], refit_steps=50, refit_learning_rate=0.1, forward=forward)
    assert torch.equal(predict(model, inputs("llama")), expected)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable


def test_an_adapter_that_is_switched_off_sees_nothing():
    model = adapted("llama", routing="token")
    model.base_model.disable_adapter_layers()
    with pytest.raises(LilyError, match="no adapted layer ran on the calibration batches"):
        lily.collapse(model, [inputs("llama")])


def collapse_a_half(rank):
    own = [padded(seed, tokens=8 + seed) for seed in (1, 2, 3, 4)][rank::2]
    return lily.collapse(adapted("llama", routing="token"), own).to_dict()


def refit_a_half(rank):
    model = adapted("llama", routing="token", scaling=0.5)
    own = [padded(seed) for seed in (1, 2, 3, 4)][rank::2]
    report = lily.collapse(model, own, refit_steps=6, refit_learning_rate=3e-3)
    return report.to_dict(), predict(model, inputs("llama")).tolist()


@pytest.mark.slow
def test_two_processes_refit_alike():
    first, second = processes(refit_a_half)
    assert first == second
    assert first[0]["refit_steps"] == 6


@pytest.mark.slow
def test_two_processes_find_what_one_does():
    found = processes(collapse_a_half)
    alone = lily.collapse(
        adapted("llama", routing="token"), [padded(seed, tokens=8 + seed) for seed in (1, 2, 3, 4)]
    ).to_dict()
    for report in found:
        assert report["tokens"] == alone["tokens"]
        assert report["drift"] == pytest.approx(alone["drift"])
        for a, b in zip(report["layers"], alone["layers"], strict=True):
            assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)
            assert a["variance"] == pytest.approx(b["variance"], rel=1e-6)
            assert a["update_error"] == pytest.approx(b["update_error"], rel=1e-4)


def test_only_the_named_adapter_collapses():
    model = adapted("llama", routing="token")
    model.add_adapter("other", config_for("llama", routing="token"))
    randomise(model)
    lily.collapse(model, [inputs("llama")], adapter="default")
    assert model.peft_config["default"].routing == "static"
    assert model.peft_config["other"].routing == "token"
    with pytest.raises(LilyError, match="no adapter 'third' on this model; there are default, other"):
        lily.collapse(model, [inputs("llama")], adapter="third")


def test_gradient_flows_into_a_collapsed_adapter():
    model = get_peft_model(build("llama"), config_for("llama", routing="token"))
    randomise(model)
    lily.collapse(model, [inputs("llama")])
    model(**inputs("llama")).logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
