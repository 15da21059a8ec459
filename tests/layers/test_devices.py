"""Layers on several devices: one bank, fetched by every layer to where it computes."""

from __future__ import annotations

import copy
from functools import partial

import accelerate
import pytest
import torch
from devices import FIRST, SECOND, Elsewhere, Machine, MixedDevicesError
from helpers import TARGETS, build, inputs, logits, predict, processes, randomise
from on_cuda import needs_gpu
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoModelForCausalLM

import lily
from lily import LilyConfig
from lily.errors import LilyError
from lily.export import as_lora
from lily.kernels import fused
from lily.plan.options import ROUTINGS

pytestmark = pytest.mark.sample(every=10)

ROOT = "base_model.model."
LAYERS = [f"model.layers.{i}" for i in range(4)]
FRONT, BACK = ["model.embed_tokens", "model.rotary_emb", *LAYERS[:2]], ["model.norm", "lm_head", *LAYERS[2:]]


def configuration(routing="token", **more):
    return LilyConfig(
        r=4, stride_A=2, num_B=3, routing=routing, target_modules=TARGETS["llama"], task_type="CAUSAL_LM", **more
    )


def padded():
    batch = inputs("llama")
    batch["attention_mask"][0, :4] = 0
    return {**batch, "use_cache": False}


def adapted(routing="token", **more):
    return randomise(get_peft_model(build("llama"), configuration(routing, **more)))


def spread(model, bank=FIRST, prefix=ROOT):
    """The first half of the layers on one simulated device, the others on another."""
    places = {prefix + name: str(device) for names, device in ((FRONT, FIRST), (BACK, SECOND)) for name in names}
    if prefix:
        places[f"{prefix}lily_bank"] = str(bank)
    return accelerate.dispatch_model(model, device_map=places)


def real(t):
    return t.held if isinstance(t, Elsewhere) else t


def gradients(model):
    return {name: real(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_training(model, reference, batch):
    """Outputs and all gradients of a model that is spread, within `Machine`, and of one that is not."""
    want = logits(reference, batch)
    want.square().sum().backward()
    with Machine():
        out = logits(model, batch)
        out.square().sum().backward()
    torch.testing.assert_close(real(out), want, rtol=1e-5, atol=1e-5)
    found, expected = gradients(model), gradients(reference)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max() + 1))


@pytest.fixture(params=["fast", "reference"])
def path(request, monkeypatch):
    """Simulated tensors are of a class of their own, which the fast path leaves to the reference unless told."""
    if request.param == "fast":
        monkeypatch.setattr(fused, "PLAIN", (*fused.PLAIN, Elsewhere))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(fused, "PLAIN", (*fused.PLAIN, Elsewhere))


def test_an_operation_on_tensors_of_two_devices_fails():
    with Machine():
        x, w = torch.randn(2, 3).to(FIRST), torch.randn(4, 3).to(SECOND)
        for a, b in ((x, w), (x, torch.randn(4, 3))):
            with pytest.raises(MixedDevicesError, match="of tensors on cpu"):
                nn.functional.linear(a, b)
        assert nn.functional.linear(x, w.to(FIRST)).device == FIRST


@pytest.mark.parametrize("bank", [FIRST, SECOND])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_spread_model_computes_what_one_device_does(routing, bank, path):
    reference = adapted(routing)
    with Machine():
        model = spread(adapted(routing), bank)
    devices = {p.device for name, p in model.named_parameters() if "lily_bank" in name}
    assert devices == {bank}
    assert_equal_training(model.train(), reference.train(), padded())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_adapter_made_on_a_spread_model_computes_what_one_device_does(routing, path):
    with Machine():
        model = spread(build("llama"), prefix="")
        model = get_peft_model(model, configuration(routing))
        placed = {name: p.device for name, p in model.named_parameters() if "lily" in name}
        randomise(model)
    assert {placed[f"{ROOT}lily_bank.lily_A.default.{i}"] for i in range(2)} == {FIRST, SECOND}
    assert {device for name, device in placed.items() if "lily_B" in name} == {FIRST}
    assert all(device == (FIRST if layer_number(n) < 2 else SECOND) for n, device in placed.items() if ".layers." in n)
    assert_equal_training(model.train(), adapted(routing).train(), padded())


