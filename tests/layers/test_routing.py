"""What each routing depends on, measured: batch mates, padding, later tokens, the cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import VOCAB, build, logits, randomise
from peft import get_peft_model
from torch import nn

from lily import LilyConfig
from lily.layers.find import layers_of

TOLERANCE = 1e-5  # float32, logits of order 1 after four layers

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")


def causal(routing):
    config = LilyConfig(
        r=8, num_A=2, num_B=3, routing=routing, scaling=1.0, task_type="CAUSAL_LM", target_modules="all-linear"
    )
    return randomise(get_peft_model(build("llama"), config)).eval()


def encoder(routing):
    config = LilyConfig(
        r=8, num_A=2, num_B=3, routing=routing, scaling=1.0, task_type="SEQ_CLS", target_modules="all-linear"
    )
    return randomise(get_peft_model(build("bert"), config)).eval()


def ids(batch, tokens, seed=3):
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, tokens, mask=None, **kwargs):
    return logits(
        model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens) if mask is None else mask, **kwargs}
    )


def padded(tokens, by, side):
    pad, one = torch.zeros(tokens.shape[0], by, dtype=tokens.dtype), torch.ones_like(tokens)
    parts = (pad, tokens) if side == "left" else (tokens, pad)
    masks = (torch.zeros_like(pad), one) if side == "left" else (one, torch.zeros_like(pad))
    return torch.cat(parts, 1), torch.cat(masks, 1)


def batch_mates(model):
    a, b = ids(1, 12), ids(3, 12, seed=9)
    return (run(model, torch.cat([a, b]))[:1] - run(model, a)).abs().max()


def causal_padding(model, side):
    a = ids(2, 12)
    tokens, mask = padded(a, 5, side)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = run(model, tokens, mask, position_ids=position)
    return ((out[:, 5:] if side == "left" else out[:, :12]) - run(model, a)).abs().max()


def later_tokens(model):
    a = ids(2, 16)
    b = torch.cat([a[:, :10], ids(2, 6, seed=8)], 1)
    return (run(model, a)[:, :10] - run(model, b)[:, :10]).abs().max()


def test_token_routing_on_a_causal_model_depends_on_nothing_but_the_past():
    model = causal("token")
    assert batch_mates(model) <= TOLERANCE
    assert causal_padding(model, "left") <= TOLERANCE
    assert causal_padding(model, "right") <= TOLERANCE
    assert later_tokens(model) <= TOLERANCE


@pytest.mark.parametrize("routing", ["static", "uniform"])
def test_data_free_routings_depend_on_nothing(routing):
    model = causal(routing)
    assert batch_mates(model) <= TOLERANCE
    assert causal_padding(model, "left") <= TOLERANCE
    assert later_tokens(model) <= TOLERANCE


def test_sequence_routing_on_an_encoder_depends_on_nothing_but_the_sample():
    model, a = encoder("sequence"), ids(2, 12)
    assert batch_mates(model) <= TOLERANCE
    tokens, mask = padded(a, 7, "right")
    assert (run(model, tokens, mask) - run(model, a)).abs().max() <= TOLERANCE
    tokens, mask = padded(a, 7, "left")
    out = run(model, tokens, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    # the classifier reads the first position, which is padding here: compare the hidden states of the real tokens
    states = lambda t, m, p=None: model.base_model.model.bert(t, m, position_ids=p).last_hidden_state  # noqa: E731
    assert out.isfinite().all()
    with torch.no_grad():
        left = states(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0))[:, 7:]
        assert (left - states(a, torch.ones_like(a))).abs().max() <= TOLERANCE


def test_sequence_routing_reads_a_positional_mask_and_survives_one_that_is_missing():
    model, a = encoder("sequence"), ids(2, 12)
    tokens, mask = padded(a, 7, "right")
    with torch.no_grad():
        positional = model.base_model.model(tokens, mask).logits
    assert (positional - run(model, a)).abs().max() <= TOLERANCE
    with torch.no_grad():
        assert (model(input_ids=a).logits - run(model, a)).abs().max() <= TOLERANCE


def test_a_four_dimensional_mask_leaves_all_tokens_in():
    model, a = encoder("sequence"), ids(2, 12)
    with torch.no_grad():
        out = model(input_ids=a, attention_mask=torch.ones(2, 1, 12, 12)).logits
    assert (out - run(model, a)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("equal_lengths", [True, False])
def test_cross_attention_layers_of_a_decoder_use_the_encoders_mask(equal_lengths):
    config = LilyConfig(
        r=8, num_B=3, routing="sequence", task_type="SEQ_2_SEQ_LM", target_modules=["q", "k", "v", "wo"]
    )
    model = randomise(get_peft_model(build("t5"), config)).eval()
    source, target = ids(2, 10), ids(2, 15 if equal_lengths else 6, seed=4)
    tokens, mask = padded(source, 5, "right")
    with torch.no_grad():
        alone = model(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target).logits
        wide = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=target).logits
    assert (alone - wide).abs().max() <= TOLERANCE


def test_batch_routing_shows_the_faults_that_these_tests_look_for():
    """The measurements can fail: stock's routing fails every one of them."""
    model = causal("batch")
    assert batch_mates(model) > 1e-2
    assert causal_padding(model, "left") > 1e-2
    assert later_tokens(model) > 1e-2
    assert later_tokens(causal("sequence")) > 1e-2
    assert batch_mates(encoder("batch")) > 1e-2


