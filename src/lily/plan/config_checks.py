"""Validation of a `LilyConfig` that needs no model. Untyped, so that `config` alone imports the other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lily.errors import LilyError
from lily.plan.options import ACTIVATIONS, BIASES, DISTINCT, DYNAMIC, GAINS, OPTIONS, ROUTINGS, STARTS, Options, sharing

TARGETS_HINT = "name modules such as ['q_proj', 'v_proj'], or 'all-linear'"


def check(c: Any) -> None:
    """Validate and normalize every field of a `LilyConfig`.

    Raises:
        LilyError: for the first value or combination that cannot work, with the fix.
    """
    _check_int("r", c.r, "a positive integer such as 32")
    _check_options(c)
    _check_choice("routing", c.routing, ROUTINGS)
    _check_choice("batch_scope", c.batch_scope, ("local", "global"))
    if c.batch_scope == "global" and c.routing != "batch":
        raise LilyError(
            f"batch_scope='global' is for routing='batch', but routing={c.routing!r} does not look at other samples; "
            "remove batch_scope"
        )
    _check_choice("bias", c.bias, BIASES)
    _check_count("distinct_seed", c.distinct_seed, "an integer of at least 0")
    if c.settled is not None:
        _check_number("settled", c.settled)
        if not 0 <= c.settled <= 1:
            raise LilyError(f"settled={c.settled} is not a share; give a number from 0 (dynamic) to 1 (static)")
    if c.adapted_layers is not None and not (
        isinstance(c.adapted_layers, dict) and all(type(n) is int for n in c.adapted_layers.values())
    ):
        raise LilyError(
            f"adapted_layers={c.adapted_layers!r} is not valid; it is set when files are written: remove it"
        )
    if c.provenance is not None and not isinstance(c.provenance, dict):
        raise LilyError(f"provenance={c.provenance!r} is not valid; it is set when files are written: remove it")
    if not isinstance(c.init_weights, bool) and c.init_weights not in STARTS:
        raise LilyError(
            f"init_weights={c.init_weights!r} is not known; give True (B starts at zero), False, "
            f"{' or '.join(repr(start) for start in STARTS)}"
        )
    _check_names(c)
    _check_rows(c)
    _check_parameters(c)
    _check_slices(c)
    _check_parallel(c)
    _check_group_options(c)
    _check_settled(c)
    _check_layers(c)
    _check_pattern(c, "rank_pattern", 16, partial(_check_int, expected="a positive integer such as 16"))
    _check_pattern(c, "scaling_pattern", 1.0, _check_scaling)


def _check_int(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LilyError(f"{name}={value!r} is not valid; give {expected}")


def _check_count(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise LilyError(f"{name}={value!r} is not valid; give {expected}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        example = 1.0 if name.startswith("scaling") else 0.1
        raise LilyError(f"{name}={value!r} is not a finite number; give a number such as {example}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LilyError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def _check_names(c: Any) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(c, name)
        if value is None:
            continue
        if isinstance(value, str):
            if not value and name == "target_modules":
                raise LilyError(f"target_modules is empty; {TARGETS_HINT}")
            if value != "all-linear":
                _check_regex(name, value)
        elif not isinstance(value, (list, tuple, set)) or not all(isinstance(v, str) and v for v in value):
            raise LilyError(
                f"{name}={value!r} is not valid; give a list of module names, a regular expression or 'all-linear'"
            )
        elif name == "target_modules" and not value and not c.target_parameters:
            raise LilyError(f"target_modules is empty; {TARGETS_HINT}")
    if c.modules_to_save is not None and not _is_names(c.modules_to_save):
        raise LilyError(f"modules_to_save={c.modules_to_save!r} is not a list of names; write ['classifier']")


def _check_rows(c: Any) -> None:
    if not isinstance(c.ensure_weight_tying, bool):
        raise LilyError(f"ensure_weight_tying={c.ensure_weight_tying!r} is not a bool; give True or False")
    rows = c.trainable_token_indices
    if rows is None:
        return
    by_layer = rows if isinstance(rows, Mapping) else {"": rows}
    for name, indices in by_layer.items():
        well_formed = isinstance(indices, (list, tuple)) and all(type(i) is int and i >= 0 for i in indices)
        if not isinstance(name, str) or not well_formed or not indices or len(set(indices)) < len(indices):
            raise LilyError(
                f"trainable_token_indices={rows!r} is not valid; give the ids of tokens, each once, such as "
                "[128, 129], or {'embed_tokens': [128, 129]}"
            )
    # plain types, so that a configuration equals its copy read back from a file
    plain = {name: list(indices) for name, indices in by_layer.items()}
    c.trainable_token_indices = (plain if isinstance(rows, Mapping) else plain[""]) or None


def _check_parameters(c: Any) -> None:
    if c.target_parameters is None:
        return
    if not _is_names(c.target_parameters):
        raise LilyError(
            f"target_parameters={c.target_parameters!r} is not a list of names; write ['experts.gate_up_proj', "
            "'experts.down_proj']"
        )
    c.target_parameters = sorted(set(c.target_parameters)) or None
    if c.target_parameters is None:
        return
    apart = "or train the parameters with a second, separate adapter"
    if c.num_B > 1 and c.routing in DYNAMIC:
        raise LilyError(
            f"routing={c.routing!r} depends on tokens, which cannot be observed at target_parameters; use "
            f"routing='static' (the default with target_parameters), 'uniform' or num_B=1, {apart}"
        )
    if c.activation != "none" or c.dropout:
        wrong, fix = ("activation", "'none'") if c.activation != "none" else ("dropout", "0")
        raise LilyError(
            f"{wrong}={getattr(c, wrong)!r} acts on hidden states, and target_parameters have none: their update is "
            f"added to the weight; use {wrong}={fix}, {apart}"
        )


def _check_slices(c: Any) -> None:
    if c.target_slices is None:
        return
    well_formed = isinstance(c.target_slices, Mapping) and all(
        isinstance(name, str) and name and slices and isinstance(slices, (Mapping, list, tuple, set))
        and all(isinstance(part, str) and part and "." not in part for part in slices)
        for name, slices in c.target_slices.items()
    )  # fmt: skip
    if not well_formed:
        raise LilyError(
            f"target_slices={c.target_slices!r} is not valid; write {{'qkv': ['k', 'v']}}, or where the layout is not "
            "known {'qkv': {'v': [1536, 2304]}}"
        )
    # plain types, so that a configuration equals its copy read back from a file
    plain = {k: dict(v) if isinstance(v, Mapping) else sorted(v) for k, v in c.target_slices.items()}
    c.target_slices = plain or None


def _check_parallel(c: Any) -> None:
    if c.parallel_modules is not None and not _is_names(c.parallel_modules):
        raise LilyError(f"parallel_modules={c.parallel_modules!r} is not a list of names; write ['mlp']")
    c.parallel_modules = sorted(set(c.parallel_modules or ())) or None


def _check_group_options(c: Any) -> None:
    if not isinstance(c.shared_router, bool):
        raise LilyError(f"shared_router={c.shared_router!r} is not a bool; give True or False")
    if c.shared_router and (c.routing not in DYNAMIC or c.settled is not None):
        why = f"routing={c.routing!r}" if c.routing not in DYNAMIC else "settling"
        raise LilyError(
            f"shared_router=True: with {why} each layer has separate weights and no router; remove shared_router"
        )
    if c.group_options is None:
        return
    if not isinstance(c.group_options, Mapping) or not all(
        isinstance(key, str) and key and isinstance(own, Mapping) for key, own in c.group_options.items()
    ):
        raise LilyError(f"group_options={c.group_options!r} is not valid; write {{'mlp': {{'activation': 'relu'}}}}")
    for key, own in c.group_options.items():
        if unknown := sorted(map(str, own.keys() - set(OPTIONS))):
            hint = "set ranks with rank_pattern; " if unknown[0] == "r" else ""
            raise LilyError(f"group_options[{key!r}] has {unknown[0]!r}; {hint}valid keys are {', '.join(OPTIONS)}")
        try:
            _check_options(Options(**{**{name: getattr(c, name) for name in OPTIONS}, **sharing(own)}))
        except LilyError as error:
            raise LilyError(f"group_options[{key!r}]: {error}") from None
    c.group_options = {key: dict(own) for key, own in c.group_options.items()} or None


def _check_settled(c: Any) -> None:
    if c.settled is None:
        return
    one_B = c.num_B == 1 and all(own.get("num_B", 1) == 1 for own in (c.group_options or {}).values())
    if one_B or c.routing not in DYNAMIC:
        why = "num_B=1 has no router" if one_B else f"routing={c.routing!r} is static already"
        raise LilyError(f"settled={c.settled}: {why}, so there is nothing to settle; remove settled")


def _check_options(c: Any) -> None:
    for name in ("stride_A", "num_A"):
        if getattr(c, name) is not None:
            _check_int(name, getattr(c, name), "a positive integer such as 2")
    if c.stride_A is not None and c.num_A is not None:
        raise LilyError(
            f"stride_A={c.stride_A} and num_A={c.num_A} say the same thing twice; give one of them, "
            "stride_A (layers per A) or num_A (A per group)"
        )
    _check_int("num_B", c.num_B, "a positive integer: 1 for one shared B without a router, 2 or more for experts")
    if c.scaling is not None:
        _check_scaling("scaling", c.scaling)
    _check_choice("activation", c.activation, ACTIVATIONS)
    _check_choice("distinct", c.distinct, DISTINCT)
    _check_choice("gain", c.gain, GAINS)
    _check_count("own_r", c.own_r, "the rank of each layer's own A and B, or 0 for none")
    _check_number("dropout", c.dropout)
    if not 0 <= c.dropout < 1:
        raise LilyError(f"dropout={c.dropout} is not a probability below 1; give a number in [0, 1) such as 0.1")


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(v, str) and v for v in value)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise LilyError(
            f"{name}={pattern!r} is not a regular expression ({error}); fix it, or give a list of module names"
        ) from None


def _check_layers(c: Any) -> None:
    indices = c.layers_to_transform
    if indices is not None:
        listed = indices if isinstance(indices, (list, tuple)) else [indices]
        if not listed or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed):
            raise LilyError(f"layers_to_transform={indices!r} is not valid; give layer indices such as [0, 1, 2]")
        if isinstance(c.target_modules, str):
            raise LilyError(
                f"layers_to_transform does not work with target_modules={c.target_modules!r}; "
                "give target_modules as a list of names, or put the layer numbers into the regular expression"
            )
    pattern = c.layers_pattern
    if pattern is not None and not isinstance(pattern, str) and not _is_names(pattern):
        raise LilyError(f"layers_pattern={pattern!r} is not valid; give the name of the layer list, such as 'layers'")
    if pattern and indices is None:
        raise LilyError("layers_pattern needs layers_to_transform; give both or neither")


def _check_pattern(c: Any, name: str, example: float, check_value: Callable[[str, object], None]) -> None:
    patterns = getattr(c, name)
    if not isinstance(patterns, dict):
        raise LilyError(f"{name}={patterns!r} is not valid; give a mapping such as {{'q_proj': {example}}}")
    for pattern, value in patterns.items():
        if not isinstance(pattern, str):
            raise LilyError(f"{name} has the key {pattern!r}; keys are module names or regular expressions")
        _check_regex(f"{name} key", pattern)
        check_value(f"{name}[{pattern!r}]", value)


def _check_scaling(name: str, value: object) -> None:
    _check_number(name, value)
    if value == 0:
        raise LilyError(f"{name}=0 switches the adapter off; give a number such as 1.0")
