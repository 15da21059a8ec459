"""The life of adapters on a model: every layer type, every routing, everything PEFT's LoRA can do."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from adapters import adapted, config_for
from helpers import build, inputs, logits, predict, randomise
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BloomConfig, BloomModel, ImageGPTConfig, ImageGPTModel, LlamaForTokenClassification

from lily import LilyConfig, LilyError
from lily.layers.bank import LilyBank, bank_of

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore:routing=.* on a causal model")]


def test_an_untrained_adapter_leaves_the_output_bit_identical(kind, routing):
    expected = predict(build(kind), inputs(kind))
    assert torch.equal(predict(adapted(kind, trained=False, routing=routing), inputs(kind)), expected)


def test_a_trained_adapter_changes_the_output_and_disabling_restores_it(kind, routing):
    base, model = build(kind), adapted(kind, routing=routing)
    assert not torch.allclose(predict(model, inputs(kind)), predict(base, inputs(kind)), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(predict(model, inputs(kind)), predict(base, inputs(kind)))
    assert torch.equal(predict(model.unload(), inputs(kind)), predict(base, inputs(kind)))


def test_unload_leaves_no_trace():
    model = adapted("bert", routing="sequence").unload()
    assert not any("lily" in name for name, _ in model.named_modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_saving_and_loading_gives_the_same_output(kind, routing, tmp_path):
    model = adapted(kind, routing=routing)
    model.save_pretrained(tmp_path)
    expected = predict(model, inputs(kind))
    for low in (False, True):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|nexpected).*")
            back = PeftModel.from_pretrained(build(kind), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(predict(back, inputs(kind)), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_every_trainable_tensor_gets_a_gradient_and_nothing_else_does(kind, routing):
    model = adapted(kind, routing=routing)
    logits(model, inputs(kind)).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None, name
    assert all("lily_" in n or "classifier" in n for n, p in model.named_parameters() if p.requires_grad)


def test_an_optimizer_sees_a_shared_tensor_once():
    model = adapted("llama")
    named = [p for n, p in model.named_parameters() if "lily_" in n]
    assert (
        len(named)
        == len({id(p) for p in named})
        == len(model.state_dict().keys() & {n for n, _ in model.named_parameters() if "lily_" in n})
    )
    assert [n for n, _ in model.named_parameters(remove_duplicate=False) if "lily_" in n] == [
        n for n, _ in model.named_parameters() if "lily_" in n
    ]


@pytest.mark.parametrize("change", ["deepcopy", "to", "half", "pickle-free reload"])
def test_sharing_survives(change, tmp_path):
    model = adapted("llama")
    if change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "to":
        model = model.to(torch.float64)
    elif change == "half":
        model = model.bfloat16()
    else:
        model.save_pretrained(tmp_path)
        model = randomise(PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True), seed=5)
    layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
    bank = bank_of(model.base_model.model)
    assert all(layer.bank is bank for layer in layers)
    before = [
        layer.update_of("default", torch.ones(1, 1, 32, dtype=bank.lily_A["default"][0].dtype)) for layer in layers
    ]
    with torch.no_grad():
        bank.lily_B["default"][0].zero_()
    after = [
        layer.update_of("default", torch.ones(1, 1, 32, dtype=bank.lily_A["default"][0].dtype)) for layer in layers
    ]
    assert all(b.abs().sum() > 0 for b in before)
    assert all(a.abs().sum() == 0 for a in after)


def test_a_deepcopy_is_independent():
    model = adapted("bert", routing="sequence")
    twin = copy.deepcopy(model)
    batch = {**inputs("bert"), "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 6 + [0] * 3])}
    expected = predict(model, batch)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(predict(twin, batch), expected)


def test_adapters_can_be_added_switched_combined_and_deleted():
    base, batch = build("llama"), inputs("llama")
    model = adapted("llama")
    first = predict(model, batch)
    model.add_adapter(
        "other", config_for("llama", r=2, num_B=2, routing="uniform", target_modules=["q_proj", "o_proj"])
    )
    assert torch.equal(predict(model, batch), first)
    bank = bank_of(model.base_model.model)
    assert not any(p.requires_grad for p in bank.lily_B["other"])
    with torch.no_grad():
        for p in bank.lily_B["other"]:
            p.normal_(std=0.3)
    model.set_adapter("other")
    second = predict(model, batch)
    assert not torch.allclose(first, second, atol=1e-3)
    assert all(p.requires_grad for p in bank.lily_B["other"])
    assert not any(p.requires_grad for p in bank.lily_A["default"])
    model.base_model.set_adapter(["default", "other"])
    both = predict(model, batch)
    assert not torch.allclose(both, first, atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(predict(model, batch), first)
    model.delete_adapter("default")
    assert torch.equal(predict(model, batch), second)
    assert not any(".default" in name for name, _ in model.named_parameters())
    model.delete_adapter("other")
    assert torch.equal(predict(model.base_model.model, batch), predict(base, batch))
    assert not any("lily_" in name for name, _ in model.named_parameters())


class Nested(nn.Module):
    """Twenty layers, of which one has as its full name the last name of others."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv1": nn.Linear(4, 4)}) for _ in range(19))

    def forward(self, x):
        x = self.conv1(x)
        for block in self.blocks:
            x = x + block["conv1"](x)
        return x


