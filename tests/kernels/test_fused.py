"""The fast path against the reference, which it must equal in values and in all gradients."""

from __future__ import annotations

import pytest
import torch
from adapters import config_for
from helpers import build, inputs, logits, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from lily import LilyConfig, functional
from lily.kernels import fused, matmul
from lily.kernels.mixing import How
from lily.layers import linear

ROUTINGS = ["token", "sequence", "batch", "static", "uniform"]
ACTIVATIONS = ["none", "relu", "gelu", "silu"]
pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")
SHAPES = [(3, 5, 7), (2, 40, 7), (15, 7), (2, 3, 4, 7), (7,)]


class Case:
    """Random tensors of one setting, and both ways to compute it."""

    def __init__(
        self,
        routing,
        shape=(3, 5, 7),
        m=6,
        r=4,
        E=3,
        activation="none",
        masked=False,
        transposed=False,
        dtype=torch.float64,
        scaling=0.7,
        seed=0,
        adapter_dtype=None,
        arranged=False,
    ):
        g = torch.Generator().manual_seed(seed)

        def rand(*size, to=dtype):
            return (torch.randn(*size, generator=g, dtype=torch.float64) / max(size[-1], 1) ** 0.5).to(to)

        own = adapter_dtype or dtype
        self.x = rand(*shape).requires_grad_()
        self.A, self.B = rand(r, shape[-1], to=own).requires_grad_(), rand(E * r, m, to=own).requires_grad_()
        self.router = None
        if E > 1 and routing != "uniform":
            self.router = rand(*((E,) if routing == "static" else (E, r)), to=own).requires_grad_()
        self.rows = torch.randperm(r, generator=g) if arranged else None
        self.factor = rand(r, to=own).requires_grad_() if arranged else None
        self.own = [rand(2, size, to=own).requires_grad_() for size in (shape[-1], m)] if arranged else [None, None]
        if self.router is not None and arranged and routing != "static":
            self.router = nn.functional.pad(self.router.detach(), (0, 2)).requires_grad_()
        self.weight, self.bias = rand(m, shape[-1]), rand(m).requires_grad_()
        sizes = (3, shape[0] // 3) if len(shape) == 2 else shape[:2]
        self.mask = (torch.rand(sizes, generator=g) > 0.4).long() if masked and routing == "sequence" else None
        self.E, self.r, self.routing, self.scaling, self.activation = E, r, routing, scaling, activation
        self.how = How(routing, E, scaling, dtype, activation, 0.0, transposed)

    @property
    def leaves(self):
        return [t for t in (self.x, self.A, self.B, self.router, self.bias, self.factor, *self.own) if t is not None]

    @property
    def update(self):
        return fused.Update(self.A, self.B, self.router, self.how, self.mask, self.rows, self.factor, *self.own)

    def fast(self):
        weight = self.weight.t().contiguous() if self.how.transposed else self.weight
        return fused.linear(self.x, weight, self.bias, self.update)

    def beside(self):
        base = nn.functional.linear(self.x, self.weight, self.bias)
        return fused.plus_update(base, self.x, self.update)

    def reference(self):
        x, A, B = (t.double() for t in (self.x, self.A, self.B))
        A, B = functional.layer_A(A, self.rows, None, self.factor), B.view(self.E, self.r, -1)
        if self.own[0] is not None:
            A, B = functional.with_own(A, B, *self.own)
        router = None if self.router is None else self.router.double()
        update = functional.lily(
            x,
            A,
            B,
            router,
            routing=self.routing,
            scaling=self.scaling,
            activation=self.activation,
            mask=self.mask,
        )
        return nn.functional.linear(x, self.weight.double(), self.bias.double()) + update


def differences(case, run):
    """Largest error of the output and of each gradient, as a share of the largest exact value."""
    exact, got = case.reference(), run()
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = torch.autograd.grad(exact, case.leaves, dy)
    found = torch.autograd.grad(got, case.leaves, dy.to(got.dtype))
    assert [f.dtype for f in found] == [leaf.dtype for leaf in case.leaves]
    pairs = [(exact, got), *zip(wanted, found, strict=True)]
    return [((a - b).abs().max() / a.abs().max().clamp(min=1e-9)).item() if a.numel() else 0.0 for a, b in pairs]


@pytest.mark.parametrize(
    ("routing", "shape", "masked"),
    [(routing, shape, False) for routing in ROUTINGS for shape in SHAPES]
    + [("sequence", shape, True) for shape in SHAPES if len(shape) > 1],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_equal_the_reference(routing, activation, shape, masked):
    for E in (1, 3):
        for transposed in (False, True):
            case = Case(routing, shape, E=E, activation=activation, masked=masked, transposed=transposed)
            assert max(differences(case, case.fast)) < 1e-11
        assert max(differences(case, case.beside)) < 1e-11
        arranged = Case(routing, shape, E=E, activation=activation, masked=masked, arranged=True)
        assert max(differences(arranged, arranged.fast)) < 1e-11


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("arranged", [False, True])
def test_gradients_pass_gradcheck(routing, tokens, arranged):
    case = Case(routing, shape=(2, tokens, 3), m=2, r=3, masked=True, arranged=arranged)
    run = lambda *t: case.fast()  # noqa: E731 -- the leaves are the case's own
    assert torch.autograd.gradcheck(run, case.leaves)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_of_gradients_pass_gradgradcheck(routing):
    case = Case(routing, shape=(2, 4, 3), m=2, r=2, masked=True, activation="silu", arranged=True)
    assert torch.autograd.gradgradcheck(lambda *t: case.fast(), case.leaves)


@settings(max_examples=30, deadline=None)
@given(
    routing=st.sampled_from(ROUTINGS),
    shape=st.lists(st.integers(1, 70), min_size=0, max_size=2),
    n=st.integers(1, 80),
    m=st.integers(1, 80),
    r=st.integers(1, 17),
    E=st.integers(1, 4),
    activation=st.sampled_from(ACTIVATIONS),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_dtype_is_close_to_the_reference_in_double(
    routing, shape, n, m, r, E, activation, masked, dtype, seed
):
    masked = masked and len(shape) == 2
    case = Case(routing, (*shape, n), m, r, E, activation, masked, dtype=dtype, adapter_dtype=torch.float32, seed=seed)
    # float32: sums of up to 4,900 rows. Half precision: rounded three times on the way, and the derivative of relu
    # jumps where a rounded value changes its sign, so only the output is held to it there.
    if dtype == torch.float32:
        assert max(differences(case, case.fast)) < 2e-4 if activation != "relu" else 2e-2
    else:
        assert differences(case, case.fast)[0] < 12 * torch.finfo(dtype).eps


@pytest.mark.skipif(not matmul.onednn_is_faster(), reason="PyTorch's own products are the faster ones on this CPU")
@pytest.mark.parametrize("routing", ROUTINGS)
def test_large_products_on_onednn_equal_pytorchs_own(routing, monkeypatch):
    case = Case(routing, shape=(4, 64, 256), m=256, r=32, dtype=torch.float32)
    assert max(differences(case, case.fast)) < 1e-5
    monkeypatch.setattr(matmul, "ONEDNN", False)
    assert max(differences(case, case.fast)) < 1e-5


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_inference_computes_what_training_computes(routing, tokens):
    case = Case(routing, shape=(2, tokens, 7))
    expected = case.fast()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.allclose(case.fast(), expected, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "plain"])
def test_a_whole_model_gives_what_the_reference_gives(kind, routing, monkeypatch):
    model = randomise(get_peft_model(build(kind), config_for(kind, routing=routing))).train()
    trainable = [p for p in model.parameters() if p.requires_grad]

    def run():
        torch.manual_seed(0)
        out = logits(model, inputs(kind))
        return out, torch.autograd.grad(out.square().mean(), trainable, allow_unused=True)

    out, grads = run()
    monkeypatch.setattr(fused, "product_dtype", lambda *_: None)
    expected, wanted = run()
    assert torch.allclose(out, expected, atol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))


def adapted(base, **options):
    config = LilyConfig(**{"r": 4, "num_B": 3, "routing": "token", "target_modules": ["0"], **options})
    return randomise(get_peft_model(nn.Sequential(base), config))


def reference_of(model, x):
    wrapped = next(m for m in model.modules() if isinstance(m, linear.Linear))
    return wrapped.base_layer(x) + wrapped.update_of("default", x)


def test_dropout_hits_the_forward_and_the_backward_alike():
    model = adapted(nn.Linear(8, 6), dropout=0.4).train()
    x = torch.randn(5, 9, 8, requires_grad=True)
    trainable = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    got = model(x)
    found = torch.autograd.grad(got.square().sum(), trainable)
    torch.manual_seed(3)
    expected = reference_of(model, x)
    wanted = torch.autograd.grad(expected.square().sum(), trainable)
    assert torch.allclose(got, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(found, wanted, strict=True))


def test_dropout_acts_without_gradients_too_while_training():
    """Re-entrant checkpointing runs the forward without gradients first."""
    model = adapted(nn.Linear(8, 6), dropout=0.4).train()
    x = torch.randn(2, 3, 8)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)], ids=str)
