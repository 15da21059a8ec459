"""Quantized base models: bitsandbytes, torchao, and layers that hold no `weight`, as GPTQ's and HQQ's."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import inputs, logits, predict, randomise
from paths import ROOT
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import lily
from lily import LilyConfig
from lily.errors import LilyError
from lily.export import as_lora, write_lora
from lily.kernels import fused
from lily.layers.quantized import keep_differentiable

pytestmark = pytest.mark.sample(every=10)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def wide_llama(dtype=torch.float32):
    """Wide enough for the quantization blocks of 4-bit kernels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=61
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    wide_llama().save_pretrained(path)
    return path


def bitsandbytes(folder, dtype=torch.float32, **options):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'lily-peft[quantized]'")
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def nf4(folder, dtype=torch.float32, double=True):
    return bitsandbytes(
        folder,
        dtype,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def int8(folder, dtype=torch.float32):
    return bitsandbytes(folder, dtype, load_in_8bit=True)


def torchao(config):
    tool = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'lily-peft[dev]'")

    def make(_, dtype=torch.float32):
        model = wide_llama(dtype)
        tool.quantize_(model, config(tool), lambda m, name: isinstance(m, nn.Linear) and ".layers." in name)
        return model.eval()

    return make


def torchao_int8(folder, dtype=torch.float32):
    return torchao(lambda tool: tool.Int8WeightOnlyConfig())(folder, dtype)


def torchao_int4(folder, dtype=torch.float32):
    from torchao.quantization.granularity import PerGroup

    return torchao(lambda tool: tool.IntxWeightOnlyConfig(torch.int4, PerGroup(32)))(folder, dtype)


class Packed(nn.Module):
    """Two 4-bit values a byte and a scale per group, under a name of their own, as GPTQ's and HQQ's have them."""

    def __init__(self, linear, name, group=32):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.name, self.bias = name, linear.bias
        rows = linear.weight.detach().view(-1, group)
        scale = rows.abs().amax(1, keepdim=True) / 7
        q = (rows / scale).round().to(torch.int8).add(8).view(torch.uint8).flatten()
        self.register_buffer(name, q[::2] | (q[1::2] << 4))
        self.register_buffer("scales", scale)

    def forward(self, x):
        packed = getattr(self, self.name)
        q = torch.stack([packed & 15, packed >> 4], 1).to(self.scales.dtype) - 8
        weight = (q.view(self.scales.shape[0], -1) * self.scales).view(self.outfeatures, self.infeatures)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def packed(name):
    def make(_, dtype=torch.float32):
        model = wide_llama(dtype)
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for key, module in list(part.named_children()):
                    if isinstance(module, nn.Linear):
                        setattr(part, key, Packed(module, name))
        return model

    return make


def hqq(_, dtype=torch.float32):
    tool = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    model, config = wide_llama(dtype), tool.BaseQuantizeConfig(nbits=4, group_size=64)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for key, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, key, tool.HQQLinear(module, config, compute_dtype=dtype, device="cpu"))
    return model


KINDS = {
    "nf4": nf4,
    "int8": int8,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "qweight": packed("qweight"),
    "hqq": hqq,
}


@pytest.fixture(params=KINDS)
def make(request, folder):
    """A base model of every kind, made anew at each call."""
    return lambda dtype=torch.float32: KINDS[request.param](folder, dtype)


@pytest.fixture
def make_for_lora(make, request):
    """The same, but for the stand-in, which PEFT's LoRA does not know."""
    if request.node.callspec.params["make"] == "qweight":
        pytest.skip("a stand-in of the tests, which PEFT's LoRA does not know")
    return make


def config(routing="token", **more):
    return LilyConfig(r=4, stride_A=2, num_B=3, routing=routing, target_modules=TARGETS, task_type="CAUSAL_LM", **more)