def test_layers_that_are_listed_by_their_full_names_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    base, x = Nested(), torch.randn(2, 3, 4)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    model = randomise(get_peft_model(copy.deepcopy(base), LilyConfig(r=2, num_B=2, target_modules=names))).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), model(x))


def test_one_adapter_is_saved_without_the_other(tmp_path):
    model = adapted("llama")
    model.add_adapter("other", config_for("llama", r=2, routing="static"))
    randomise(model)
    model.set_adapter("other")
    expected = predict(model, inputs("llama"))
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "other")
    assert torch.equal(predict(back, inputs("llama")), expected)
    back.load_adapter(str(tmp_path), adapter_name="again")
    back.set_adapter("again")
    model.set_adapter("default")
    assert torch.equal(predict(back, inputs("llama")), predict(model, inputs("llama")))


def test_a_failed_injection_leaves_the_model_as_it_was():
    model = build("llama")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(LilyError):
        get_peft_model(model, config_for("llama", target_modules=["q_proj", "input_layernorm"]))
    with pytest.raises(LilyError):
        get_peft_model(model, config_for("llama", rank_pattern={r"layers\.0\.self_attn\.q_proj": 2}))
    assert [name for name, _ in model.named_modules()] == before
    adapter = adapted("llama")
    with pytest.raises(LilyError):
        adapter.add_adapter("bad", config_for("llama", target_modules=["nothing"]))
    assert list(adapter.peft_config) == ["default"]


def test_a_plain_module_takes_an_injected_adapter(kind, routing):
    model = build(kind)
    expected = predict(model, inputs(kind))
    model = inject_adapter_in_model(config_for(kind, routing=routing), model)
    assert isinstance(model.lily_bank, LilyBank)
    assert torch.equal(predict(model, inputs(kind)), expected)
    randomise(model)
    state = peft.get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config_for(kind, routing=routing), build(kind))
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(predict(other, inputs(kind)), predict(model, inputs(kind)))


def test_transformers_own_adapter_methods_work():
    model = build("llama")
    expected = predict(model, inputs("llama"))
    model.add_adapter(config_for("llama"))
    randomise(model)
    changed = predict(model, inputs("llama"))
    assert not torch.allclose(changed, expected, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(predict(model, inputs("llama")), expected)
    model.enable_adapters()
    assert torch.equal(predict(model, inputs("llama")), changed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind, routing, reentrant):
    if kind in ("plain",):
        pytest.skip("has no gradient_checkpointing_enable: not a transformers model")
    batch = inputs(kind)
    if "attention_mask" in batch:
        batch["attention_mask"][1, 5:] = 0

    def gradients(checkpointing):
        model = adapted(kind, routing=routing).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads() if hasattr(
                model, "enable_input_require_grads"
            ) and kind != "vit" else None
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if kind == "vit":
                batch["pixel_values"].requires_grad_()
        logits(model, batch).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-5, rtol=1e-4), name


