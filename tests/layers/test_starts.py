"""The starts of A: orthonormal rows at the default's variance, and the incremental SVD behind the start from data."""

from __future__ import annotations

import math

import pytest
import torch
from every_kind import KINDS, base, lily_config, output
from peft import PeftModel, get_peft_model
from torch import nn

from lily import LilyConfig
from lily.layers.find import layers_of
from lily.layers.starts import TopDirections, completed, kaiming, orthonormal

PARAMETERS = ("parameter", "experts")


@pytest.mark.parametrize(("rows", "columns"), [(4, 32), (32, 32), (20, 8), (3, 1)])
def test_rows_are_orthogonal_and_h_varies_as_with_the_default_start(rows, columns):
    torch.manual_seed(0)
    A = orthonormal(torch.empty(rows, columns), rank=rows)
    for block in A.split(columns):
        assert torch.allclose(block @ block.T, torch.eye(len(block)) / 3, atol=1e-6)
    x = torch.randn(4000, columns)
    default = torch.stack([kaiming(torch.empty(rows, columns)) for _ in range(40)])
    expected = (x @ default.mT).square().mean()
    assert (x @ A.T).square().mean() == pytest.approx(float(expected), rel=0.15)


def test_each_A_of_a_stack_is_orthonormal_for_itself():
    A = orthonormal(torch.empty(6, 4), rank=3)
    assert all(torch.allclose(one @ one.T, torch.eye(3) / 3, atol=1e-6) for one in A.split(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_fills_other_precisions(dtype):
    A = orthonormal(torch.empty(3, 16, dtype=dtype), rank=3)
    assert A.dtype == dtype
    assert torch.allclose((A @ A.T).double(), torch.eye(3).double() / 3, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "routing"),
    [
        (kind, routing)
        for kind in KINDS
        for routing in ["token", "sequence", "batch", "static", "uniform"]
        if kind != "saved module" and (kind not in PARAMETERS or routing in ("static", "uniform"))
    ],
)
def test_an_orthonormal_adapter_changes_nothing_and_its_file_says_how_it_started(kind, routing, tmp_path):
    model = get_peft_model(base(), lily_config(kind, routing=routing, own_r=1, init_weights="orthonormal"))
    assert torch.equal(output(model), output(base()))
    bank = next(m for m in model.modules() if type(m).__name__ == "LilyBank")
    for A in bank.lily_A["default"]:
        if kind == "embedding":  # as by default: an id that is not looked up must not change
            assert not A.any()
        else:
            assert all(torch.allclose(one @ one.T, torch.eye(len(one)) / 3, atol=1e-6) for one in A.split(2))
    for layer in layers_of(model.base_model.model).values():
        own = layer.lily_own_A["default"].weight
        assert kind == "embedding" or torch.allclose(own.norm(dim=1), own.new_tensor(1 / math.sqrt(3)))
    model.save_pretrained(tmp_path)
    assert LilyConfig.from_pretrained(tmp_path).init_weights == "orthonormal"
    assert torch.equal(output(PeftModel.from_pretrained(base(), tmp_path)), output(base()))


def test_the_default_start_draws_the_numbers_that_it_drew_before():
    torch.manual_seed(5)
    expected = nn.init.kaiming_uniform_(torch.empty(3, 8), a=math.sqrt(5))
    model = nn.Sequential(nn.Linear(8, 8))
    torch.manual_seed(5)
    get_peft_model(model, LilyConfig(r=3, num_B=1, target_modules=["0"]))
    assert torch.equal(model.lily_bank.lily_A["default"][0], expected)


# -- the incremental SVD


def directions(X, rank):
    _, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return Vh[:rank]


def span(rows):
    return rows.T @ rows


def data(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return torch.randn(rows, columns, generator=generator) * 0.8 ** torch.arange(columns) @ mixing + 0.5


def test_batches_of_any_size_give_the_directions_of_all_vectors_together():
    X = data(300, 20)
    top = TopDirections(4, 20)
    for batch in X.split([1, 3, 96, 200]):
        top.add(batch)
    V, S = top.top(4)
    assert torch.allclose(span(V), span(directions(X, 4)), atol=1e-4)
    assert torch.allclose(S, torch.linalg.svdvals(X)[:4], rtol=1e-4)
    assert (top.count, top.energy) == (300, pytest.approx(float(X.square().sum()), rel=1e-5))


def test_where_it_must_forget_directions_the_top_ones_stay_exact_enough_and_the_random_state_is_kept():
    X = data(3000, 300)
    top, state = TopDirections(4, 300), torch.get_rng_state()
    for batch in X.split(500):
        top.add(batch)
    assert top.kept.shape == (24, 300)
    V, _ = top.top(4)
    assert torch.allclose(span(V), span(directions(X, 4)), atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_vectors_of_few_directions_give_no_more():
    X = torch.randn(50, 3) @ torch.randn(3, 12)
    top = TopDirections(5, 12)
    top.add(X)
    V, _ = top.top(5)
    assert len(V) == 3
    none, _ = top.top(2, without=V)
    assert len(none) == 0


def test_it_has_converged_when_no_direction_turns():
    top = TopDirections(2, 6)
    top.end_batch(0.99)
    assert not top.converged
    X = torch.diag(torch.tensor([5.0, 4.0, 1.0, 1.0, 1.0, 1.0]))
    top.add(X)
    top.end_batch(0.99)
    assert not top.converged  # there was nothing before
    top.add(X)
    top.end_batch(0.99)
    assert top.converged
    top.add(100 * X.flip(0).roll(3, 1))
    top.end_batch(0.99)
    assert not top.converged


@pytest.mark.parametrize("more", [0, 2, 5, 9])
def test_rows_are_completed_to_an_orthonormal_set(more):
    rows = torch.linalg.qr(torch.randn(6, 3))[0].T
    others = torch.cat((rows, torch.randn(9, 6)))[:more]  # some of them lie in the span already
    full = completed(rows, others)
    assert full.shape == (3 + more, 6)
    assert torch.equal(full[:3], rows)
    basis = full[:6]
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-6)
    assert torch.allclose(full.norm(dim=1), torch.ones(len(full)), atol=1e-6)
