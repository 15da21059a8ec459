"""The mask tracker: hooks come and go, scopes nest and close."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import build, inputs, logits, randomise
from peft import get_peft_model
from torch import nn

from lily import LilyConfig
from lily.layers.attention_masks import Scope, fits
from lily.layers.bank import bank_of


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
    assert len(hooks(model)) == 4  # in and out of the classifier model and of the encoder inside it


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
