"""Routing over data, against a direct recomputation from each layer's own inputs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from analysed import adapted, weights_of_tokens
from helpers import build, inputs, randomise
from peft import get_peft_model

import lily
from lily.analysis.routing import LayerRouting, RoutingReport, decompose, routing_report
from lily.analysis.sentences import routing_words
from lily.errors import LilyError
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


def batches():
    out = []
    for seed in range(3):
        batch = inputs("bert", batch=4, tokens=7, seed=seed)
        batch["attention_mask"][2, 4:] = 0
        batch["attention_mask"][3, 2 + seed :] = 0
        out.append(batch)
    return out


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_statistics_equal_a_direct_recomputation(routing):
    model, data = adapted("bert", routing=routing), batches()
    labels = ["a", "b", "a", "b"] * 3
    report = routing_report(model, data, labels)
    assert (report.samples, report.labels) == (12, ("a", "b"))
    lengths = torch.cat([b["attention_mask"].sum(1) for b in data])
    sample = torch.repeat_interleave(torch.arange(12), lengths)
    for layer in report.layers[::2]:
        w = torch.cat([weights_of_tokens(model, layer.name, b) for b in data])
        mean = w.mean(0)
        assert layer.tokens == len(w) == int(lengths.sum())
        assert torch.tensor(layer.mean).double().allclose(mean, atol=1e-6)
        assert torch.tensor(layer.second).double().allclose(w.T @ w / len(w), atol=1e-6)
        entropy = torch.special.entr(w).sum(-1).mean()
        assert layer.token_entropy == pytest.approx(float(entropy), abs=1e-5)
        mean_entropy = float(torch.special.entr(mean).sum())
        assert layer.specialisation == pytest.approx(mean_entropy - float(entropy), abs=1e-5)

        of_sample = torch.stack([w[sample == s].mean(0) for s in range(12)])[sample]
        is_b = (sample % 2).bool()
        of_label = torch.where(is_b.unsqueeze(1), w[is_b].mean(0), w[~is_b].mean(0))
        parts = [
            float((x - y).square().sum(1).mean())
            for x, y in ((w, mean), (w, of_sample), (of_sample, of_label), (of_label, mean))
        ]
        v = layer.variance
        assert [v.total, v.token, v.sample, v.label] == pytest.approx(parts, abs=1e-7)
        assert v.token + v.sample + v.label == pytest.approx(v.total, abs=1e-12)
        assert torch.tensor(layer.labels["b"]).double().allclose(w[is_b].mean(0), atol=1e-6)
    assert (max(layer.variance.token for layer in report.layers) < 1e-9) == (routing == "sequence")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain", "t5"])
def test_every_kind_of_model_is_recorded_and_left_as_it_was(kind):
    model = adapted(kind, routing="token").train()
    report = routing_report(model, [inputs(kind)], ["x", "y", "x"])
    found = find(model)
    assert [layer.name for layer in report.layers] == list(found.layers)
    assert all(layer.tokens and layer.variance is not None for layer in report.layers)
    assert all(sum(layer.mean) == pytest.approx(1, abs=1e-5) for layer in report.layers)
    assert not any(layer.statistics for layer in found.layers.values())
    assert model.training
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("routing", ["static", "uniform"])
def test_constant_weights_are_told_without_data(routing):
    model = adapted("bert", routing=routing)
    report = routing_report(model)
    for name, layer in find(model).layers.items():
        (found,) = (r for r in report.layers if r.name == name)
        logits = layer.logits_of("default") if routing == "static" else torch.zeros(3)
        assert torch.tensor(found.mean).allclose(torch.softmax(logits.detach(), 0), atol=1e-6)
        assert (found.tokens, found.variance.total, found.specialisation) == (0, 0, 0)
    assert report.mixings == {}


def test_a_router_that_reads_the_class_is_seen_to_and_one_that_does_not_is_at_chance():
    """Two classes whose tokens differ; with shuffled labels the same weights say nothing."""
    torch.manual_seed(0)
    model = adapted("bert", routing="token")
    ids = torch.stack([torch.randint(3, 9, (8,)) + 40 * (i % 2) for i in range(24)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    true = routing_report(model, [batch], [i % 2 for i in range(24)]).layers[0].variance
    wrong = routing_report(model, [batch], [i // 2 % 2 for i in range(24)]).layers[0].variance
    assert true.p_value < 0.01
    assert true.label > 3 * true.label_by_chance
    assert wrong.p_value > 0.05
    assert true.total == pytest.approx(wrong.total)


def test_weights_that_only_the_label_decides_have_all_their_variance_there():
    tokens = torch.tensor([2.0, 4.0, 2.0, 8.0]).double()
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    mean = (tokens @ w) / tokens.sum()
    total = float((tokens @ (w - mean).square()).sum() / tokens.sum())
    found = decompose(total, w * tokens.unsqueeze(1), tokens, torch.tensor([0, 0, 1, 1]))
    assert found.label == pytest.approx(total)
    assert (found.token, found.sample) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert found.share("label") == pytest.approx(1.0)


def test_an_expert_that_no_token_chooses_is_dead_and_specialized_experts_are_told():
    def layer(mean, entropy):
        return LayerRouting("l", "g", 0, 10, mean, ((0.0,) * 3,) * 3, entropy, None, {})

    assert layer((0.5, 0.497, 0.003), 0.0).dead() == (2,)
    assert layer((0.5, 0.496, 0.004), 0.0).dead() == ()
    one_hot = layer((1 / 3, 1 / 3, 1 / 3), 0.0)
    assert one_hot.specialisation == pytest.approx(math.log(3))
    assert one_hot.effective_experts == pytest.approx(3)
    assert layer((1 / 3, 1 / 3, 1 / 3), math.log(3)).specialisation == pytest.approx(0)


def test_layers_that_share_an_a_are_told_apart_from_those_that_do_not():
    model = adapted("bert", routing="static")
    found = find(model)
    with torch.no_grad():
        for name, layer in found.layers.items():
            layer.logits_of("default")[:] = torch.eye(3)[found.plan.slots[name].A % 2] * 30
    query = routing_report(model).agreements[0]
    assert (query.sharing, query.others) == pytest.approx((1.0, 0.0), abs=1e-6)
    assert query.sharing_correlation is None


def test_two_layers_with_one_router_and_one_a_react_alike():
    config = lily.LilyConfig(r=4, num_A=1, num_B=3, target_modules=["query", "key"], routing="token")
    model = randomise(get_peft_model(build("bert"), config)).eval()
    found = find(model)
    with torch.no_grad():  # query and key of one block read the same input
        for i in range(4):
            q, k = (found.layers[f"bert.encoder.layer.{i}.attention.self.{n}"] for n in ("query", "key"))
            k.lily_router["default"].weight.copy_(q.lily_router["default"].weight)
        tensors = found.bank.tensors(found.name)[0]
        tensors[1].copy_(tensors[0])
    report = routing_report(model, batches())
    by_name = {layer.name: layer for layer in report.layers}
    for i in range(4):
        q, k = (by_name[f"bert.encoder.layer.{i}.attention.self.{n}"] for n in ("query", "key"))
        assert q.mean == pytest.approx(k.mean, abs=1e-6)
    assert all(-1 <= a.sharing_correlation <= 1 for a in report.agreements)


def test_bad_input_is_refused_with_the_fix():
    model = adapted("bert", routing="token")
    with pytest.raises(LilyError, match="2 labels for 3 samples"):
        routing_report(model, [inputs("bert")], ["a", "b"])
    with pytest.raises(LilyError, match="there is no batch"):
        routing_report(model)
    settling = adapted("bert", routing="token", settled=0.5)
    with pytest.raises(LilyError, match="settling"):
        routing_report(settling, [inputs("bert")])


def test_words_on_groups_with_different_numbers_of_experts_name_the_least_and_the_most():
    def report(*experts):
        layers = [LayerRouting(f"l{n}", f"g{n}", 0, 5, (1 / n,) * n, ((0.0,) * n,) * n, 0.0, None, {}) for n in experts]
        return routing_words(RoutingReport("token", 1, (), tuple(layers), ()))

    assert "uses 3.00 of 2 to 4 experts" in report(4, 2)
    assert "(median; 0.693 to 1.386 at most)" in report(4, 2)
    assert "uses 2.00 of 2 experts" in report(2, 2, 1)  # a group with one B has nothing to route
    assert "(median; 0.693 at most)" in report(2, 2, 1)
