"""What layers have for themselves: distinctions, gains and own ranks, for every routing and kind of adapted layer."""

from __future__ import annotations

import sys

import pytest
import torch
from every_kind import KINDS, base, ids, lily_config, output
from helpers import randomise
from peft import PeftModel, get_peft_model

import lily
from lily import LilyConfig, LilyError, functional
from lily.budget import choose
from lily.kernels import fused
from lily.layers.find import layers_of
from lily.plan import build_plan
from lily.plan.select import select_targets
from lily.tuner.adapter import find

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore")]

ROUTINGS = ["token", "sequence", "batch", "static", "uniform"]
STRUCTURES = {
    "permute": {"distinct": "permute"},
    "signs": {"distinct": "signs"},
    "gain": {"distinct": "none", "gain": "half-signs"},
    "own": {"distinct": "none", "own_r": 2},
    "all": {"distinct": "permute+signs", "gain": "ones", "own_r": 1},
}
ADAPTED = [kind for kind in KINDS if kind != "saved module"]
PARAMETERS = ("parameter", "experts")


def adapted(kind, structure, routing="static", seed=0, **options):
    model = get_peft_model(base(), lily_config(kind, r=3, routing=routing, **STRUCTURES[structure], **options))
    return randomise(model.double(), scale=0.4, seed=seed).eval()


def pairs(*, static_only=False):
    """All of structure x kind x routing; by default those with the linear layer or with every option at once."""
    for structure in STRUCTURES:
        for kind in ADAPTED:
            for routing in ROUTINGS[3:] if static_only or kind in PARAMETERS else ROUTINGS:
                first = kind == "linear" or (structure == "all" and routing in ("sequence", "static"))
                yield pytest.param(structure, kind, routing, marks=[] if first else [pytest.mark.slow])


@pytest.mark.parametrize(("structure", "kind", "routing"), pairs())
def test_the_model_computes_the_formula_and_a_file_gives_it_again(structure, kind, routing, tmp_path):
    model = adapted(kind, structure, routing)
    expected = output(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == find(model).plan.parameters.total
    for name, layer in layers_of(model.base_model.model).items():
        settings, bank = layer.settings["default"], layer.bank
        A, B = (t.detach() for t in bank.pair("default", settings.slot))
        of_layer = formula(layer, name, A, B, STRUCTURES[structure])
        for got, wanted in zip(layer.tensors_of("default"), of_layer, strict=True):
            assert torch.equal(got, wanted)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base().double(), tmp_path, autocast_adapter_dtype=False).double().eval()
    assert torch.allclose(output(again), expected, atol=1e-12)


def formula(layer, name, A, B, structure):
    """The A and B of a layer, written out for each row."""
    settings = layer.settings["default"]
    stacked = getattr(layer, "experts", 0)
    kind, r = structure.get("distinct", "none"), settings.r
    places = range(stacked) if stacked else [settings.slot.place]
    own = [getattr(layer, f"lily_own_{part}")["default"].weight.detach() for part in "AB"] if settings.own_r else []
    gain = layer.lily_gain["default"].weight.detach() if "gain" in structure else None
    B = B.view(settings.num_B, -1, B.shape[1])
    rows_of_all, B_of_all = [], []
    for member, place in enumerate(places):
        rows, signs = functional.distinction(kind, r, place, 0)
        first = place // settings.stride * r if stacked else 0
        of_layer = []
        for k in range(r):
            row = A[first + (rows[k] if rows else k)]
            row = row * (signs[k] if signs else 1)
            of_layer.append(row * (gain[member * r + k] if gain is not None else 1))
        mine = [t.view(len(places), settings.own_r, -1)[member] for t in own]
        rows_of_all.append(torch.stack(of_layer + list(mine[0] if mine else [])))
        B_of_all.append(torch.stack([torch.cat([b, mine[1]]) for b in B]) if mine else B)
    if not stacked:
        return rows_of_all[0], B_of_all[0]
    return torch.stack(rows_of_all), torch.stack(B_of_all) if own else B


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_fused_path_and_its_gradients_are_those_of_the_reference(structure, routing, monkeypatch):
    results = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(fused, "product_dtype", lambda *_: None)
        model = adapted("linear", structure, routing).train()
        out = model(input_ids=ids())
        out.square().sum().backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (out, grads), (expected, wanted) = results
    assert torch.allclose(out, expected, atol=1e-12)
    assert all(torch.allclose(grads[name], wanted[name], atol=1e-10) and wanted[name].any() for name in wanted)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_of_a_layers_tensors_pass_gradcheck(structure):
    layer = layers_of(adapted("linear", structure, "token").base_model.model)["blocks.1.linear"]
    trained = [p for p in (*layer.bank.parameters(), *layer.parameters()) if p.requires_grad]
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *trained))