def test_what_follows_a_layer_may_change_its_output_in_place(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    adapted = randomise(get_peft_model(model, LilyConfig(r=2, num_B=2, routing="token", target_modules=["0"])))
    x = torch.randn(shape)

    def gradients() -> list[torch.Tensor]:
        return torch.autograd.grad(adapted(x).sum(), [p for p in adapted.parameters() if p.requires_grad])

    expected = gradients()
    model[1].inplace = True
    torch.testing.assert_close(gradients(), expected)


def test_a_trainable_bias_of_the_base_gets_its_gradient():
    model = adapted(nn.Linear(8, 6), bias="lily_only")
    x = torch.randn(2, 9, 8)
    bias = next(p for n, p in model.named_parameters() if n.endswith("bias"))
    assert bias.requires_grad
    (found,) = torch.autograd.grad(model(x).sum(), bias)
    assert torch.allclose(found, torch.full((6,), 18.0))


def test_a_trainable_base_weight_gets_its_gradient():
    model = adapted(nn.Linear(8, 6))
    weight = next(p for n, p in model.named_parameters() if n.endswith("base_layer.weight"))
    weight.requires_grad_(True)
    x = torch.randn(2, 9, 8)
    (found,) = torch.autograd.grad(model(x).sum(), weight)
    assert torch.allclose(found, x.sum((0, 1)).expand(6, 8), atol=1e-5)


def test_hooks_on_the_base_layer_run():
    model = adapted(nn.Linear(8, 6))
    base = next(m for m in model.modules() if isinstance(m, linear.Linear)).base_layer
    x, seen = torch.randn(2, 9, 8), []
    before = model(x)
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out.shape) or out + 1)
    assert torch.allclose(model(x), before + 1, atol=1e-6)
    assert seen == [(2, 9, 6)]
    handle.remove()
    base.forward = lambda t: torch.zeros(*t.shape[:-1], 6)
    zeroed = model(x)
    del base.forward
    assert not torch.allclose(zeroed, before)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_that_are_not_contiguous_are_read_rightly(layout):
    model = adapted(nn.Linear(8, 6))
    x = {
        "transposed": lambda: torch.randn(9, 2, 8).transpose(0, 1),
        "sliced": lambda: torch.randn(2, 9, 16)[..., ::2],
        "expanded": lambda: torch.randn(1, 9, 8).expand(2, 9, 8),
    }[layout]()
    assert torch.allclose(model(x), reference_of(model, x), atol=1e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_an_empty_batch_has_zero_gradients(routing):
    model = adapted(nn.Linear(8, 6), routing=routing)
    model(torch.randn(0, 5, 8)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_autocast_multiplies_in_half_precision_and_keeps_no_copy_of_the_input(routing):
    model = adapted(nn.Linear(64, 48), routing=routing)
    x = torch.randn(4, 40, 64, requires_grad=True)
    exact = model(x)
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    of_its_size = [t for t in saved if t.numel() == x.numel()]
    assert [t.data_ptr() for t in of_its_size] == [x.data_ptr()]
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_layers_arrangement_of_the_shared_A_is_not_kept_for_backward():
    base = nn.Sequential(*(nn.Linear(48, 48) for _ in range(2)))
    model = adapted(base, r=6, num_A=1, gain="signs", own_r=2, target_modules="all-linear")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(4, 10, 48))
    assert not [
        t for t in saved if t.ndim == 2 and len(t) in (6 + 2, 3 * (6 + 2))
    ]  # what the own pair is stacked below
    shared = [p for name, p in model.named_parameters() if "lily_A" in name]
    assert {t.data_ptr() for t in saved if t.shape == shared[0].shape} == {A.data_ptr() for A in shared}


def test_a_half_precision_base_is_not_multiplied_in_float32():
    model = adapted(nn.Linear(64, 48).bfloat16(), routing="token")
    wrapped = next(m for m in model.modules() if isinstance(m, linear.Linear))
    x = torch.randn(4, 40, 64, dtype=torch.bfloat16)
    fast = wrapped._fast("default", x)
    assert fast is not None
    assert fast[0].dtype == torch.float32
    assert fast[3].dtype == torch.bfloat16
    out = model(x)
    assert out.dtype == torch.bfloat16
    exact = reference_of(model, x)
    assert (out - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_several_adapters_at_once_add_up():
    model = adapted(nn.Linear(8, 6))
    model.add_adapter("other", LilyConfig(r=3, num_B=2, routing="sequence", target_modules=["0"]))
    randomise(model, seed=5)
    model.base_model.set_adapter(["default", "other"])
    wrapped = next(m for m in model.modules() if isinstance(m, linear.Linear))
    x = torch.randn(2, 9, 8)
    expected = reference_of(model, x) + wrapped.update_of("other", x)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_functional_transforms_go_through():
    model = adapted(nn.Linear(8, 6))
    x = torch.randn(9, 8)
    jacobian = torch.func.jacrev(model)(x)
    expected = torch.autograd.functional.jacobian(model, x)
    assert torch.allclose(jacobian, expected, atol=1e-5)


def test_dropout_cannot_be_differentiated_twice_and_says_so():
    model = adapted(nn.Linear(8, 6), dropout=0.4).train()
    x = torch.randn(2, 9, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_training_step_saves_the_input_and_nothing_else_as_wide(routing):
    model = adapted(nn.Linear(64, 64), routing=routing)
    x = torch.randn(4, 40, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    activations = [t for t in saved if t.data_ptr() != x.data_ptr() and not isinstance(t, nn.Parameter)]
    assert not [t.shape for t in activations if t.numel() >= x.shape[0] * x.shape[1]]
