"""The mask tracker: hooks come and go, scopes nest and close."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import build, inputs, logits, predict, randomise
from peft import get_peft_model
from torch import nn

from lily import LilyConfig
from lily.layers.attention_masks import Scope, fits
from lily.layers.bank import bank_of
from lily.layers.mask_forms import attended, blocks, packed


def encoder():
    config = LilyConfig(r=4, num_B=2, routing="sequence", task_type="SEQ_CLS", target_modules=["query"])
    return randomise(get_peft_model(build("bert"), config)).eval()


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


def test_only_sequence_routing_installs_hooks():
    model = build("bert")
    model = get_peft_model(model, LilyConfig(routing="token", target_modules=["query"]))
    assert hooks(model) == []
    model.add_adapter("s", LilyConfig(routing="sequence", target_modules=["value"]))
    assert len(hooks(model)) == 6  # in and out of the classifier model, of the one inside it, and of its encoder


def test_scopes_close_after_an_exception():
    model = encoder()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert bank_of(model.base_model.model).masks.scopes == []


def test_a_later_forward_does_not_see_an_earlier_mask():
    model, batch = encoder(), inputs("bert")
    expected = logits(model, batch)
    masked = {**batch, "attention_mask": torch.tensor([[1] * 3 + [0] * 6] * 3)}
    logits(model, masked).sum().backward()
    assert torch.equal(logits(model, batch), expected)


def test_a_mask_fits_by_shape():
    mask = torch.ones(2, 5)
    assert fits(mask, torch.zeros(2, 5, 8))
    assert fits(mask, torch.zeros(10, 8))
    assert not fits(mask, torch.zeros(2, 8))  # one row per sample: a pooled state
    assert not fits(mask, torch.zeros(2, 1, 8))
    assert not fits(mask, torch.zeros(5, 2, 8))


def test_the_attended_sequence_is_recognized_by_its_memory():
    own, other, states = torch.ones(2, 5), torch.zeros(2, 5), torch.randn(2, 5, 8)
    scope = Scope(own, other, (states.data_ptr(), states.shape))
    assert scope.fit(states) is other
    assert scope.fit(states.clone()) is own


class Outer(nn.Module):
    """Calls the model inside it without its hooks."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner.forward(**batch)


WAYS = {
    "model": lambda m: m,
    "forward": lambda m: m.forward,
    "inside another module": Outer,
    "a copy's forward": lambda m: copy.deepcopy(m).forward,
    "a pickled copy's forward": lambda m: pickle.loads(pickle.dumps(m)).forward,
    "a replica's forward": lambda m: m._replicate_for_data_parallel().forward,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled forward": lambda m: torch.compile(m.forward, backend="eager"),
}


@pytest.mark.parametrize("way", WAYS)
def test_padding_does_not_count_however_a_model_is_called(way):
    model = encoder().base_model.model
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": F.pad(ids, (0, 4)), "attention_mask": F.pad(torch.ones_like(ids), (0, 4))}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = WAYS[way](model)(**batch).logits
        unmasked = model(input_ids=batch["input_ids"]).logits
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(unmasked, expected, atol=3e-5)
    assert bank_of(model).masks.scopes == []


def test_a_class_changes_only_while_its_model_is_watched():
    before = {name: type(m) for name, m in build("bert").named_modules()}
    model = encoder()
    inner = model.base_model.model
    assert type(inner).__name__ == before[""].__name__
    assert isinstance(inner, before[""])
    assert inspect.signature(inner.forward) == inspect.signature(build("bert").forward)
    model = model.unload()
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert not any("lily_hooks" in vars(m) for m in model.modules())


def test_threads_have_masks_of_their_own():
    config = LilyConfig(r=4, num_B=2, routing="sequence", target_modules="all-linear")
    model = randomise(get_peft_model(build("bert"), config)).eval()
    batches = [inputs("bert", batch=2, tokens=40, seed=i) for i in range(2)]
    for i, batch in enumerate(batches):
        batch["attention_mask"][:, 5 + 20 * i :] = 0
    expected, wrong = [predict(model, batch) for batch in batches], []
    here = threading.Barrier(2)

    def meet(*_):
        here.wait()

    model.base_model.model.bert.encoder.register_forward_pre_hook(meet)

    def serve(i):
        if not torch.allclose(predict(model, batches[i]), expected[i], atol=1e-5):
            wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


AUDIO = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0}


def speech(padding):
    wave = torch.randn(1, 800, generator=torch.Generator().manual_seed(0))
    return {
        "input_values": F.pad(wave, (0, padding * 40)),
        "attention_mask": F.pad(torch.ones(1, 800), (0, padding * 40)),
    }


