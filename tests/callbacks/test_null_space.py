"""Null-space projection: what A no longer reads, in every kind of layer, file, merge and training."""

from __future__ import annotations

import every_kind
import pytest
import torch
from adapters import adapted, config_for, layers
from helpers import build, inputs, predict, processes, randomise
from peft import PeftModel, get_peft_model
from settling import ROWS, arguments, fresh
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

import lily
from lily import LilyError, export
from lily.layers.find import layers_of

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")

STRUCTURES = {"distinct": "permute+signs", "gain": "signs", "own_r": 2}


def root_of(model):
    return model.base_model.model


def seen_inputs(model, batch):
    """Layer -> its inputs (tokens, in) of the base model, by hooks of the test's own."""
    seen = {}

    def keep(name):
        return lambda layer, args, _: seen.setdefault(name, []).append(args[0].detach())

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers_of(root_of(model)).items()]
    with model.disable_adapter():
        predict(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in xs]) for name, xs in seen.items()}


@pytest.mark.parametrize("structure", [{}, STRUCTURES], ids=["shared", "own"])
def test_the_directions_are_the_leading_eigenvectors_of_the_inputs_of_all_layers_that_share_an_A(structure):
    model = adapted("llama", **structure)
    batch = inputs("llama")
    projection = lily.null_space(model, [batch], rank=3)
    seen = seen_inputs(model, batch)
    plan = projection.adapted.plan
    for _, names in plan.blocks:
        x = torch.cat([seen[name] for name in names]).double()
        right = torch.linalg.svd(x, full_matrices=False)[2][:3]
        for name in names:
            span = projection.directions[name].double()
            assert torch.allclose(span.mT @ span, right.mT @ right, atol=1e-5)


@pytest.mark.parametrize("routing", ["token", "sequence", "batch", "static", "uniform"])
def test_inputs_in_the_span_are_not_changed_and_others_are(routing):
    model = adapted("llama", routing=routing, **STRUCTURES)
    before = {n: layer.update_of("default", x) for n, layer, x in spanning(model, {})}
    projection = lily.null_space(model, [inputs("llama")], energy=0.8)
    directions = projection.directions
    assert directions.keys() == layers_of(root_of(model)).keys()
    for name, layer, inside in spanning(model, directions):
        assert layer.update_of("default", inside).abs().max() < 1e-5 * before[name].abs().max()
        outside = torch.randn(2, 5, inside.shape[-1], generator=torch.Generator().manual_seed(5))
        assert layer.update_of("default", outside).abs().max() > 0.01


def spanning(model, directions):
    generator = torch.Generator().manual_seed(4)
    for name, layer in layers_of(root_of(model)).items():
        width = layer.tensors_of("default")[0].shape[-1]
        x = torch.randn(2, 5, width, generator=generator)
        yield name, layer, x @ directions[name].mT @ directions[name] if directions else x


def test_what_is_read_of_the_calibration_set_is_bounded_by_the_energy():
    model = adapted("llama")
    batch, energy = inputs("llama", batch=8), 0.9
    projection = lily.null_space(model, [batch], energy=energy)
    seen = seen_inputs(model, batch)
    layer_of = layers_of(root_of(model))
    for _, names in projection.adapted.plan.blocks:
        x = torch.cat([seen[name] for name in names])
        A = layer_of[names[0]].tensors_of("default")[0]
        read = (x @ A.T).square().sum()
        bound = (1 - energy) * torch.linalg.matrix_norm(A, 2).square() * x.square().sum()
        assert 0 < read <= bound * 1.0001


def test_padding_does_not_count_and_batches_are_limited():
    batch = inputs("llama")
    model = adapted("llama")
    alone = lily.null_space(model, [{k: v[:1, :5] for k, v in batch.items()}], rank=2).directions
    padded = {k: v[:1].clone() for k, v in batch.items()}
    padded["attention_mask"][0, 5:] = 0
    again = lily.null_space(model, [padded, batch], rank=2, max_batches=1).directions
    other = lily.null_space(model, [padded, batch], rank=2).directions
    for name, span in alone.items():
        assert torch.allclose(span.mT @ span, again[name].mT @ again[name], atol=1e-4)
        assert not torch.allclose(span.mT @ span, other[name].mT @ other[name], atol=1e-2)


def test_the_model_is_left_as_it_was():
    model = adapted("llama", routing="sequence").train()
    model.base_model.model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    lily.null_space(model, [inputs("llama")])
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert trained == [p.requires_grad for p in model.parameters()]
    assert not any(layer._disable_adapters for layer in layers(model).values())


