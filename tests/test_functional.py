"""The reference against a transcription of the formulas in DESIGN section 1, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lily import functional

ROUTINGS = ["token", "sequence", "batch", "static", "uniform"]


def transcription(x, A, B, R, routing, scaling, act, mask=None):
    """Section 1, one token at a time: no matrix form of our own is used."""
    h = act(x @ A.T)
    p = torch.softmax(h @ R.T, -1) if R.ndim == 2 else torch.softmax(R, -1).expand(*h.shape[:-1], -1)
    if routing == "uniform":
        p = torch.full_like(p, 1 / B.shape[0])
    if routing == "batch":
        p = p.mean(dim=(0, 1)).expand_as(p)
    y = torch.zeros(*x.shape[:2], B.shape[2], dtype=x.dtype)
    for b in range(x.shape[0]):
        keep = mask[b].bool() if mask is not None else torch.ones(x.shape[1], dtype=torch.bool)
        for t in range(x.shape[1]):
            w = p[b][keep].mean(0) if routing == "sequence" else p[b, t]
            for e in range(B.shape[0]):
                y[b, t] += scaling * w[e] * (h[b, t] @ B[e])
    return y


def tensors(routing, batch=3, tokens=5, n=7, m=6, r=4, E=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=dtype)  # noqa: E731
    router = rand(E) if routing == "static" else rand(E, r)
    return rand(batch, tokens, n), rand(r, n), rand(E, r, m), router


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_equals_the_formula_in_float64(routing, activation, masked):
    x, A, B, R = tensors(routing)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) if masked else None
    act = functional.ACTIVATIONS[activation] or (lambda h: h)
    expected = transcription(x, A, B, R, routing, 0.7, act, mask if routing == "sequence" else None)
    got = functional.lily(x, A, B, R, routing=routing, scaling=0.7, activation=activation, mask=mask)
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_pass_gradcheck(routing):
    x, A, B, R = (t.requires_grad_() for t in tensors(routing))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    run = lambda *t: functional.lily(*t, routing=routing, scaling=0.7, mask=mask)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, A, B, R))


@settings(max_examples=60, deadline=None)
@given(
    routing=st.sampled_from(ROUTINGS),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 9),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    r=st.integers(1, 5),
    E=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_formula(routing, batch, tokens, n, m, r, E, seed):
    x, A, B, R = tensors(routing, batch, tokens, n, m, r, E, seed)
    expected = transcription(x, A, B, R, routing, 1.3, lambda h: h)
    assert torch.allclose(functional.lily(x, A, B, R, routing=routing, scaling=1.3), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_expert_needs_no_router(routing):
    x, A, B, _ = tensors(routing, E=1)
    assert torch.allclose(functional.lily(x, A, B, None, routing=routing), x @ A.T @ B[0])


def test_several_experts_without_a_router_are_an_error():
    x, A, B, _ = tensors("token")
    with pytest.raises(ValueError, match="needs a router"):
        functional.lily(x, A, B, None, routing="token")


def test_expand_first_and_combine_first_agree():
    x, A, B, _ = tensors("token", tokens=9)
    h, w = x @ A.T, torch.softmax(torch.randn(3, 1, 3, dtype=torch.float64), -1)
    assert torch.allclose(functional.mix(h, w, B), functional.mix(h, w.expand(3, 9, 3), B), atol=1e-12)


def test_sequence_weights_ignore_masked_tokens_whatever_they_hold():
    x, A, B, R = tensors("sequence")
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 3)
    changed = x.clone()
    changed[:, 2:] = 100.0
    run = lambda t: functional.lily(t, A, B, R, routing="sequence", mask=mask)[:, :2]  # noqa: E731
    assert torch.equal(run(x), run(changed))


def test_a_row_of_padding_alone_is_finite():
    x, A, B, R = tensors("sequence")
    mask = torch.tensor([[0] * 5, [1] * 5, [1] * 5])
    assert functional.lily(x, A, B, R, routing="sequence", mask=mask).isfinite().all()


def test_flattened_tokens_are_regrouped_by_the_mask():
    x, A, B, R = tensors("sequence")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    flat = functional.lily(x.reshape(15, -1), A, B, R, routing="sequence", mask=mask)
    assert torch.allclose(flat, functional.lily(x, A, B, R, routing="sequence", mask=mask).reshape(15, -1), atol=1e-12)


def test_images_of_any_rank_average_over_everything_but_the_sample():
    x, A, B, R = tensors("sequence", tokens=6)
    grid = x.reshape(3, 2, 3, 7)
    expected = functional.lily(x, A, B, R, routing="sequence").reshape(3, 2, 3, -1)
    assert torch.allclose(functional.lily(grid, A, B, R, routing="sequence"), expected, atol=1e-12)
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]])
    whole = functional.lily(x, A, B, R, routing="sequence", mask=mask.repeat_interleave(3, 1)).reshape(3, 2, 3, -1)
    assert torch.allclose(functional.lily(grid, A, B, R, routing="sequence", mask=mask), whole, atol=1e-12)


def test_dropout_acts_on_the_hidden_state_and_only_in_training():
    x, A, B, R = tensors("token", tokens=400, r=8)
    run = lambda training: functional.lily(x, A, B, R, routing="token", dropout=0.5, training=training)  # noqa: E731
    assert torch.equal(run(False), functional.lily(x, A, B, R, routing="token"))
    h = functional.down(x, A, dropout=0.5, training=True)
    assert 0.4 < (h == 0).double().mean() < 0.6
    kept = h != 0
    assert torch.allclose(h[kept], (2 * x @ A.T)[kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_double(dtype):
    x, A, B, R = tensors("token", seed=3)
    exact = functional.lily(x, A, B, R, routing="token")
    half = functional.lily(*(t.to(dtype) for t in (x, A, B, R)), routing="token")
    assert half.dtype == dtype
    # two chained products of width ~7 and 12: a few units of the last place of the largest value
    assert (half.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()