def text(padding, **more):
    ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": F.pad(ids, (0, padding)), "attention_mask": F.pad(torch.ones_like(ids), (0, padding)), **more}


def page(padding):
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return text(padding, pixel_values=image, bbox=torch.zeros(1, 8 + padding, 4, dtype=torch.long))


LENGTHS = {
    "a speech model": (transformers.Wav2Vec2Config(**SIZES, **AUDIO), speech),
    "one with pixels behind the text": (
        transformers.LayoutLMv3Config(
            **TEXT, coordinate_size=4, shape_size=8, max_2d_position_embeddings=64, input_size=8, patch_size=4
        ),
        page,
    ),
    "one that pads to a window": (transformers.LongformerConfig(**TEXT, attention_window=4), text),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", LENGTHS)
def test_padding_does_not_count_where_the_sequence_has_another_length_than_its_mask(kind, checkpointing):
    config, batch = LENGTHS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip("the model has no checkpointing")
    model = randomise(get_peft_model(model, LilyConfig(r=4, num_B=2, target_modules="all-linear"))).eval()
    assert model.peft_config["default"].routing == "sequence"
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            vars(module).update(
                {k: 0.0 for k in ("dropout", "attention_dropout") if isinstance(vars(module).get(k), float)}
            )
    found, kept = [], 8 if "input_ids" in batch(0) else 70
    for padding in (0, 7):
        model.zero_grad()
        out = model(**batch(padding)).last_hidden_state[:, :kept]
        (out * torch.linspace(-1, 1, 32)).sin().sum().backward()
        found.append((out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for alone, padded in zip(*found, strict=True):
        assert (alone - padded).norm() < 1e-4 * alone.norm()


PACKED = {
    "the ends of texts": ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    "their numbers": ("seq_idx",),
    "positions": ("position_ids",),
}


def rows_of_texts():
    """Texts of 5, 3 and 1 tokens, and one row of all as transformers makes it."""
    ids = torch.randint(3, 60, (9,), generator=torch.Generator().manual_seed(0))
    texts = [ids[:5], ids[5:8], ids[8:]]
    made = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return texts, made([{"input_ids": text} for text in texts], return_tensors="pt")


@pytest.mark.parametrize("said", PACKED)
@pytest.mark.parametrize("inside", [False, True])
def test_texts_in_one_row_are_routed_one_by_one(said, inside):
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**TEXT))
    targets = ["query", "output.dense"]
    model = nn.Sequential(bert) if inside else bert
    model = randomise(get_peft_model(model, LilyConfig(r=4, num_B=2, target_modules=targets))).eval()
    layers = model.base_model.model[0] if inside else model.base_model.model
    first = layers.encoder.layer[0].attention.self.query  # before attention, by which the base model may mix texts
    seen, (texts, row) = [], rows_of_texts()
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        layers(input_ids=row["input_ids"], **{name: row[name] for name in ("position_ids", *PACKED[said])})
        for text in texts:
            layers(input_ids=text.unsqueeze(0))
    assert torch.allclose(seen[0], torch.cat(seen[1:], 1), atol=1e-5)


def test_a_row_of_texts_has_the_gradients_of_texts_alone():
    torch.manual_seed(0)
    layer = get_peft_model(
        nn.Sequential(nn.Linear(8, 6)), LilyConfig(r=4, num_B=2, routing="sequence", target_modules=["0"])
    )
    randomise(layer).double()
    masks, x = bank_of(layer.base_model.model).masks, torch.randn(1, 9, 8, dtype=torch.double)
    numbers = torch.tensor([[0] * 5 + [1] * 3 + [2]])
    found = []
    for alone in (False, True):
        layer.zero_grad()
        if alone:
            outputs = [layer(part) for part in x.split([5, 3, 1], 1)]
        else:
            with masks.of_tokens(numbers.unsqueeze(-1) == torch.arange(3)):
                outputs = [layer(x)]
        torch.cat(outputs, 1).sin().sum().backward()
        found.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert len(found[0]) == 3  # A, B and the router
    for row, alone in zip(*found, strict=True):
        assert torch.allclose(row, alone)


def test_positions_that_a_mask_explains_are_of_one_text():
    positions = torch.tensor([[1, 1, 0, 1, 2, 3]])
    assert packed({"input_ids": positions, "position_ids": positions, "attention_mask": positions > 1}) is None
    assert packed({"input_ids": positions, "position_ids": torch.arange(6).unsqueeze(0)}) is None
    assert packed({"input_ids": positions}) is None
    found = packed({"input_ids": positions, "position_ids": torch.tensor([[2, 3, 4, 2, 2, 3]])})
    assert found.long().argmax(-1).tolist() == [[0, 0, 0, 1, 2, 2]]


def test_images_in_one_row_are_routed_one_by_one():
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(**SIZES, image_size=32, patch_size=8)
    model = transformers.PixtralVisionModel(config)
    model = randomise(get_peft_model(model, LilyConfig(r=4, num_B=2, target_modules="all-linear"))).eval()
    assert model.peft_config["default"].routing == "sequence"
    images, sizes = torch.randn(2, 3, 32, 32), torch.full((2, 2), 32)
    with torch.no_grad():
        both = model(pixel_values=images, image_sizes=sizes)[0].reshape(2, 16, -1)
        for image, size, found in zip(images.split(1), sizes.split(1), both, strict=True):
            assert torch.allclose(model(pixel_values=image, image_sizes=size)[0].reshape(16, -1), found, atol=1e-5)


def test_blocks_of_a_mask_are_samples_only_if_there_are_as_many():
    two = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2))[None, None]
    assert blocks(two, 2).long().argmax(-1).tolist() == [[0, 0, 0, 1, 1]]
    assert torch.equal(blocks(torch.where(two == 1, 0.0, -torch.inf), 2), blocks(two, 2))
    assert blocks(two, 1) is None  # windows of one sample
    assert blocks(two, 3) is None
    assert blocks(two.expand(2, -1, -1, -1), 2) is None
    assert blocks(torch.ones(1, 1, 5, 5).tril(), 2) is None