def test_checkpointed_blocks_keep_the_mask_of_their_own_forward():
    """Two forwards with different masks before one backward, as contrastive training does."""
    ids = inputs("bert")["input_ids"]
    masks = [torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 9]), torch.tensor([[1] * 3 + [0] * 6, [1] * 9, [1] * 9])]

    def gradients(checkpointing):
        model = adapted("bert", routing="sequence").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        outs = [logits(model, {"input_ids": ids, "attention_mask": m}) for m in masks]
        (outs[0] * outs[1].roll(1, 0)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_carries_a_float32_adapter(routing, dtype):
    model = get_peft_model(build("llama").to(dtype), config_for("llama", routing=routing))
    assert {p.dtype for n, p in model.named_parameters() if "lily_" in n} == {torch.float32}
    randomise(model)
    out = logits(model, inputs("llama"))
    assert out.dtype == dtype
    assert out.isfinite().all()
    out.float().sum().backward()
    plain = get_peft_model(build("llama").to(dtype), config_for("llama", routing=routing), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in plain.named_parameters() if "lily_" in n} == {dtype}
    assert logits(plain, inputs("llama")).isfinite().all()


def test_autocast_runs_and_is_close_to_float32(routing):
    model = adapted("llama", routing=routing)
    exact = logits(model, inputs("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model, inputs("llama"))
    # bfloat16 keeps 8 bits: a per cent or two of the largest logit after four layers
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_model_can_be_halved_and_moved_after_injection(routing):
    model = adapted("llama", routing=routing).bfloat16()
    assert logits(model, inputs("llama")).dtype == torch.bfloat16
    model = model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_an_adapter_on_a_meta_model_has_meta_tensors():
    with torch.device("meta"):
        model = build("llama")
    model = get_peft_model(model, config_for("llama"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = get_peft_model(build("llama"), config_for("llama"), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lily_" in n} == {"meta"}


def test_saved_modules_and_biases_train_and_come_back(tmp_path):
    model = adapted("bert", bias="lily_only", modules_to_save=["classifier"])
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.endswith("query.base_layer.bias") for n in trainable)
    assert not any("key.bias" in n for n in trainable)
    assert any("classifier.modules_to_save" in n for n in trainable)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trainable and "lily" not in n:
                p.normal_()
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(predict(back, inputs("bert")), predict(model, inputs("bert")))


def test_random_initialisation_starts_b_off_zero():
    model = adapted("llama", trained=False, init_weights=False)
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lily_B" in n)


def test_static_experts_do_not_stay_equal():
    model = adapted("llama", trained=False, routing="static")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        logits(model, inputs("llama")).square().sum().backward()
        optimizer.step()
    B = bank_of(model.base_model.model).lily_B["default"][0].view(3, 4, 32)
    assert not torch.allclose(B[0], B[1], atol=1e-6)


def test_the_default_routing_follows_the_model_when_the_task_is_not_said():
    assert (
        get_peft_model(build("llama"), LilyConfig(target_modules=["q_proj"])).peft_config["default"].routing == "token"
    )
    assert (
        get_peft_model(build("vit"), LilyConfig(target_modules=["q_proj"])).peft_config["default"].routing == "sequence"
    )


class Inside(nn.Module):
    """A language model of one's own around the decoder of another."""

    def __init__(self):
        super().__init__()
        self.decoder, self.head = build("llama").model, nn.Linear(32, 7)

    def forward(self, input_ids):
        return self.head(self.decoder(input_ids=input_ids).last_hidden_state)


class Triangle(nn.Module):
    """A decoder of one's own without a name that says it: its mask is a buffer."""

    def __init__(self, mask):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(61, 32), nn.Linear(32, 96), nn.Linear(32, 61)
        self.register_buffer("mask", mask)

    def forward(self, input_ids):
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, -1)
        scores = q @ k.mT
        hidden = ~self.mask if self.mask.dtype == torch.bool else self.mask.isneginf()
        n = input_ids.shape[1]
        return self.out(scores.masked_fill(hidden[:n, :n], -torch.inf).softmax(-1) @ v)


IMAGE_GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
HOLD_A_DECODER = {
    "alone": lambda: build("llama").model,
    "of an older model": lambda: BloomModel(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)),
    "under a head": lambda: LlamaForTokenClassification(build("llama").config),
    "inside another module": Inside,
    "of an image's colors": lambda: ImageGPTModel(ImageGPTConfig(**IMAGE_GPT)),
    "with a mask of ones": lambda: Triangle(torch.ones(16, 16, dtype=torch.bool).tril()),
    "with a mask of -inf": lambda: Triangle(torch.full((16, 16), -torch.inf).triu(1)),
}


@pytest.mark.parametrize("kind", HOLD_A_DECODER)
def test_by_default_no_token_of_a_decoder_depends_on_later_ones(kind):
    model = get_peft_model(HOLD_A_DECODER[kind](), LilyConfig(r=4, num_B=2, target_modules="all-linear"))
    randomise(model).eval()
    ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    other = torch.cat((ids[:, :4], ids[:, :4]), 1)
    with torch.no_grad():
        states = [model(input_ids=tokens) for tokens in (ids, other)]
    first, second = (out if isinstance(out, torch.Tensor) else out[0] for out in states)
    assert torch.equal(first[:, :4], second[:, :4])


def torch_layer():
    return nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)


def torch_encoder():
    return nn.TransformerEncoder(torch_layer(), 1)


class OwnAttention(nn.Module):
    """A decoder of one's own whose attention is told at each call what it may see."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x, **told):
        return self.attention(x, x, x, need_weights=False, **told)[0]


TRIANGLE = nn.Transformer.generate_square_subsequent_mask(5)
TOLD = {
    "an encoder by its mask": (torch_encoder, {"mask": TRIANGLE}),
    "a layer by a mask": (torch_layer, {"src_mask": TRIANGLE}),
    "a layer": (torch_layer, {"src_mask": TRIANGLE, "is_causal": True}),
    "an attention": (OwnAttention, {"attn_mask": TRIANGLE}),
    "an attention by a mask of truth values": (OwnAttention, {"attn_mask": TRIANGLE != 0}),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", TOLD)
def test_attention_that_is_told_to_be_causal_warns_once_with_sequence_routing(kind):
    make, told = TOLD[kind]
    for routing, warned in (("sequence", 1), ("token", 0)):
        model = get_peft_model(make(), LilyConfig(r=4, num_B=2, routing=routing, target_modules="all-linear")).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model(torch.randn(2, 5, 32), **told)
            model(torch.randn(2, 5, 32))
        assert len([w for w in caught if "routing='token'" in str(w.message)]) == warned


def test_no_warning_of_a_window_or_of_padding():
    model = get_peft_model(OwnAttention(), LilyConfig(r=4, num_B=2, target_modules="all-linear"))
    assert model.peft_config["default"].routing == "sequence"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 5, 32), attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(2))
        model(torch.randn(2, 5, 32), key_padding_mask=torch.tensor([[False] * 4 + [True]] * 2))


def test_torchs_decoder_reads_from_left_to_right_by_default():
    decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
    model = get_peft_model(nn.Sequential(decoder), LilyConfig(num_B=2, target_modules=["linear1"]))
    assert model.peft_config["default"].routing == "token"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("chosen", "said"), [("batch", "other samples of the batch"), ("sequence", "later tokens")])
def test_a_routing_that_sees_ahead_warns_on_a_causal_model_and_says_why(chosen, said):
    with pytest.warns(UserWarning, match=said) as caught:
        get_peft_model(build("llama"), config_for("llama", routing=chosen))
    assert len([w for w in caught if "causal model" in str(w.message)]) == 1


def test_the_targets_default_to_the_architectures():
    model = get_peft_model(build("llama"), LilyConfig(task_type="CAUSAL_LM"))
    assert {n.rpartition(".")[2] for n in bank_of(model.base_model.model).plans["default"].slots} == {
        "q_proj",
        "v_proj",
    }


def test_a_tied_head_and_an_unused_layer_are_fine():
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=61,
            tie_word_embeddings=True,
        )
    ).eval()
    expected = logits(tied, inputs("llama"))
    model = get_peft_model(tied, LilyConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, inputs("llama")), expected)
    randomise(model)
    logits(model, inputs("llama")).sum().backward()

    plain = build("plain")
    plain.unused = nn.Linear(8, 12)
    model = get_peft_model(plain, LilyConfig(r=4, target_modules=["up", "unused"]))
    logits(model, inputs("plain")).sum().backward()
    torch.optim.AdamW(model.parameters()).step()


def test_status_reports_work():
    model = adapted("llama")
    assert peft.get_model_status(model).active_adapters == ["default"]
    assert len(peft.get_layer_status(model)) == 12
