"""Intruder reduction of an export equals PEFT's function on the loaded LoRA."""

from __future__ import annotations

import every_kind
import pytest
import torch
from adapters import adapted
from helpers import build, inputs, predict, randomise
from peft import PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

from lily import LilyError, export

STRUCTURES = {"distinct": "permute+signs", "gain": "signs", "own_r": 2}


def strong(kind="llama", **options):
    """An adapter that is large enough to bring in dimensions of its own."""
    return adapted(kind, routing="static", scaling=0.7, **options)


@pytest.mark.parametrize("structure", [{}, STRUCTURES], ids=["shared", "own"])
@pytest.mark.parametrize("options", [{}, {"top_k": 4, "threshold_epsilon": 0.8, "mitigation_lambda": 0.2}])
def test_the_export_equals_what_PEFT_makes_of_the_loaded_lora(tmp_path, structure, options):
    model, said, theirs = strong(**structure), [], []
    lora = export.as_lora(model)
    export.write_lora(lora, tmp_path / "plain")
    reduced = export.reduce_intruder_dimension(lora, model, **options, logging_sink=said.append)
    export.write_lora(reduced, tmp_path / "reduced")

    judge = PeftModel.from_pretrained(build("llama"), tmp_path / "plain").eval()
    reduce_intruder_dimension(judge, **options, logging_sink=theirs.append)
    assert sorted(f"base_model.model.{line}" for line in said) == sorted(theirs[:-1])
    assert any("Intruders: " in line for line in said)
    ours = PeftModel.from_pretrained(build("llama"), tmp_path / "reduced").eval()
    for name, layer in reduced.layers.items():
        expected = judge.get_submodule(f"base_model.model.{name}").get_delta_weight("intruder_reduced")
        assert torch.allclose(layer.scale * layer.B @ layer.A, expected, atol=1e-5), name
    expected = predict(judge, inputs("llama"))
    assert torch.allclose(predict(ours, inputs("llama")), expected, atol=1e-4)
    assert (predict(model, inputs("llama")) - expected).abs().max() > 1e-2
    facts = export.provenance(tmp_path / "reduced")
    assert not facts["exact"]
    assert facts["intruders"] == {"top_k": 10, "threshold_epsilon": 0.5, "mitigation_lambda": 0.75, **options}


def test_the_parameters_are_PEFTs():
    import inspect

    ours = inspect.signature(export.reduce_intruder_dimension).parameters
    theirs = inspect.signature(reduce_intruder_dimension).parameters
    for name in ("top_k", "threshold_epsilon", "mitigation_lambda", "logging_sink"):
        assert ours[name].default == theirs[name].default


def test_without_intruders_the_export_stays_exact_and_a_factor_of_1_keeps_them():
    model = strong()
    lora = export.as_lora(model)
    said = []
    none = export.reduce_intruder_dimension(lora, model, threshold_epsilon=0.0, logging_sink=said.append)
    assert all(line.endswith(": No intruders") for line in said)
    assert none.provenance["exact"]
    assert all(torch.equal(t, none.state_dict()[n]) for n, t in lora.state_dict().items())
    kept = export.reduce_intruder_dimension(lora, model, mitigation_lambda=1.0, logging_sink=None)
    for name, layer in lora.layers.items():
        assert torch.allclose(kept.layers[name].B @ kept.layers[name].A, layer.B @ layer.A, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "slice", "saved module"])
