"""`lily.budget`: counts, the chosen shape, and the estimates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lily.budget import choose, equal_lora_rank, lora_parameters, parse_count
from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.cost import estimate
from lily.plan.options import ROUTINGS
from lily.plan.sharing_plan import ModuleSpec, build_plan


def stack(layers: int, **shapes: tuple[int, int]) -> list[ModuleSpec]:
    """`layers` blocks, each with one module per (in, out)."""
    return [ModuleSpec(f"layers.{i}.{name}", *shape) for i in range(layers) for name, shape in shapes.items()]


# Llama-3.2-3B, of Hugging Face's comparison (REFERENCE).
MLP = stack(28, gate_proj=(3072, 8192), up_proj=(3072, 8192), down_proj=(8192, 3072))
QV = stack(28, q_proj=(3072, 3072), v_proj=(3072, 1024))


def total(modules: list[ModuleSpec], **options: object) -> int:
    return build_plan(modules, LilyConfig(**options)).parameters.total


@st.composite
def models(draw: st.DrawFn) -> list[ModuleSpec]:
    size = st.integers(2, 96)
    groups = draw(st.lists(st.tuples(size, size, st.integers(1, 30)), min_size=1, max_size=4))
    return [ModuleSpec(f"g{g}.{i}.t{g}", a, b) for g, (a, b, n) in enumerate(groups) for i in range(n)]


@pytest.mark.parametrize(("layers", "large", "small"), [(6, 2, 1), (14, 2, 1), (28, 2, 2), (40, 3, 3), (2, 1, 1)])
def test_below_a_lora_of_rank_4_one_A_is_for_about_14_layers(layers, large, small):
    modules = stack(layers, q=(256, 256), up=(256, 512))
    assert choose(modules, match_lora=4).num_B == large
    below = choose(modules, parameters=lora_parameters(modules, 4) - 1)
    assert (below.num_A, below.num_B) == (small, small)
    # the reason of a small budget is given only where it decided
    assert ("a larger rank of fewer A and B" in str(below.reason)) == (small < large)
    assert choose(modules, match_lora=2, fewest=2).num_A == max(large, 1)
    assert choose(modules).num_A == large  # without a budget


def test_layers_without_distinction_do_not_share_everything():
    from helpers import TARGETS, build

    from lily.plan.decide import decide

    def shape(**options):
        return decide(build("llama"), {"target_modules": TARGETS["llama"], **options}, {"match_lora": 1}).choice.num_A

    assert shape() == 1
    assert shape(distinct="none") == shape(routing="batch") == 2


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.2M", 1_200_000), ("800k", 800_000), ("1_000_000", 10**6), ("1,000,000", 10**6), (" 7 m ", 7_000_000),
        ("2B", 2 * 10**9), ("2g", 2 * 10**9), ("1e6", 10**6), ("0.1k", 100), (42, 42), ("1.0000007M", 1_000_000),
    ],
)  # fmt: skip
def test_a_count_reads_as_people_write_it(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "M", "12x", "-3", "1.2.3M", "0", "0.0001k", "1 2", True, "nan", "1e-3", "1e999999999"]
)
def test_what_is_no_count_is_named_in_the_error(text: str | int) -> None:
    with pytest.raises(LilyError, match=r"(?s)1\.2M"):
        parse_count(text)


def test_lora_parameters_are_those_of_its_matrices() -> None:
    brute = sum(nn.Linear(m.in_features, 7, device="meta").weight.numel() for m in QV)
    brute += sum(nn.Linear(7, m.out_features, device="meta").weight.numel() for m in QV)
    assert lora_parameters(QV, 7) == brute


def test_reference_figures_of_hugging_faces_comparison() -> None:
    assert round(lora_parameters(MLP, 10) / 1e6, 2) == 9.46
    assert round(total(MLP, r=140, stride_A=14, num_B=2, routing="batch") / 1e6, 2) == 9.49
    assert round(lora_parameters(QV, 64) / 1e6, 2) == 18.35
    assert round(total(QV, r=896, stride_A=14, num_B=2, routing="batch") / 1e6, 2) == 18.45


def test_hugging_faces_best_run_is_what_its_own_budget_chooses() -> None:
    choice = choose(MLP, parameters=total(MLP, r=140, stride_A=14, num_B=2, routing="batch"), routing="batch")
    assert choice.options == {"r": 140, "num_A": 2, "num_B": 2}


@given(models(), st.integers(1, 10**6))
def test_the_equal_lora_rank_is_the_largest_within_the_budget(modules: list[ModuleSpec], budget: int) -> None:
    r = equal_lora_rank(modules, budget)
    assert r == 1 or lora_parameters(modules, r) <= budget
    assert lora_parameters(modules, r + 1) > budget


def test_no_layers_is_an_error_everywhere() -> None:
    for call in (lambda: equal_lora_rank([], 10), lambda: choose([], parameters=10)):
        with pytest.raises(LilyError, match="no layers"):
            call()


# --- the choice -----------------------------------------------------------------------------------------------------


@given(models(), st.integers(1, 300_000), st.sampled_from(ROUTINGS))
def test_a_choice_counts_what_the_plan_counts_and_never_exceeds_the_budget(
    modules: list[ModuleSpec], budget: int, routing: str
) -> None:
    try:
        choice = choose(modules, parameters=budget, routing=routing)
    except LilyError:
        assert total(modules, r=1, num_A=1, num_B=1) > budget  # nothing smaller exists
        return
    assert choice.parameters == total(modules, routing=routing, **choice.options) <= budget
    assert choice.r <= min(min(m.in_features, m.out_features) for m in modules)


@given(models(), st.integers(1, 300_000), st.integers(0, 100_000), st.sampled_from(ROUTINGS))
def test_a_larger_budget_never_gives_fewer_parameters(
    modules: list[ModuleSpec], budget: int, more: int, routing: str
) -> None:
    assume(total(modules, r=1, num_A=1, num_B=1) <= budget)
    small = choose(modules, parameters=budget, routing=routing)
    large = choose(modules, parameters=budget + more, routing=routing)
    assert small.parameters <= large.parameters


@given(
    models(),
    st.none() | st.integers(1, 9),
    st.none() | st.tuples(st.sampled_from(["num_A", "stride_A"]), st.integers(1, 9)),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 300_000),
    st.sampled_from(ROUTINGS),
)
def test_what_is_given_is_kept(
    modules: list[ModuleSpec],
    r: int | None,
    sharing: tuple[str, int] | None,
    num_B: int | None,
    budget: int | None,
    routing: str,
) -> None:
    given_ = {"r": r, "num_B": num_B, **dict([sharing] if sharing else [])}
    given_ = {name: value for name, value in given_.items() if value is not None}
    try:
        choice = choose(modules, parameters=budget, routing=routing, **given_)
    except LilyError:
        smallest = {"r": 1, "num_B": 1, **({} if sharing else {"num_A": 1}), **given_}
        assert budget is not None
        assert total(modules, routing=routing, **smallest) > budget
        return
    assert {name: choice.options[name] for name in given_} == given_
    assert choice.parameters == total(modules, routing=routing, **choice.options)
    assert budget is None or choice.parameters <= budget


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(4, 400))
def test_a_budget_is_used_up_to_one_rank(layers: int, lora: int) -> None:
    modules = stack(layers, q_proj=(512, 512), up_proj=(512, 2048))
    choice = choose(modules, match_lora=lora)
    budget = lora_parameters(modules, lora)
    if choice.r < 512:
        wider = {**choice.options, "r": choice.r + 1}
        assert total(modules, routing="token", **wider) > budget


@pytest.mark.parametrize(("layers", "n"), [(1, 1), (2, 1), (4, 2), (6, 2), (12, 2), (24, 2), (28, 2), (32, 3), (80, 4)])
def test_the_rule_is_one_a_for_about_14_layers_between_2_and_4(layers: int, n: int) -> None:
    choice = choose(stack(layers, q_proj=(4096, 4096)), match_lora=8)
    assert (choice.num_A, choice.num_B) == (n, n)


def test_a_rank_beyond_the_smallest_side_becomes_more_sharing_tensors_instead() -> None:
    choice = choose(QV, match_lora=900)
    assert choice.r <= 1024
    assert choice.num_A == choice.num_B
    assert choice.num_B > 2
    assert choice.parameters > 0.97 * lora_parameters(QV, 900)
    assert any("more than the usual 2" in sentence for sentence in choice.reason)


def test_a_budget_beyond_all_use_stops_at_full_rank_and_says_so() -> None:
    choice = choose(stack(2, q_proj=(8, 8)), parameters=10**6)
    assert choice.r == 8
    assert "smallest side of q_proj (8, 8)" in choice.reason[-1]


def test_a_narrow_target_that_holds_the_rank_down_is_named_with_the_fix() -> None:
    modules = [*stack(12, fc1=(64, 128)), ModuleSpec("classifier", 64, 2)]
    choice = choose(modules, match_lora=8)
    assert choice.r == 2
    assert "exclude classifier (exclude_modules)" in choice.reason[-1]
    assert choose(modules[:-1], match_lora=8).r > 8


def test_a_small_budget_shares_more_before_it_gives_up() -> None:
    least = total(MLP, r=1, num_A=1, num_B=1)
    choice = choose(MLP, parameters=least)
    assert choice.options == {"r": 1, "num_A": 1, "num_B": 1}
    assert any("fewer than the usual 2" in sentence for sentence in choice.reason)


def test_too_small_a_budget_names_the_smallest_that_works() -> None:
    least = total(MLP, r=1, num_A=1, num_B=1)
    with pytest.raises(LilyError, match=f"{least:,}"):
        choose(MLP, parameters=least - 1)
    with pytest.raises(LilyError, match="leave r free"):
        choose(MLP, parameters=least, r=2)


def test_a_rank_and_a_budget_leave_the_sharing_to_be_chosen() -> None:
    choice = choose(MLP, parameters=10_000_000, r=32)
    finer = {"r": 32, "num_A": choice.num_A + 1, "num_B": choice.num_B + 1}  # type: ignore[operator]
    assert choice.parameters <= 10_000_000 < total(MLP, routing="token", **finer)


def test_without_a_budget_the_rank_is_the_default() -> None:
    assert choose(MLP).options == {"r": 32, "num_A": 2, "num_B": 2}
    assert choose(stack(12, q_proj=(16, 64))).r == 16


def test_names_that_a_target_list_tells_apart_are_counted_apart() -> None:
    modules = [ModuleSpec(f"layers.{i}.{part}.proj", 64, 64) for i in range(8) for part in ("attn", "mlp")]
    targets = ["proj", "attn.proj"]
    choice = choose(modules, parameters=50_000, targets=targets)
    assert choice.parameters == total(modules, target_modules=targets, routing="token", **choice.options) <= 50_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 10**6, "match_lora": 4}, "parameters and match_lora"),
        ({"num_A": 2, "stride_A": 2}, "num_A and stride_A"),
        ({"r": 0}, "r=0"),
        ({"num_B": -1}, "num_B=-1"),
        ({"parameters": 1.5}, r"parameters=1\.5"),
        ({"routing": "mean"}, "routing='mean'"),
    ],
)
def test_values_that_cannot_work_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(LilyError, match=message):
        choose(MLP, **options)  # type: ignore[arg-type]


def test_every_choice_explains_itself_in_sentences() -> None:
    for options in ({}, {"match_lora": 16}, {"parameters": 10**6, "num_B": 3}, {"r": 4096}, {"stride_A": 7, "r": 8}):
        reason = choose(MLP, **options).reason
        assert reason
        assert all(sentence.endswith(".") for sentence in reason)


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS)
def test_multiply_adds_are_those_that_the_matrix_products_have(routing: str) -> None:
    i, o, r, E, layers, batch, tokens = 24, 40, 6, 3, 4, 2, 10
    modules = stack(layers, q_proj=(i, o))
    plan = build_plan(modules, LilyConfig(r=r, num_A=2, num_B=E, routing=routing))
    cost = estimate(plan, modules, batch=batch, tokens=tokens).compute

    x, A, R, B = torch.ones(batch * tokens, i), torch.ones(r, i), torch.ones(E, r), torch.ones(E * r, o)

    def per_token(*shapes: tuple[torch.Tensor, torch.Tensor]) -> int:
        return layers * sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b in shapes) // (batch * tokens)

    h = x @ A.T
    assert cost.base == per_token((x, torch.ones(i, o)))
    assert cost.down == per_token((x, A.T))
    assert cost.router == (per_token((h, R.T)) if routing in ("batch", "sequence", "token") else 0)
    assert cost.expand_first == per_token((h.repeat(1, E), B))
    assert cost.combine_first == per_token((h, B[:r]))
    assert cost.combine == layers * B.numel()
    assert cost.share == min(cost.share_expand_first, cost.share_combine_first)
    assert cost.form == ("expand-first" if routing == "token" else "combine-first")


def test_one_expert_needs_no_router_and_no_combination() -> None:
    modules = stack(4, q_proj=(24, 40))
    cost = estimate(build_plan(modules, LilyConfig(r=6, num_A=2, num_B=1)), modules).compute
    assert (cost.router, cost.combine) == (0, 0)
    assert cost.share_expand_first == cost.share_combine_first
    assert math.isclose(cost.share, 6 * (24 + 40) / (24 * 40))


def test_file_and_memory_follow_the_stated_formulas() -> None:
    plan = build_plan(QV, LilyConfig(r=8, num_A=2, num_B=2, routing="token"))
    trained = plan.parameters.total
    cost = estimate(plan, QV, batch=3, tokens=5, base_parameters=10**9, weight_bytes=2)
    assert cost.checkpoint_bytes == 4 * trained
    assert cost.memory.weights == 2 * 10**9
    assert cost.memory.adapter == 16 * trained
    wide = sum(m.in_features + m.out_features for m in QV)
    assert cost.memory.activations == 15 * (2 * wide + 4 * len(QV) * (8 + 2))
    assert cost.memory.total == cost.memory.weights + cost.memory.adapter + cost.memory.activations


def test_estimates_refuse_an_empty_batch() -> None:
    plan = build_plan(QV, LilyConfig())
    with pytest.raises(LilyError, match="tokens=0"):
        estimate(plan, QV, tokens=0)