def train(model, steps=3, rate=1e-2):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for _ in range(steps):
        batch = inputs("llama")
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("routing", ["token", "sequence", "static"])
def test_a_quantized_base_trains_saves_and_loads(tmp_path, make, routing):
    base = predict(make(), inputs("llama"))
    model = get_peft_model(make(), config(routing))
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "lily" not in name and torch.is_tensor(t)}
    assert torch.allclose(predict(model.eval(), inputs("llama")), base, atol=5e-3)  # nf4 infers in another kernel alone
    losses = train(model)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = model.state_dict()
    assert all(torch.equal(real(after[name]), real(t)) for name, t in frozen.items())
    model.eval().save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "lily" not in name]
    back = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval()
    assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))
    assert not torch.allclose(predict(model, inputs("llama")), base, atol=2e-2)


def real(t):
    return t.dequantize() if type(t) not in fused.PLAIN else t


def test_every_gradient_on_a_quantized_base_is_the_references(make, monkeypatch):
    def gradients(fast):
        if not fast:
            monkeypatch.setattr(fused, "product_dtype", lambda *_: None)
        model = randomise(get_peft_model(make(), config())).train()
        embedded = model.get_input_embeddings()(inputs("llama")["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        return [embedded.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    for fast, reference in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(fast, reference, rtol=2e-3, atol=2e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("config_of", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_a_compiled_model_on_torchao_weights_gives_the_same_gradients(config_of):
    """Compiled, their tensors are to be called through their layer as well, which is no plain product."""
    tool = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'lily-peft[dev]'")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(128, 128, bias=False))
    tool.quantize_(base, getattr(tool, config_of)())
    model = randomise(get_peft_model(base, LilyConfig(r=4, num_B=2, routing="token", target_modules=["0"]))).train()
    x = torch.randn(4, 6, 128, requires_grad=True)

    def gradients(run):
        return torch.autograd.grad(run(x).square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])

    for compiled, eager in zip(gradients(torch.compile(model, backend="aot_eager")), gradients(model), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))


def test_inference_before_training_costs_no_gradient(make):
    """On some CPUs, bitsandbytes' 4-bit layers turn at the first inference into ones that give none."""

    def gradients(model):
        model.train().zero_grad()
        logits(model, inputs("llama")).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    fresh = gradients(randomise(get_peft_model(make(), config())))
    assert all(g.any() for g in fresh)
    used = randomise(get_peft_model(make(), config())).eval()
    predict(used, inputs("llama"))
    for a, b in zip(gradients(used), fresh, strict=True):
        assert torch.equal(a, b)
    base = make()
    predict(base, inputs("llama"))  # before there is an adapter
    again = gradients(randomise(get_peft_model(base, config())))
    wrong, whole = (
        torch.cat([g.flatten() for g in of]) for of in ([a - b for a, b in zip(again, fresh, strict=True)], fresh)
    )
    assert wrong.norm() < 0.1 * whole.norm()  # repacked scales are rounded


@pytest.mark.slow
def test_a_loaded_adapter_is_collapsed_and_refitted_on_a_quantized_base(make, tmp_path):
    model = randomise(get_peft_model(make(), config()))
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    report = lily.collapse(model, [inputs("llama")] * 4, refit_steps=30, refit_learning_rate=1e-3)
    assert report.drift.kl < report.drift_before_refit.kl
    model.save_pretrained(tmp_path / "static")
    back = PeftModel.from_pretrained(make(), tmp_path / "static").eval()
    torch.testing.assert_close(predict(back, inputs("llama")), predict(model, inputs("llama")), rtol=0, atol=2e-2)