def layer_number(name):
    return int(name.split(".layers.")[1].partition(".")[0])


@pytest.mark.parametrize("settled", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("routing", ["token", "sequence", "batch"])
def test_a_settling_adapter_is_spread_too(routing, settled, path):
    reference = adapted(routing, settled=settled)
    with Machine():
        model = spread(adapted(routing, settled=settled))
    assert_equal_training(model.train(), reference.train(), padded())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_activation_is_spread_too(activation, path):
    reference = adapted(activation=activation)
    with Machine():
        model = spread(adapted(activation=activation), SECOND)
    assert_equal_training(model.train(), reference.train(), padded())


def test_gradient_checkpointing_recomputes_on_the_layers_devices(fast):
    reference = adapted("sequence")
    with Machine():
        model = spread(adapted("sequence"), SECOND)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_training(model.train(), reference.train(), padded())


def test_settling_steps_move_the_running_means_of_all_devices(fast):
    def train(model):
        settling = lily.Settling(model, total_steps=10, start=0.2, end=0.6)
        for step in range(10):
            settling.step(step)
            logits(model, padded())
        settling.finish()

    reference = adapted("sequence").train()
    train(reference)
    with Machine():
        model = spread(adapted("sequence")).train()
        train(model)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(real(p), q, msg=name)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_collapsing_and_merging_a_spread_model(routing, fast):
    batches, reference = [padded()], adapted(routing)
    expected = lily.collapse(reference, batches, refit_steps=2)
    with Machine():
        model = spread(adapted(routing), SECOND)
        found = lily.collapse(model, batches, refit_steps=2)
        for a, b in zip(found.layers, expected.layers, strict=True):
            assert a.weights == pytest.approx(b.weights, abs=1e-5)
        exported = as_lora(model)
        before = real(predict(model, padded()))
        model.merge_adapter()
        merged = real(predict(model, padded()))
        model.unmerge_adapter()
        assert torch.equal(real(predict(model, padded())), before)
        unloaded = real(predict(model.merge_and_unload(), padded()))
    torch.testing.assert_close(before, predict(reference, padded()), rtol=1e-4, atol=1e-4)
    for out in (merged, unloaded):
        torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-4)
    for name, layer in as_lora(reference).layers.items():
        torch.testing.assert_close(real(exported.layers[name].B), layer.B, rtol=1e-4, atol=1e-5)


def test_a_state_dict_goes_out_of_a_spread_model_and_into_one(fast):
    state = get_peft_model_state_dict(adapted())
    with Machine():
        model = spread(get_peft_model(build("llama"), configuration(init_weights=False)))
        set_peft_model_state_dict(model, copy.deepcopy(state))
        back = {name: real(t) for name, t in get_peft_model_state_dict(model).items()}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], t) for name, t in state.items())


def test_a_base_layer_that_accelerate_runs_elsewhere_than_its_input_gets_the_update_there(fast):
    config = LilyConfig(r=2, num_B=2, target_modules=["0"])
    reference = randomise(get_peft_model(nn.Sequential(nn.Linear(8, 6)), config))
    x = torch.randn(2, 5, 8)
    with Machine():
        model = nn.Sequential(nn.Linear(8, 6))
        hook = accelerate.hooks.AlignDevicesHook(execution_device=SECOND)
        accelerate.hooks.add_hook_to_module(model[0], hook)
        model = randomise(get_peft_model(model, copy.deepcopy(config)))
        model.base_model.model[0].base_layer.load_state_dict(reference.base_model.model[0].base_layer.state_dict())
        out = model(x.to(FIRST))
    assert out.device == SECOND
    torch.testing.assert_close(real(out), reference(x))