def test_every_linear_kind_is_reduced(kind):
    model = randomise(get_peft_model(every_kind.base(), every_kind.lily_config(kind, scaling=4.0)), scale=0.5)
    lora = export.as_lora(model)
    reduced = export.reduce_intruder_dimension(
        lora, model, threshold_epsilon=0.8, mitigation_lambda=0.0, logging_sink=None
    )
    for name, layer in lora.layers.items():
        base = model.base_model.model.get_submodule(name).get_base_layer().weight
        weight = (base.mT if kind == "Conv1D" else base).detach()
        # The same layer as nn.Linear, by hand: PEFT's function keeps Conv1D's factors in the wrong orientation.
        assert torch.allclose(reduced.layers[name].B @ reduced.layers[name].A, by_hand(weight, layer), atol=1e-4)
    assert reduced.other.keys() == lora.other.keys()
    assert any(not torch.equal(reduced.layers[n].A, lora.layers[n].A) for n in lora.layers)


def by_hand(weight, layer):
    whole = weight + layer.scale * layer.B @ layer.A
    U, S, V = torch.linalg.svd(whole, full_matrices=False)
    similar = (U.T @ torch.linalg.svd(weight, full_matrices=False)[0]).abs().max(1).values
    found = [i for i in range(len(S[:10])) if similar[i] < 0.8]
    if not found:
        return layer.B @ layer.A
    update = (whole - (U[:, found] * S[found]) @ V[found] - weight) / layer.scale
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    return (U[:, : layer.rank] * S[: layer.rank]) @ V[: layer.rank]


@pytest.mark.parametrize("kind", ["conv", "embedding", "parameter", "experts"])
def test_other_kinds_stay_unchanged_and_are_named_or_refused(kind):
    model = get_peft_model(every_kind.base(), every_kind.lily_config(kind))
    with pytest.raises(LilyError, match="of linear layers, and this adapter has none"):
        export.reduce_intruder_dimension(export.as_lora(model), model)
    options = every_kind.lily_config(kind)
    targets = [*(options.target_modules or ()), "linear"]
    model = randomise(
        get_peft_model(every_kind.base(), every_kind.lily_config(kind, target_modules=targets, scaling=4.0)), scale=0.5
    )
    lora, said = export.as_lora(model), []
    reduced = export.reduce_intruder_dimension(lora, model, logging_sink=said.append)
    assert "layers left unchanged, which are not linear" in said[-1]
    left = [name for name in lora.layers if not name.endswith(".linear")]
    assert left
    assert all(name in said[-1] for name in left)
    assert all(torch.equal(reduced.layers[name].A, lora.layers[name].A) for name in left)


def test_a_rank_above_the_weights_and_half_precision():
    for dtype in (torch.bfloat16, torch.float32):
        model = adapted("plain", r=16, routing="static", scaling=3.0).to(dtype)
        lora = export.as_lora(model, dtype=dtype)
        reduced = export.reduce_intruder_dimension(lora, model, logging_sink=None)
        assert {n: t.shape for n, t in lora.state_dict().items()} == {
            n: t.shape for n, t in reduced.state_dict().items()
        }
        assert all(t.dtype == dtype and torch.isfinite(t).all() for t in reduced.state_dict().values())


def test_what_cannot_be_reduced_is_refused():
    model = strong()
    lora = export.as_lora(model)
    with pytest.raises(LilyError, match=r"lily\.collapse"):
        export.as_lora(adapted("llama", routing="token"))
    for wrong in ({"top_k": 0}, {"threshold_epsilon": 2.0}, {"mitigation_lambda": -0.1}):
        with pytest.raises(LilyError, match="not valid"):
            export.reduce_intruder_dimension(lora, model, **wrong)
    with pytest.raises(LilyError, match="exported from"):
        export.reduce_intruder_dimension(lora, strong("bert"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight
    for spoiled, why in ((weight.data.to("meta"), "not loaded"), (weight.data.to(torch.float8_e4m3fn), "quantized")):
        layer.base_layer.weight = nn.Parameter(spoiled, requires_grad=False)
        with pytest.raises(LilyError, match=why):
            export.reduce_intruder_dimension(lora, model)
    layer.base_layer.weight = weight
    model.merge_adapter()
    with pytest.raises(LilyError, match="unmerge_adapter"):
        export.reduce_intruder_dimension(lora, model)