def test_greedy_decoding_with_and_without_a_cache_agrees_on_every_token():
    model, prompt = causal("token"), ids(2, 8)
    kwargs = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    one = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    with torch.no_grad():
        cached = model.generate(**one, **kwargs, use_cache=True)
        plain = model.generate(**one, **kwargs, use_cache=False)
    assert cached.shape == (2, 72)
    assert torch.equal(cached, plain)


def test_logits_with_a_cache_equal_those_without():
    model, tokens = causal("token"), ids(2, 12)
    whole = run(model, tokens)
    with torch.no_grad():
        out = model(input_ids=tokens[:, :7], use_cache=True)
        pieces = [out.logits]
        for t in range(7, 12):
            out = model(input_ids=tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
    assert (torch.cat(pieces, 1) - whole).abs().max() <= TOLERANCE


def test_beam_search_and_left_padded_batches_generate():
    model, a = causal("token"), ids(2, 8)
    tokens, mask = padded(a, 4, "left")
    with torch.no_grad():
        beams = model.generate(input_ids=tokens, attention_mask=mask, num_beams=3, max_new_tokens=8, do_sample=False)
        alone = model.generate(
            input_ids=a, attention_mask=torch.ones_like(a), num_beams=3, max_new_tokens=8, do_sample=False
        )
    assert torch.equal(beams[:, 12:], alone[:, 8:])


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS_FIRST = {
    "XLNet": (
        transformers.XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48),
        {"layer_1", "layer_2"},
    ),
    "Longformer": (transformers.LongformerConfig(**SMALL, attention_window=4), {"query", "value", "key"}),
}


@pytest.mark.parametrize("kind", TOKENS_FIRST)
def test_samples_do_not_mix_where_a_module_works_on_tokens_first(kind):
    config, expected = TOKENS_FIRST[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    model = randomise(
        get_peft_model(model, LilyConfig(r=4, num_B=2, routing="sequence", target_modules="all-linear"))
    ).eval()
    layers = layers_of(model.base_model.model)
    by_token = {
        name.rpartition(".")[2] for name, layer in layers.items() if layer.settings["default"].routing == "token"
    }
    assert by_token >= expected
    tokens = ids(3, 8)
    with torch.no_grad():
        together, alone = model(input_ids=tokens)[0], model(input_ids=tokens[:1])[0]
    assert torch.allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_samples_do_not_mix_in_torchs_encoder_whichever_dimension_is_first(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    config = LilyConfig(r=4, num_B=2, routing="sequence", target_modules="all-linear")
    model = randomise(get_peft_model(nn.Sequential(layer), config)).eval()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    x, first = (x, x[:1]) if batch_first else (x.transpose(0, 1), x[:1].transpose(0, 1))
    with torch.no_grad():
        together, alone = model(x), model(first)
    assert torch.allclose(together[:1] if batch_first else together[:, :1], alone, atol=1e-5)