# Weights in main memory and on disk.

PARTLY = {name: "cpu" for name in FRONT} | {name: "disk" for name in BACK} | {"model.norm": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch, tmp_path):
    """PEFT copies the files of offloaded weights to a path relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def offloaded(folder, tmp_path):
    """Half of the layers are on disk: on the meta device, but within their own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=dict(PARTLY), offload_folder=tmp_path / "offload")
    assert model.model.layers[3].self_attn.q_proj.weight.is_meta
    return model


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_adapter_on_offloaded_weights_trains(folder, tmp_path, routing):
    model = randomise(get_peft_model(offloaded(folder, tmp_path), configuration(routing)))
    reference = adapted(routing)
    for m in (model, reference):
        logits(m.train(), padded()).square().sum().backward()
    assert {p.device.type for name, p in model.named_parameters() if "lily" in name} == {"cpu"}
    assert torch.equal(predict(model, padded()), predict(reference, padded()))
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name], gradient)
    model.save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert torch.equal(predict(back, padded()), predict(reference.eval(), padded()))


MAPS = {
    "bank on disk": {"device_map": {ROOT + k: v for k, v in PARTLY.items()} | {f"{ROOT}lily_bank": "disk"}},
    "bank in memory": {"device_map": {ROOT + k: v for k, v in PARTLY.items()} | {f"{ROOT}lily_bank": "cpu"}},
    "found by accelerate": {"device_map": "auto", "max_memory": {"cpu": "60KB"}},
}


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("routing", ["token", "static"])
def test_a_saved_adapter_loads_onto_offloaded_weights(folder, tmp_path, where, routing):
    reference = adapted(routing).eval()
    reference.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        offloaded(folder, tmp_path), tmp_path / "adapter", offload_folder=tmp_path / "again", **MAPS[where]
    )
    assert any(p.is_meta for p in model.parameters())
    assert not any(p.is_meta for name, p in model.named_parameters() if "lily" in name)
    assert torch.equal(predict(model, padded()), predict(reference, padded()))
    model.save_pretrained(tmp_path / "back")
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "back")
    assert torch.equal(predict(back, padded()), predict(reference, padded()))


def test_a_second_adapter_loads_onto_offloaded_weights(folder, tmp_path):
    first, second = adapted().eval(), randomise(adapted(), seed=9).eval()
    for name, model in (("one", first), ("two", second)):
        model.save_pretrained(tmp_path / name)
    more = {"offload_folder": tmp_path / "again", **MAPS["bank on disk"]}
    model = PeftModel.from_pretrained(offloaded(folder, tmp_path), tmp_path / "one", adapter_name="one", **more)
    model.load_adapter(tmp_path / "two", "two")
    for name, expected in (("two", second), ("one", first), ("two", second)):
        model.set_adapter(name)
        assert torch.equal(predict(model, padded()), predict(expected, padded()))


@pytest.mark.parametrize("safe", [False, True])
def test_offloaded_weights_are_merged(folder, tmp_path, safe):
    model = randomise(get_peft_model(offloaded(folder, tmp_path), configuration("static"))).eval()
    before = predict(model, padded())
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(predict(model, padded()), before)
    model.unmerge_adapter()
    assert torch.equal(predict(model, padded()), before)
    torch.testing.assert_close(predict(model.merge_and_unload(safe_merge=safe), padded()), before)


