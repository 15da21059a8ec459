"""Ranks, spectra and overlaps, against a brute-force decomposition of the updates as full matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from analysed import adapted, lora, weights_of_tokens
from helpers import TARGETS, build, inputs, randomise
from peft import get_peft_model
from scipy.linalg import subspace_angles

import lily
from lily.analysis.factored import Mixing, lily_layers, lora_layers
from lily.analysis.rank import Spectrum, rank_report
from lily.analysis.routing import routing_report
from lily.errors import LilyError
from lily.tuner.adapter import find

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


def full_update(model, name, weights):
    """The update of one layer as an (out, in) matrix, straight from the formula."""
    found = find(model)
    layer = found.layers[name]
    A, B = (t.detach().double() for t in layer.tensors_of(found.name))
    return layer.settings[found.name].scaling * torch.einsum("e,ero->or", weights, B) @ A


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "plain"])
def test_spectra_of_a_static_adapter_are_those_of_its_materialized_updates(kind):
    model = adapted(kind, routing="static", scaling=1.5)
    found = find(model)
    report = rank_report(lily_layers(model))
    assert [layer.name for layer in report.layers] == list(found.layers)
    for layer in report.layers:
        expected = torch.linalg.svdvals(found.layers[layer.name].factors(found.name).delta.double())
        values = torch.tensor(layer.expected.values).double()
        assert torch.allclose(values, expected[: len(values)], rtol=1e-5)  # factors are float32
        assert float(expected[len(values) :].max()) < 1e-5 * float(expected[0])
        assert layer.expected.numerical_rank(0.01) == int((expected > 0.01 * expected[0]).sum())
        assert layer.union is None
        assert layer.varying == 0


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_expected_update_and_union_over_tokens_are_those_of_all_tokens_updates(routing):
    model = adapted("bert", routing=routing)
    batch = inputs("bert")
    batch["attention_mask"][1, 5:] = 0
    measured = routing_report(model, [batch])
    report = rank_report(lily_layers(model), measured.mixings)
    for layer in report.layers[::3]:
        w = weights_of_tokens(model, layer.name, batch)
        updates = [full_update(model, layer.name, token) for token in w]
        mean = torch.stack(updates).mean(0)
        union = torch.cat(updates, dim=1) / len(updates) ** 0.5
        for spectrum, matrix in ((layer.expected, mean), (layer.union, union)):
            brute = torch.linalg.svdvals(matrix)[: len(spectrum.values)]
            assert np.allclose(spectrum.values, brute, rtol=1e-4, atol=1e-5 * float(brute[0]))  # weights are float32
        varying = torch.stack([(u - mean).square().sum() for u in updates]).mean()
        total = torch.stack([u.square().sum() for u in updates]).mean()
        assert layer.varying == pytest.approx(float(varying / total), rel=1e-3, abs=1e-7)
        assert layer.union.limit == 12


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_synthetic_adapter_of_known_rank_has_exactly_that_rank(rank):
    model = adapted("plain", r=6, routing="static", num_A=1, num_B=2)
    found = find(model)
    with torch.no_grad():
        for A in found.bank.tensors(found.name)[0]:
            A[:] = torch.linalg.qr(torch.randn(A.shape[1], 6).double())[0].T.float()
            A[rank:] = 0
    report = rank_report(lily_layers(model), threshold=1e-5)
    assert {layer.expected.numerical_rank(1e-5) for layer in report.layers} == {rank}
    assert report.median() == rank


def test_the_union_over_tokens_has_the_rank_of_the_experts_that_are_used():
    model = adapted("bert", r=3, num_B=3, routing="token")
    layers = lily_layers(model)
    used = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [0.7, 0.3, 0.0]]).double()
    mixing = Mixing(used.mean(0), used.T @ used / 3, "data")
    report = rank_report(layers, {layer.name: mixing for layer in layers}, threshold=1e-6)
    assert {layer.union.numerical_rank(1e-6) for layer in report.layers} == {6}
    assert {layer.expected.numerical_rank(1e-6) for layer in report.layers} == {3}
    without_data = rank_report(layers, threshold=1e-6)
    assert without_data.assumed
    assert {layer.union.numerical_rank(1e-6) for layer in without_data.layers} == {9}


def test_equal_singular_values_have_full_effective_and_stable_rank():
    flat = Spectrum((2.0,) * 5, 8)
    assert (flat.effective_rank, flat.stable_rank) == pytest.approx((5.0, 5.0))
    assert flat.energy == pytest.approx((0.2, 0.4, 0.6, 0.8, 1.0))
    steep = Spectrum((10.0, 1.0, 0.05), 3)
    assert (steep.numerical_rank(0.01), steep.numerical_rank(0.001)) == (2, 3)
    assert 1 < steep.stable_rank < steep.effective_rank < 2


def test_an_untrained_adapter_has_rank_zero():
    config = lily.LilyConfig(r=4, num_A=2, num_B=3, target_modules=TARGETS["bert"])
    report = rank_report(lily_layers(get_peft_model(build("bert"), config)))
    for layer in report.layers:
        ranks = layer.expected.numerical_rank(), layer.expected.effective_rank, layer.expected.stable_rank
        assert (*ranks, layer.varying) == (0, 0, 0, 0)
    assert all(value == 0 for overlap in report.overlaps for row in overlap.rows for value in row)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"value": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_a_lora_has_the_same_spectra_from_a_model_and_from_a_folder(options, tmp_path):
    model = lora(init_lora_weights=False, **options)
    model.save_pretrained(tmp_path)
    from_model, from_folder = rank_report(lora_layers(model)), rank_report(lora_layers(tmp_path))
    modules = dict(model.get_base_model().named_modules())
    assert len(from_model.layers) == 8
    assert {layer.name for layer in from_folder.layers} == {layer.name for layer in from_model.layers}
    by_name = {layer.name: layer for layer in from_folder.layers}
    for layer in from_model.layers:
        brute = torch.linalg.svdvals(modules[layer.name].get_delta_weight("default").double())[: layer.r]
        assert np.allclose(layer.expected.values, brute.detach(), rtol=1e-4)
        assert np.allclose(by_name[layer.name].expected.values, layer.expected.values, rtol=1e-6)


def test_overlaps_are_the_squared_cosines_of_the_principal_angles():
    model = adapted("bert", routing="static")
    found = find(model)
    (overlap, *_) = rank_report(lily_layers(model), threshold=1e-4).overlaps
    i, j = 1, 3
    bases = []
    for name in (overlap.layers[i], overlap.layers[j]):
        u, s, v = torch.linalg.svd(found.layers[name].factors(found.name).delta.double(), full_matrices=False)
        kept = s > 1e-4 * s[0]
        bases.append((u[:, kept].numpy(), v[kept].T.numpy()))
    for table, (x, y) in ((overlap.columns, (0, 0)), (overlap.rows, (1, 1))):
        angles = subspace_angles(bases[0][x], bases[1][y])
        assert table[i][j] == pytest.approx(float(np.mean(np.cos(angles) ** 2)), abs=1e-6)


def test_layers_that_share_an_a_read_the_same_directions_and_lora_layers_do_not():
    shared = rank_report(lily_layers(adapted("bert", routing="static"))).overlaps[0]
    assert shared.mean("rows", sharing=True) == pytest.approx(1.0, abs=1e-9)
    assert shared.mean("rows", sharing=False) < 0.5
    alone = rank_report(lora_layers(lora(init_lora_weights=False))).overlaps[0]
    assert alone.mean("rows", sharing=True) is None
    assert alone.mean("rows", sharing=False) == pytest.approx(alone.rows_by_chance, abs=0.1)


def test_what_has_no_rank_is_refused(tmp_path):
    with pytest.raises(LilyError, match=r"activation='relu'.*no matrix"):
        lily_layers(adapted("bert", activation="relu"))
    with pytest.raises(LilyError, match="DoRA"):
        lora_layers(lora(use_dora=True))
    with pytest.raises(LilyError, match="holds no adapter"):
        lora_layers(tmp_path)
    adapted("bert").save_pretrained(tmp_path / "lily")
    with pytest.raises(LilyError, match="LILY adapter, not a LoRA"):
        lora_layers(tmp_path / "lily")
    layers = lily_layers(adapted("bert"))
    with pytest.raises(LilyError, match="between 0 and 1"):
        rank_report(layers, threshold=0)
    with pytest.raises(LilyError, match="mixes 3 experts, but its statistics have 2"):
        rank_report(layers, {layers[0].name: Mixing.assumed(2)})


@pytest.mark.slow
@pytest.mark.network
def test_numerical_ranks_of_a_short_real_run_are_those_of_its_updates_as_full_matrices(tmp_path, monkeypatch):
    from lily.insight.gather import insight
    from lily.recipes import loader, train
    from lily.recipes.results.adapter import Adapter

    monkeypatch.chdir(tmp_path)
    few = ["data.max_train=320", "data.max_validation=64", "data.max_test=64", "train.epochs=1"]
    train.train(loader.load_recipe("quickstart-routed", [*few, "baselines=[lora]", "output=run"]), quiet=True)
    told = insight("run")
    lily_model, lora_model = Adapter("run").model, Adapter("run/lora").model
    modules = dict(lora_model.get_base_model().named_modules())
    mixings = told.routing.mixings
    updates = {
        "lily": {v.name: full_update(lily_model, v.name, mixings[v.name].mean) for v in told.rank.layers},
        "lora": {v.name: modules[v.name].get_delta_weight("default").detach().double() for v in told.lora.layers},
    }
    assert len(updates["lily"]) == len(updates["lora"]) == 36
    for report, of in ((told.rank, updates["lily"]), (told.lora, updates["lora"])):
        for layer in report.layers:
            brute = torch.linalg.svdvals(of[layer.name])
            assert layer.shape == of[layer.name].shape
            assert layer.expected.numerical_rank(0.01) == int((brute > 0.01 * brute[0]).sum()), layer.name
            assert np.allclose(layer.expected.values, brute[: layer.r], rtol=1e-4, atol=1e-6 * float(brute[0]))
    assert told.rank.median() > told.lora.median()  # what as many parameters buy


def test_numbers_that_are_not_finite_are_refused_with_the_layers_name(tmp_path):
    model = adapted("bert", routing="static")
    found = find(model)
    layers = list(found.layers)
    with torch.no_grad():
        found.layers[layers[1]].logits_of("default")[0] = float("inf")
    with pytest.raises(LilyError, match=f"^{layers[1]}: numbers in its weights are NaN"):
        rank_report(lily_layers(model))
    for value in (float("nan"), float("inf")):
        for part in ("A", "B"):
            model = lora(init_lora_weights=False)
            layer = next(m for name, m in model.named_modules() if name.endswith("layer.2.attention.self.value"))
            with torch.no_grad():
                getattr(layer, f"lora_{part}")["default"].weight[1, 2] = value
            model.save_pretrained(tmp_path)
            for source in (model, tmp_path):
                with pytest.raises(LilyError, match=rf"layer\.2\.\S*value: numbers in {part} are NaN or infinite"):
                    rank_report(lora_layers(source))


def test_a_damaged_lora_folder_ends_in_one_error(tmp_path):
    lora().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(LilyError, match="cannot be read"):
        lora_layers(tmp_path)


class Stack(torch.nn.Module):
    """Four experts' matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.up)


def test_each_of_stacked_experts_has_a_rank_of_its_own():
    torch.manual_seed(0)
    config = lily.LilyConfig(r=2, stride_A=2, num_B=3, target_parameters=["0.up"], target_modules=[])
    model = randomise(get_peft_model(torch.nn.Sequential(Stack()), config))
    layers = lily_layers(model)
    delta = next(iter(find(model).layers.values())).get_delta_weight("default").double()
    assert [layer.name for layer in layers] == ["0.up.0", "0.up.1", "0.up.2", "0.up.3"]
    assert [layer.shared for layer in layers] == [0, 0, 1, 1]
    for layer, update in zip(layers, delta, strict=True):
        found = torch.linalg.svdvals(layer.core(layer.static.mean))
        assert torch.allclose(found, torch.linalg.svdvals(update)[: len(found)], atol=1e-6)