@pytest.mark.parametrize(("structure", "kind", "routing"), pairs(static_only=True))
def test_merged_and_exported_adapters_compute_the_same(structure, kind, routing, tmp_path):
    model = adapted(kind, structure, routing)
    expected = output(model)
    if kind == "parallel":
        with pytest.raises(LilyError, match="belongs to no weight"):
            model.merge_adapter()
        return
    lily.export.write_lora(lily.export.as_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(base().double(), tmp_path / "lora", autocast_adapter_dtype=False).double().eval()
    assert torch.allclose(output(lora), expected, atol=1e-6)
    model.merge_adapter()
    assert torch.allclose(output(model), expected, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)
    assert torch.allclose(output(model.merge_and_unload()), expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_collapsed_adapter_keeps_its_structure(structure, kind):
    model = adapted(kind, structure, "token", num_B=3, scaling=3.0)
    lily.collapse(model, [{"input_ids": ids()}])
    expected = output(model)
    assert torch.allclose(output(model.merge_and_unload()), expected, rtol=1e-10, atol=1e-10)


def test_the_distinction_is_the_same_on_every_machine():
    rows, signs = functional.distinction("permute+signs", 6, 2, 0)
    assert rows == [2, 3, 1, 4, 5, 0]  # by `printf permute/0/2/$i | sha256sum`
    assert signs == [1, -1, -1, 1, 1, -1]
    assert functional.distinction("permute+signs", 6, 0, 0) == (None, None)
    assert functional.distinction("none", 6, 3, 0) == (None, None)
    assert functional.distinction("permute", 6, 2, 1) != functional.distinction("permute", 6, 2, 0)


def test_a_file_means_the_same_in_a_process_with_another_hash_seed(tmp_path, stranger):
    model = adapted("linear", "all", "token")
    model.save_pretrained(tmp_path)
    code = (
        "del sys.modules['lily']; sys.path[:0] = args[1:]\n"
        "from every_kind import base, output\n"
        "model = peft.PeftModel.from_pretrained(base().double(), args[0], autocast_adapter_dtype=False).double()\n"
        "torch.save(output(model.eval()), args[0] + '/out.pt')\n"
        "print(hash('lily'))"
    )
    assert int(stranger(code, tmp_path, *sys.path).splitlines()[-1]) != hash("lily")
    assert torch.equal(torch.load(tmp_path / "out.pt"), output(model))


def test_layers_of_a_group_differ_and_the_first_is_the_shared_one():
    model = adapted("linear", "permute", "static", stride_A=3)
    A = [layer.tensors_of("default")[0] for layer in layers_of(model.base_model.model).values()]
    shared = model.base_model.model.lily_bank.tensors("default")[0][0]
    assert torch.equal(A[0], shared)
    assert all(torch.equal(a.sort(0).values, shared.sort(0).values) for a in A)


@pytest.mark.parametrize("structure", ["gain", "own", "all"])
@pytest.mark.parametrize("routing", ["token", "static"])
def test_a_budget_counts_what_layers_have_for_themselves(structure, routing):
    options = STRUCTURES[structure]
    config = LilyConfig(target_modules=["linear", "transposed"], **options)
    modules = select_targets(base(), config)
    gain, own_r = options.get("gain", "none") != "none", options.get("own_r", 0)
    for parameters in (300, 500):
        shape = {"gain": gain, "own_r": own_r, "targets": config.target_modules}
        choice = choose(modules, parameters=parameters, routing=routing, **shape)
        full = LilyConfig(target_modules=["linear", "transposed"], routing=routing, **options, **choice.options)
        assert build_plan(modules, full).parameters.total == choice.parameters <= parameters
    with pytest.raises(LilyError, match="too few"):
        choose(modules, parameters=10, routing=routing, gain=gain, own_r=own_r)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"distinct": "rotate"}, "distinct='rotate' is not known"),
        ({"gain": True}, "gain=True is not known"),
        ({"own_r": -1}, "own_r=-1 is not valid"),
        ({"distinct_seed": "a"}, "distinct_seed='a' is not valid"),
        ({"group_options": {"linear": {"own_r": 0.5}}}, "group_options"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(LilyError, match=match):
        LilyConfig(target_modules=["linear"], **options)


def test_a_file_without_or_with_a_tensor_too_many_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    adapted("linear", "own").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "own_A" in name)
    save_file({name: t for name, t in tensors.items() if name != first}, file)
    with pytest.raises(LilyError, match=r"no lily_own_A for blocks\.0\.linear, which own_r needs"):
        PeftModel.from_pretrained(base(), tmp_path)
    save_file({**tensors, first.replace("own_A", "gain"): torch.ones(3)}, file)
    with pytest.raises(LilyError, match="but the configuration has no gain"):
        PeftModel.from_pretrained(base(), tmp_path)


WAYS = {
    "load_adapter": lambda model, folder: model.load_adapter(folder, "default"),
    "with a configuration": lambda model, folder: PeftModel.from_pretrained(
        base().double(), folder, config=lily_config("linear", r=3, distinct="none")
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_tensors_are_not_loaded_into_an_adapter_whose_layers_are_distinct_in_another_way(way, tmp_path):
    adapted("linear", "permute").save_pretrained(tmp_path)
    model = adapted("linear", "permute", distinct_seed=1)
    before = output(model)
    with pytest.raises(ValueError, match=r"distinct"):
        WAYS[way](model, tmp_path)
    assert torch.equal(output(model), before)