def test_offloading_a_model_that_has_an_adapter_leaves_the_adapter_where_it_computes(tmp_path):
    model, reference = adapted("token", settled=0.3).eval(), adapted("token", settled=0.3).eval()
    places = {ROOT + k: v for k, v in PARTLY.items()} | {f"{ROOT}lily_bank": "disk"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert torch.equal(predict(model, padded()), predict(reference, padded()))
    assert {p.device.type for name, p in model.named_parameters() if "lily" in name} == {"cpu"}


def test_a_device_map_is_inferred_with_the_bank_in_one_piece():
    model = adapted()
    sizes = accelerate.utils.compute_module_sizes(model)
    limit = {0: sizes[""] // 2, "cpu": sizes[""]}
    found = accelerate.infer_auto_device_map(model, max_memory=limit, no_split_module_classes=model._no_split_modules)
    assert f"{ROOT}lily_bank" in found
    assert not any(name.startswith(f"{ROOT}lily_bank.") for name in found)
    assert accelerate.utils.find_tied_parameters(model) == []


@needs_gpu
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_model_on_a_gpu_and_the_cpu_computes_what_the_cpu_does(routing):
    reference, model = adapted(routing).train(), adapted(routing).train()
    places = {ROOT + name: 0 for name in FRONT} | {ROOT + name: "cpu" for name in BACK} | {f"{ROOT}lily_bank": 0}
    model = accelerate.dispatch_model(model, places, main_device=0)
    batch = {k: v.to(0) if isinstance(v, torch.Tensor) else v for k, v in padded().items()}
    out, want = logits(model, batch), logits(reference, padded())
    torch.testing.assert_close(out.cpu(), want, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    want.square().sum().backward()
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(gradients(model)[name].cpu(), gradient, rtol=1e-3, atol=1e-3)


def test_lora_made_on_offloaded_weights_is_no_better(folder, tmp_path):
    """The control: PEFT itself puts LoRA's tensors on the meta device there, so ours need not copy what it does."""
    model = get_peft_model(offloaded(folder, tmp_path), LoraConfig(target_modules=["q_proj"]))
    assert any(p.is_meta for name, p in model.named_parameters() if "lora" in name)


# Pipeline stages: processes that hold some of the layers each.


class Stage(nn.Module):
    """Blocks of the adapted `Plain`, the head after the last, and the bank."""

    def __init__(self, root, blocks, last):
        super().__init__()
        self.blocks, self.lily_bank = root.blocks[blocks], root.lily_bank
        self.head = root.head if last else nn.Identity()

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def plain(routing):
    model = LilyConfig(r=3, num_A=1, num_B=2, routing=routing, target_modules=["up", "down"])
    return randomise(get_peft_model(build("plain"), model)).train()


def steps_of_a_stage(rank, routing="token"):
    """Three steps of a pipeline of two stages with four micro-batches; the adapter's tensors afterwards."""
    root = plain(routing).base_model.model
    stage = Stage(root, slice(0, 2) if rank == 0 else slice(2, 3), last=rank == 1)
    pipeline = PipelineStage(stage, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(pipeline, 4, loss_fn=lambda y, target: (y - target).square().mean())
    trained = [p for p in stage.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(3):
        x, target = pipelined(step)
        schedule.step(x) if rank == 0 else schedule.step(target=target)
        lily.sum_bank_gradients(stage)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().numpy() for name, p in root.named_parameters() if p.requires_grad}


def pipelined(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, 8, generator=generator), torch.randn(8, 5, 5, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["token", "static"])
def test_pipeline_stages_train_the_adapter_that_one_process_does(routing):
    model = plain(routing)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        x, target = pipelined(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = processes(partial(steps_of_a_stage, routing=routing))
    for name, expected in model.base_model.model.named_parameters():
        if expected.requires_grad:
            owners = (first, second) if "lily_bank" in name else (second,) if "blocks.2" in name else (first,)
            for owner in owners:
                torch.testing.assert_close(torch.tensor(owner[name]), expected.detach(), rtol=1e-5, atol=1e-6, msg=name)


def test_a_stage_without_the_bank_is_told_to_have_it():
    with pytest.raises(LilyError, match="this Linear contains no lily_bank"):
        lily.sum_bank_gradients(nn.Linear(2, 2))