MASK = torch.arange(160).lt(torch.tensor([[160], [81]]))  # 160 frames and 81
HALF = torch.arange(80).lt(torch.tensor([[80], [40]]))


@pytest.mark.parametrize(
    ("scope", "tokens", "lengths"),
    [
        ({}, 20, [20, 11]),  # a token for 8 frames
        ({}, 41, [41, 41]),  # for no whole number of them
        ({"inner": HALF}, 128, [80, 40]),  # attention by blocks, behind a layer that halves the sequence
        ({}, 256, [160, 81]),
    ],
)
def test_a_sequence_of_frames_has_a_mask_inside_the_model_at_every_length(scope, tokens, lengths):
    model = nn.Identity()
    model.main_input_name = "input_features"
    found = Scope(MASK, model=model, **scope).fit(torch.zeros(2, tokens, 8))
    assert found.sum(1).tolist() == lengths
    assert all(row[:n].all() for row, n in zip(found, lengths, strict=True))


def test_a_shorter_sequence_of_another_kind_has_no_mask():
    model = nn.Identity()
    model.main_input_name = "input_ids"
    assert Scope(MASK, model=model).fit(torch.zeros(2, 20, 8)) is None  # as queries beside a text
    model.main_input_name = "input_values"  # samples of sound, not frames
    assert Scope(MASK, model=model).fit(torch.zeros(2, 20, 8)).all()
    assert Scope(MASK, model=model).fit(torch.zeros(1, 20, 8)) is None


def test_a_layer_that_reads_positions_does_not_average_over_them():
    config = transformers.Wav2Vec2BertConfig(
        **SIZES, feature_projection_input_dim=8, position_embeddings_type="relative", conv_depthwise_kernel_size=3
    )
    torch.manual_seed(0)
    model = transformers.Wav2Vec2BertModel(config)
    model = randomise(get_peft_model(model, LilyConfig(r=4, num_B=2, target_modules=["linear_q", "linear_pos"]))).eval()
    attention = model.base_model.model.encoder.layers[0].self_attn
    routings = [getattr(attention, name).settings["default"].routing for name in ("linear_q", "linear_pos")]
    assert routings == ["sequence", "token"]
    x = torch.randn(1, 20, 8)
    with torch.no_grad():
        alone = model(input_features=x, attention_mask=torch.ones(1, 20)).last_hidden_state
        padded = model(
            input_features=F.pad(x, (0, 0, 0, 30)), attention_mask=F.pad(torch.ones(1, 20), (0, 30))
        ).last_hidden_state
    assert torch.allclose(alone, padded[:, :20], atol=1e-5)