def test_a_convolution_reads_patches():
    for options in ({}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"padding_mode": "circular"}):
        base = nn.Sequential(nn.Conv2d(2, 3, 3, **{"padding": 2, **options}))
        model = randomise(get_peft_model(base, lily.LilyConfig(r=4, target_modules=["0"])))
        (layer,) = layers(model).values()
        A, _ = layer.tensors_of("default")
        for x in (torch.randn(2, 2, 7, 6), torch.randn(2, 7, 6)):
            down = layer._down(x if x.ndim == 4 else x.unsqueeze(0), A)
            assert torch.allclose((layer.inputs_of_A(x) @ A.T).flatten(), down.flatten(), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv", "slice", "parallel", "saved module"])
def test_every_kind_that_reads_vectors_is_projected(kind):
    model = randomise(get_peft_model(every_kind.base(), every_kind.lily_config(kind, **STRUCTURES)))
    with model.disable_adapter():
        base = every_kind.output(model)
    far = (every_kind.output(model) - base).norm()
    projection = lily.null_space(model, [{"input_ids": every_kind.ids()}], rank=6)
    assert projection.directions.keys() == layers_of(root_of(model)).keys()
    assert projection.residual() < 1e-6
    assert 0 < (every_kind.output(model) - base).norm() < 0.7 * far


@pytest.mark.parametrize("kind", ["embedding", "parameter", "experts"])
def test_kinds_without_input_vectors_are_refused_and_beside_others_named(kind):
    batches = [{"input_ids": every_kind.ids()}]
    model = get_peft_model(every_kind.base(), every_kind.lily_config(kind))
    with pytest.raises(LilyError, match="embeddings or parameters"):
        lily.null_space(model, batches)
    options = every_kind.lily_config(kind)
    targets = [*(options.target_modules or ()), "linear"]
    model = randomise(get_peft_model(every_kind.base(), every_kind.lily_config(kind, target_modules=targets)))
    with pytest.warns(UserWarning, match=r"of \d+ adapted layers are not projected: .*(embed|own)"):
        projection = lily.null_space(model, batches)
    assert {name.rpartition(".")[2] for name in projection.directions} == {"linear"}


def test_a_layer_that_is_never_reached_is_named():
    model = get_peft_model(build("t5"), config_for("t5"))
    encoder = model.base_model.model.get_encoder()
    batch = {k: v for k, v in inputs("t5").items() if k == "input_ids"}
    with pytest.warns(UserWarning, match="not projected: decoder"):
        lily.null_space(Half(model, encoder), [batch])


class Half(nn.Module):
    """Calls one half of a model."""

    def __init__(self, whole, half):
        super().__init__()
        self.whole, self._half = whole, [half]

    def forward(self, **batch):
        return self._half[0](**batch)


def test_merges_and_exports_hold_it(tmp_path):
    model = adapted("llama", routing="static", **STRUCTURES)
    projection = lily.null_space(model, [inputs("llama")])
    for name, layer in projection.adapted.layers.items():
        assert (layer.get_delta_weight("default") @ projection.directions[name].mT).abs().max() < 1e-5
    lora = export.as_lora(model)
    for name, span in projection.directions.items():
        assert (lora.layers[name].A @ span.mT).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert lily.NullSpace(again, projection._spans).residual() < 1e-6
    model.merge_adapter()
    with pytest.raises(LilyError, match="unmerge_adapter"):
        lily.null_space(model, [inputs("llama")])


def test_saved_directions_are_loaded_and_foreign_ones_refused(tmp_path):
    projection = lily.null_space(adapted("llama"), [inputs("llama")])
    projection.save(tmp_path / "directions.safetensors")
    model = adapted("llama")
    loaded = lily.NullSpace.load(model, tmp_path / "directions.safetensors")
    assert all(torch.equal(span, loaded.directions[name]) for name, span in projection.directions.items())
    assert loaded.residual() < 1e-6
    for other in (adapted("llama", stride_A=4, target_modules=["v_proj"]), adapted("bert")):
        with pytest.raises(LilyError, match="fits no A"):
            lily.NullSpace.load(other, tmp_path / "directions.safetensors")


def test_an_optimizer_calls_it_and_only_the_named_adapter_is_projected():
    model = fresh()
    model.add_adapter("other", config_for("llama"))
    other = [p.clone() for n, p in model.named_parameters() if "lily_A.other" in n]
    projection = lily.null_space(model, [inputs("llama")], adapter="default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    steps(model, optimizer, 2)
    assert projection.residual() > 1e-3
    optimizer.register_step_post_hook(projection.apply)
    steps(model, optimizer, 2)
    assert projection.residual() < 1e-6
    assert all(map(torch.equal, other, [p for n, p in model.named_parameters() if "lily_A.other" in n]))


def steps(model, optimizer, count):
    for i in range(count):
        model(**inputs("llama", seed=i), labels=inputs("llama", seed=i)["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_half_precision_is_projected_up_to_its_rounding():
    model = get_peft_model(build("llama").bfloat16(), config_for("llama"), autocast_adapter_dtype=False)
    projection = lily.null_space(model, [inputs("llama")])
    assert projection.residual() < 0.01
    assert next(iter(projection.directions.values())).dtype == torch.float32


BATCHES = [inputs("llama", batch=4, seed=seed) for seed in (20, 21)]


def train(folder, resume=None, batches=BATCHES, **options):
    model = fresh(**STRUCTURES)
    projection = lily.null_space(model, batches)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}),
        train_dataset=ROWS,
        callbacks=[lily.NullSpaceCallback(projection)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, projection


def test_a_trainer_keeps_it_and_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    model, projection = train(tmp_path / "run", gradient_accumulation_steps=2)
    assert projection.residual() < 1e-6
    checkpoint = tmp_path / "run" / "checkpoint-3"
    kept = PeftModel.from_pretrained(build("llama"), checkpoint)
    assert any(not torch.equal(p, model.state_dict()[n]) for n, p in kept.state_dict().items())
    resumed, _ = train(tmp_path / "again", resume=str(checkpoint), gradient_accumulation_steps=2)
    assert all(torch.equal(p, resumed.state_dict()[n]) for n, p in model.state_dict().items())
    with pytest.raises(LilyError, match="was not trained with this projection"):
        train(tmp_path / "other", resume=str(checkpoint), batches=[inputs("llama", seed=30)])


def test_the_projection_of_another_model_is_refused(tmp_path):
    callback = lily.NullSpaceCallback(lily.null_space(fresh(), BATCHES))
    with pytest.raises(LilyError, match="another model"):
        Trainer(model=fresh(), args=arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]).train()


def general_loss(model, batch):
    """Cross-entropy against the base model's own distribution: its increase is the divergence from the base."""
    with torch.no_grad(), model.disable_adapter():
        target = model(**batch).logits.softmax(-1)
    return float(F.cross_entropy(predict(model, batch).flatten(0, 1), target.flatten(0, 1)))


def general(seed):
    ids = torch.randint(3, 20, (8, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def counting(seed):
    """The task: of other tokens than general text, each followed by the next number."""
    ids = 30 + (torch.arange(9) + torch.randint(17, (8, 1), generator=torch.Generator().manual_seed(seed))) % 17
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_training_forgets_less_with_it():
    held_out, forgotten, learned = general(50), {}, {}
    for projected in (False, True):
        model = fresh(scaling=4.0)
        before = general_loss(model, held_out)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if projected:
            projection = lily.null_space(model, [general(seed) for seed in range(4)], energy=0.8)
            optimizer.register_step_post_hook(projection.apply)
        losses = []
        for step in range(30):
            loss = model(**counting(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        forgotten[projected], learned[projected] = general_loss(model, held_out) - before, losses[0] - losses[-1]
    assert learned[True] > 0.8 * learned[False] > 0.2
    assert 0 < forgotten[True] < 0.8 * forgotten[False]


@pytest.mark.parametrize("wrong", [{"energy": 0.0}, {"energy": 1.5}, {"rank": 0}, {"rank": 40}])
def test_what_cannot_be_meant_is_refused(wrong):
    batches = [inputs("llama", batch=8, tokens=20)]
    with pytest.raises(LilyError, match=r"energy=|rank=|leave nothing"):
        lily.null_space(adapted("llama"), batches, **wrong)


def test_too_little_left_is_told_and_bad_batches_are_refused():
    with pytest.warns(UserWarning, match="less than its rank"):
        lily.null_space(adapted("llama"), [inputs("llama", batch=8, tokens=20)], rank=30)
    with pytest.raises(LilyError, match="no batch"):
        lily.null_space(adapted("llama"), [])
    with pytest.raises(LilyError, match="NaN or infinity"):
        lily.null_space(adapted("plain", task_type=None), [{"x": torch.full((1, 2, 8), torch.nan)}])


def test_sharded_and_meta_tensors_are_refused():
    model = adapted("llama")
    bank = model.base_model.model.lily_bank
    held = bank.lily_A["default"]
    held[0] = nn.Parameter(held[0].to("meta"))
    with pytest.raises(LilyError, match="sharded"):
        lily.null_space(model, [inputs("llama")])


def of_process(rank):
    model = adapted("llama")
    return {n: span.tolist() for n, span in lily.null_space(model, [BATCHES[rank]], rank=2).directions.items()}


@pytest.mark.slow
def test_several_processes_sum_what_they_saw():
    alone = lily.null_space(adapted("llama"), BATCHES, rank=2).directions
    first, second = processes(of_process)
    for name, span in alone.items():
        assert first[name] == second[name]
        summed = torch.tensor(first[name])
        assert torch.allclose(span.mT @ span, summed.mT @ summed, atol=1e-4)