def test_a_lora_exported_from_a_quantized_base_gives_the_same_logits_on_it(make_for_lora, tmp_path):
    make, model = make_for_lora, randomise(get_peft_model(make_for_lora(), config("static"))).eval()
    write_lora(as_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    # PEFT's LoRA leaves nf4 its inference kernel on this kind of CPU, which multiplies in bfloat16
    keep_differentiable(lora)
    torch.testing.assert_close(
        predict(lora, inputs("llama")).float(), predict(model, inputs("llama")).float(), rtol=1e-3, atol=1e-3
    )


def test_merging_into_a_quantized_base_is_refused_and_leaves_it_alone(make):
    model = randomise(get_peft_model(make(), config("static"))).eval()
    before = predict(model, inputs("llama"))
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(LilyError, match=r"cannot merge into a \w+ .*load the base model unquantized"):
            merge()
    assert torch.equal(predict(model, inputs("llama")), before)
    model.unload()


def test_an_adapter_trained_on_a_quantized_base_merges_into_the_full_one(make, tmp_path):
    model = get_peft_model(make(), config("static"))
    train(model)
    model.eval().save_pretrained(tmp_path)
    full = PeftModel.from_pretrained(wide_llama(), tmp_path).eval()
    before = predict(full, inputs("llama"))
    torch.testing.assert_close(predict(full.merge_and_unload(), inputs("llama")), before)
    torch.testing.assert_close(before, predict(model, inputs("llama")), rtol=0, atol=0.3)  # what quantization moved


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_prepared_by_peft_trains_in_half_precision(folder, kind, checkpointing):
    model = KINDS[kind](folder, torch.bfloat16)
    options = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=options
    )
    model = get_peft_model(model, config("sequence"))
    assert model.model.model.norm.weight.dtype == torch.float32
    assert model.is_gradient_checkpointing == checkpointing
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradient_checkpointing_changes_no_gradient_on_a_quantized_base(folder, kind):
    def gradients(checkpointing):
        model = prepare_model_for_kbit_training(
            KINDS[kind](folder),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        model = randomise(get_peft_model(model, config("sequence"))).train()
        logits(model, inputs("llama")).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("double", [False, True])
def test_saving_a_model_in_4_bits_keeps_the_adapter_and_its_weights(folder, tmp_path, double):
    model = randomise(get_peft_model(nf4(folder, double=double), config())).eval()
    before = predict(model, inputs("llama"))
    model.base_model.model.save_pretrained(tmp_path)
    assert torch.equal(predict(model, inputs("llama")), before)


def test_a_half_precision_input_is_not_copied_to_the_adapters_float32(folder):
    """What the update keeps for backward, beside the quantized base: its input as it came, and no copy of it."""
    model = get_peft_model(nf4(folder, torch.bfloat16), config("static"))
    layer, kept = model.base_model.model.model.layers[0].mlp.down_proj, []
    x = torch.randn(4, 32, 128, dtype=torch.bfloat16, requires_grad=True)

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    activations = [t for t in kept if t.numel() >= x.numel()]
    assert all(t.data_ptr() == x.data_ptr() for t in activations if t.is_floating_point())


def test_the_layers_of_another_kind_are_named_when_they_cannot_be_adapted():
    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 8
            self.register_buffer("codes", torch.zeros(8, 8, dtype=torch.int8))

    with pytest.raises(LilyError, match="target q is a Codes, not a linear layer"):
        get_peft_model(nn.ModuleDict({"q": Codes()}), LilyConfig(r=2, num_B=2, target_modules=["q"]))


def test_lora_on_the_same_quantized_base_as_control(make_for_lora):
    model = get_peft_model(make_for_lora(), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    losses = train(model)
    assert losses[-1] < losses[0]


def test_two_adapters_switch_on_a_quantized_base(make):
    model = randomise(get_peft_model(make(), config()), seed=3)
    model.add_adapter("other", config("static"))
    states = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        out = predict(model.eval(), inputs("llama"))
        assert torch.equal(states.setdefault(name, out), out)
    other = copy.deepcopy(get_peft_model_state_dict(model, adapter_name="other"))
    model.delete_adapter("other")
    assert other
    assert torch.equal(predict(model, inputs("llama")), states["default"])


def test_the_documented_example_runs(folder, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'lily-peft[quantized]'")
    page = ROOT / "docs" / "quantization.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **options: load(folder, **options))
    scope = {}
    exec(compile(code, page.name, "exec"), scope)
    assert {type(m).__name__ for n, m in scope["base"].named_modules() if n.endswith("base_layer")} == {"Linear4bit"}
    losses = train(scope["model"])
    assert losses[-1] < losses[0]