@pytest.mark.parametrize("kind", LENGTHS)
def test_rows_with_different_adapters_have_such_masks_too(kind):
    config, batch = LENGTHS[kind]
    torch.manual_seed(0)
    options = LilyConfig(r=4, num_B=2, target_modules="all-linear")
    model = get_peft_model(transformers.AutoModel.from_config(config), options).eval()
    model.add_adapter("other", options)
    randomise(model)
    rows = {key: torch.cat((value, value)) for key, value in batch(7).items()}
    with torch.no_grad():
        mixed = model(**rows, adapter_names=["default", "other"]).last_hidden_state
        for i, name in enumerate(("default", "other")):
            model.set_adapter(name)
            assert torch.allclose(mixed[i : i + 1], model(**batch(7)).last_hidden_state, atol=1e-5)


@pytest.mark.slow
def test_a_speech_model_is_compiled_whole_for_any_length():
    config, batch = LENGTHS["a speech model"]
    model = transformers.AutoModel.from_config(config)
    model = randomise(get_peft_model(model, LilyConfig(r=4, num_B=2, target_modules="all-linear"))).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for padding in (7, 3):
            expected = model(**batch(padding)).last_hidden_state
            assert torch.allclose(compiled(**batch(padding)).last_hidden_state, expected, atol=1e-5)


class Gates(nn.Module):
    """A layer that reads (batch, heads, tokens, in), as the gates of WavLM's relative positions."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, states, attention_mask):
        return self.gate(states.unflatten(-1, (4, 8)).transpose(1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_padding_does_not_count_in_a_layer_that_reads_heads(training):
    config = LilyConfig(r=4, num_B=2, routing="sequence", target_modules=["gate"], dropout=1e-9 if training else 0.0)
    model = randomise(get_peft_model(Gates(), config)).train(training)  # dropout takes the reference path
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for padding in (0, 3):
        model.zero_grad()
        mask = F.pad(torch.ones(2, 6), (0, padding))
        out = model(F.pad(states, (0, 0, 0, padding), value=3.0), attention_mask=mask)[:, :, :6]
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for alone, padded in zip(*found, strict=True):
        torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-4)


def test_masks_of_every_form_are_read():
    kept = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    added = torch.where(kept, 0.0, -1e4)
    for mask in (kept, kept.long(), kept.float(), added, added.half(), torch.where(kept, 0.0, -torch.inf)):
        assert torch.equal(attended(mask), kept)
        assert torch.equal(attended(mask[:, None, None].expand(2, 3, 4, 4)), kept)
    assert attended(torch.zeros(2, 4)).all()  # nothing is added: there is no padding
    assert torch.equal(attended(torch.tensor([[0.0, 3e38, -3e38]])), torch.tensor([[True, True, False]]))  # Longformer


def test_patches_that_pad_an_image_do_not_count():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4)
    torch.manual_seed(0)
    model = get_peft_model(transformers.Siglip2VisionModel(config), LilyConfig(r=4, target_modules="all-linear"))
    randomise(model).eval()
    patches = {"pixel_values": torch.randn(2, 9, 48), "spatial_shapes": torch.tensor([[2, 3], [3, 3]])}
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).long()
    padded = {**patches, "pixel_values": torch.cat((patches["pixel_values"], torch.randn(2, 4, 48)), 1)}
    with torch.no_grad():
        expected = model(**patches, pixel_attention_mask=mask).pooler_output
        found = model(**padded, pixel_attention_mask=F.pad(mask, (0, 4))).pooler_output
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


class Timms(nn.Module):
    """A transformer as timm's NaFlexViT: inputs in a dictionary, a class token, and a mask made for its blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.block = Timms.Block()

    def forward(self, x, patch_valid=None):
        h, valid = self.embed(x["patches"]), x["patch_valid"]
        h = F.pad(h, (0, 0, 1, 0), value=1.0)
        valid = F.pad(valid, (1, 0), value=True)
        h = self.block(h, attn_mask=(valid.unsqueeze(1) & valid.unsqueeze(2)).unsqueeze(1))
        return h[:, 0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x, attn_mask=None):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
            return x + F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).squeeze(1)


def test_patches_that_pad_an_image_do_not_count_in_timms_models(monkeypatch):
    monkeypatch.setattr(Timms.Block, "__module__", "timm.models.naflexvit")
    torch.manual_seed(0)
    model = randomise(get_peft_model(Timms(), LilyConfig(r=4, num_B=2, target_modules=["embed", "qkv"]))).eval()
    patches, valid = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[3], [5]])
    padded = {"patches": torch.cat((patches, torch.randn(2, 4, 6)), 1), "patch_valid": F.pad(valid, (0, 4))}
    with torch.no_grad():
        expected = model({"patches": patches, "patch_valid": valid})
        assert torch.allclose(model(padded), expected, atol=1e-5)
        assert not torch.allclose(model({"patches": patches, "patch_valid": valid | True}), expected, atol=1e-3)
