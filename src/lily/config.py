"""`LilyConfig`: every option of the method, validated where it is written down."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import peft
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType, TaskType

from lily.errors import LilyError
from lily.files import write_text

ROUTINGS = ("batch", "sequence", "token", "static", "uniform")
DYNAMIC = ("batch", "sequence", "token")
ACTIVATIONS = ("none", "relu", "gelu", "silu")
TARGETS_HINT = "name modules such as ['q_proj', 'v_proj'], or 'all-linear'"
BIASES = ("none", "all", "lily_only")

# Written as the peft_type of adapters whose mathematics stock PEFT cannot express: PEFT without this package then
# refuses them (it names the missing method) where it would otherwise ignore unknown keys and compute batch routing.
EXTENDED_TYPE = "LILY_PEFT"

CAUSAL_TASKS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)


@dataclass
class LilyConfig(peft.LilyConfig):  # type: ignore[misc]
    """Configuration of a Lily adapter. Extends PEFT's own; a drop-in for `LoraConfig` where the names agree.

    Args:
        r: rank of the update of every layer; `A` is `(r, in_features)`. At LoRA's budget choose it several times
            larger than LoRA's (`lily plan` computes it).
        stride_A: how many consecutive layers of a group share one A. Default 1 (an A per layer).
        num_A: the other way to say it: how many A per group, `stride_A = ceil(layers / num_A)`. Not with `stride_A`.
        num_B: experts per group; all layers of the group share them. 1 means one shared B and no router.
        scaling: multiplies the update directly (there is no `alpha / r`). Finite and not zero.
        routing: what the expert weights depend on: `token`, `sequence`, `batch`, `static` or `uniform`. Default:
            `token` for causal models (`task_type` CAUSAL_LM or SEQ_2_SEQ_LM, or a model that is causal or a
            state-space model), else `sequence`; with `target_parameters`, `static`. A configuration written by stock
            PEFT has no such key and means `batch`, as does a plain `peft.LilyConfig`.
        batch_scope: what a batch is to `batch` routing when several processes train: `local`, the rows of each, as in
            stock PEFT; or `global`, the rows of all, by an exchange between them. For training only; not written to
            files.
        dropout: probability, on the hidden state of rank r, in [0, 1).
        activation: between A and B: `none`, `relu`, `gelu` or `silu`.
        target_modules: names (suffixes at a dot boundary), a regular expression, or `"all-linear"`. Default: by
            architecture, as for LoRA.
        exclude_modules: names or a regular expression to leave out.
        target_parameters: names of parameters to adapt (suffixes at a dot boundary), as LoRA has it: matrices, and the
            stacked weights of a mixture's experts, such as `experts.gate_up_proj`. Their update must be a matrix, so
            the routing is `static` (the default then) or `uniform`, or `num_B` is 1. `target_modules=[]` beside it
            means no layers; leaving it out means those of the architecture, where they are known.
        target_slices: layer -> which slices of its output to adapt, each with experts of its own, such as
            `{"qkv": ["k", "v"]}`; where the architecture's layout is not known, `{"qkv": {"v": [1536, 2304]}}` (start
            and stop among the outputs, and a period where heads repeat); see `lily.slices`. The layers need not be
            in `target_modules` too.
        parallel_modules: names (suffixes at a dot boundary) or classes of whole modules, such as `mlp` or `Mlp`, which
            an adapter runs beside: input -> A -> activation -> B, added to the module's output. For any module whose
            input and output share the leading dimensions; not merged or exported, since it is no matrix of the model.
        group_options: target -> options of its own, for layers of that name: `num_B`, `stride_A` or `num_A`,
            `scaling`, `dropout`, `activation`, such as `{"mlp": {"activation": "relu"}}`. Ranks: `rank_pattern`.
        shared_router: one router for all layers of a group, instead of one per layer (the paper's Vim). With a routing
            that looks at the data.
        layers_to_transform: layer indices to adapt; with names in `target_modules` only.
        layers_pattern: name of the layer list, with `layers_to_transform`.
        rank_pattern: rank for modules that match a name or regular expression. Ranks inside one group must agree.
        modules_to_save: modules trained and saved whole, such as a classification head.
        bias: which biases of the base train: `none`, `all` or `lily_only` (those of adapted layers).
        settled: how far a data-dependent routing has moved to static weights (0 to 1), for one that is to become
            static while it learns; see `lily.SettleCallback`, which also moves it. Default: it stays as it is.
        adapted_layers: last name -> how many adapted layers have it. In files that stock PEFT refuses; an adapter whose
            tensors are all shared fits a model of any depth otherwise. Not for users to give.
        provenance: what became of the adapter since it was trained, such as the report of its collapse; goes along with
            every file and export. Not for users to give.
        init_weights: True starts B at zero, so an untrained adapter changes nothing; False starts B at random.

    Raises:
        LilyError: (a ValueError) for any value or combination that cannot work, with the fix.
    """

    # None here, not stock's 1: `num_A` is the other way to say it, and which one was said must stay visible.
    stride_A: int | None = field(default=None, metadata={"help": "How many consecutive layers of a group share one A."})
    num_A: int | None = field(default=None, metadata={"help": "How many A per group; instead of `stride_A`."})
    routing: str | None = field(
        default=None, metadata={"help": "What expert weights depend on: token, sequence, batch, static or uniform."}
    )
    batch_scope: str = field(
        default="local", metadata={"help": "For batch routing on several processes: local or global."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the hidden state of rank r."})
    activation: str = field(default="none", metadata={"help": "Between A and B: none, relu, gelu or silu."})
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters to adapt, such as stacked weights of experts."}
    )
    target_slices: dict[str, Any] | None = field(
        default=None, metadata={"help": "Layer -> slices of its output to adapt, such as qkv: [k, v]."}
    )
    parallel_modules: list[str] | None = field(
        default=None, metadata={"help": "Names or classes of whole modules that an adapter runs beside."}
    )
    group_options: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Target -> options of its own, such as mlp: {activation: relu}."}
    )
    shared_router: bool = field(default=False, metadata={"help": "One router for all layers of a group."})
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "Rank for modules that match a name or regular expression."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases train: none, all or lily_only."})

    settled: float | None = field(
        default=None, metadata={"help": "How far a data-dependent routing has moved to static weights (0 to 1)."}
    )

    adapted_layers: dict[str, int] | None = field(
        default=None, metadata={"help": "Written to files: how many layers of each name the adapter was made for."}
    )

    provenance: dict[str, Any] | None = field(
        default=None, metadata={"help": "Written to files: what became of the adapter, such as its collapse report."}
    )

    def __post_init__(self) -> None:
        """Check and complete every value (stock's own `__post_init__` refuses values that are legal here)."""
        PeftConfig.__post_init__(self)
        from_file = (
            getattr(self, "peft_type", None) is not None
        )  # only configurations read from a file carry their own type
        self.peft_type = PeftType.LILY
        if from_file and self.num_A is not None:
            self.stride_A = None  # written beside num_A for stock readers; see `file_dict`
        # Values that only a model can settle: see `lily.model`.
        self.routing_is_default = self.routing is None and not from_file
        self.stock_refusal: str | None = None
        self.resolved_stride: int | None = None
        self.portable_targets: set[str] | None = None
        self.layers_by_name: dict[str, int] | None = None
        self.stock_grouping = False
        if self.routing is None:
            self.routing = "batch" if from_file else self.default_routing(self.task_type in CAUSAL_TASKS)
        if self.stride_A is None and self.num_A is None:
            self.stride_A = 1
        self.rank_pattern = self.rank_pattern or {}
        _check(self)
        for name, more in (("target_modules", self.target_slices or ()), ("exclude_modules", ())):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or more):
                setattr(self, name, {*(value or ()), *more})

    def default_routing(self, causal: bool) -> str:
        """What the routing is where none is asked for, on a model that is `causal` or not."""
        return "static" if self.target_parameters else "token" if causal else "sequence"

    @property
    def dynamic(self) -> bool:
        """Whether the expert weights depend on the data, so that the adapter cannot be merged as it is."""
        routed = self.num_B > 1 or any(own.get("num_B", 1) > 1 for own in (self.group_options or {}).values())
        return routed and self.routing in DYNAMIC and self.settled != 1

    def options_of(self, group: str) -> Options:
        """The options that hold for the layers of a group.

        Args:
            group: its name in the plan, such as `q_proj` or `qkv.v`.
        """
        own = self.group_options or {}
        fitting = [key for key in own if group == key or group.endswith(f".{key}")]
        values = {name: getattr(self, name) for name in OPTIONS}
        return Options(**{**values, **(_sharing(own[max(fitting, key=len)]) if fitting else {})})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build a configuration from a file's keys; those of the paper's repository are understood too."""
        return super().from_peft_type(**_from_paper(kwargs))

    @classmethod
    def from_stock(cls, config: peft.LilyConfig) -> LilyConfig:
        """The adapter that a plain `peft.LilyConfig` describes: batch routing, layers grouped as stock groups them."""
        if isinstance(config, cls):
            return config
        values = {f.name: getattr(config, f.name) for f in fields(config)}
        ours = cls(**{**values, "peft_type": None, "routing": "batch"})
        ours.stock_grouping = True
        return ours

    def file_dict(self) -> dict[str, Any]:
        """What is written to `adapter_config.json`: readable by stock PEFT where it can express the adapter."""
        values: dict[str, Any] = self.to_dict()
        if self.settled == 1:
            values.update(routing="static", settled=None)
        values["target_modules"] = self.portable_targets or self.target_modules
        for key, value in values.items():
            if isinstance(value, set):
                values[key] = sorted(value)
        values["peft_type"] = PeftType.LILY.value
        del values["batch_scope"]
        refusal = self.stock_refusal or stock_refusal(self)
        if refusal is not None:
            values["peft_type"] = EXTENDED_TYPE
            values["adapted_layers"] = self.layers_by_name or self.adapted_layers
        else:  # every layer has a router in the file, and stock would warn of the keys
            del values["adapted_layers"], values["provenance"]
            if self.stride_A is None:
                values["stride_A"] = self.resolved_stride
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, atomically.

        Args:
            save_directory: created when missing.
            kwargs: `auto_mapping_dict`, as PEFT passes it.

        Raises:
            LilyError: if `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise LilyError(f"cannot save to {save_directory}: it is a file; name a folder")
        os.makedirs(save_directory, exist_ok=True)
        values = self.file_dict()
        if (mapping := kwargs.get("auto_mapping_dict")) is not None:
            values["auto_mapping"] = mapping
        write_text(os.path.join(save_directory, CONFIG_NAME), json.dumps(values, indent=2, sort_keys=True))


OPTIONS = ("num_B", "stride_A", "num_A", "scaling", "dropout", "activation")


@dataclass(frozen=True)
class Options:
    """What may differ from one group of layers to another; see `LilyConfig` for each."""

    num_B: int
    stride_A: int | None
    num_A: int | None
    scaling: float
    dropout: float
    activation: str


def stock_refusal(config: LilyConfig) -> str | None:
    """Why stock PEFT would compute something else from this configuration, or None if it would not.

    The sharing itself can be a further reason; `lily.plan` knows that one.
    """
    if config.num_B == 1:
        return "num_B=1"
    if config.settled is not None:
        return "a routing that is settling"
    if config.routing != "batch":
        return f"routing={config.routing}"
    if config.activation != "none":
        return f"activation={config.activation}"
    if config.rank_pattern:
        return "rank_pattern"
    if config.bias != "none":
        return f"bias={config.bias}"
    if config.target_parameters:
        return "target_parameters"
    for name in ("target_slices", "parallel_modules", "group_options", "shared_router"):
        if getattr(config, name):
            return name
    if config.stride_A is None and config.resolved_stride is None:
        return "num_A with groups of different sizes"
    return None


def _from_paper(values: dict[str, Any]) -> dict[str, Any]:
    """Translate the option names of the paper's repository; anything else is returned unchanged."""
    if not {"ne_1", "ne_2"} & values.keys():
        return values
    names = {"ne_1": "num_A", "ne_2": "num_B", "lily_s": "scaling", "lily_dropout": "dropout"}
    out = {names.get(key, key): value for key, value in values.items() if value is not None}
    out["routing"] = "uniform" if out.pop("monoscale", False) else "batch"
    return out


def _check(c: LilyConfig) -> None:
    _check_int("r", c.r, "a positive integer such as 32")
    _check_options(c)
    _check_choice("routing", c.routing, ROUTINGS)
    _check_choice("batch_scope", c.batch_scope, ("local", "global"))
    if c.batch_scope == "global" and c.routing != "batch":
        raise LilyError(
            f"batch_scope='global' is for routing='batch', but routing={c.routing!r} does not look at other samples; "
            "leave it out"
        )
    _check_choice("bias", c.bias, BIASES)
    if c.settled is not None:
        _check_number("settled", c.settled)
        if not 0 <= c.settled <= 1:
            raise LilyError(f"settled={c.settled} is not a share; give a number from 0 (dynamic) to 1 (static)")
        if c.num_B == 1 or c.routing not in DYNAMIC:
            why = "num_B=1 has no router" if c.num_B == 1 else f"routing={c.routing!r} is static already"
            raise LilyError(f"settled={c.settled}: {why}, so there is nothing to settle; leave it out")
    if c.adapted_layers is not None and not (
        isinstance(c.adapted_layers, dict) and all(type(n) is int for n in c.adapted_layers.values())
    ):
        raise LilyError(f"adapted_layers={c.adapted_layers!r} is not valid; it is written to files, leave it out")
    if c.provenance is not None and not isinstance(c.provenance, dict):
        raise LilyError(f"provenance={c.provenance!r} is not valid; it is written to files, leave it out")
    if not isinstance(c.init_weights, bool):
        raise LilyError(f"init_weights={c.init_weights!r} is not a bool; give True (B starts at zero) or False")
    _check_names(c)
    _check_parameters(c)
    _check_slices(c)
    _check_parallel(c)
    _check_group_options(c)
    _check_layers(c)
    _check_rank_pattern(c)


def _check_int(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LilyError(f"{name}={value!r} is not valid; give {expected}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LilyError(
            f"{name}={value!r} is not a finite number; give a number such as {1.0 if name == 'scaling' else 0.1}"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise LilyError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def _check_names(c: LilyConfig) -> None:
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


def _check_parameters(c: LilyConfig) -> None:
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
    apart = "or train the parameters with an adapter of their own, as a second one"
    if c.num_B > 1 and c.routing in DYNAMIC:
        raise LilyError(
            f"routing={c.routing!r} looks at tokens, and those that reach target_parameters are not seen; use "
            f"routing='static' (the default with target_parameters), 'uniform' or num_B=1, {apart}"
        )
    if c.activation != "none" or c.dropout:
        wrong, fix = ("activation", "'none'") if c.activation != "none" else ("dropout", "0")
        raise LilyError(
            f"{wrong}={getattr(c, wrong)!r} acts on hidden states, and target_parameters have none: their update is "
            f"added to the weight; use {wrong}={fix}, {apart}"
        )


def _check_slices(c: LilyConfig) -> None:
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
    # as a file has them, so that a configuration and its own copy from a file are equal
    plain = {k: dict(v) if isinstance(v, Mapping) else sorted(v) for k, v in c.target_slices.items()}
    c.target_slices = plain or None


def _check_parallel(c: LilyConfig) -> None:
    if c.parallel_modules is not None and not _is_names(c.parallel_modules):
        raise LilyError(f"parallel_modules={c.parallel_modules!r} is not a list of names; write ['mlp']")
    c.parallel_modules = sorted(set(c.parallel_modules or ())) or None


def _check_group_options(c: LilyConfig) -> None:
    if not isinstance(c.shared_router, bool):
        raise LilyError(f"shared_router={c.shared_router!r} is not a bool")
    if c.shared_router and (c.routing not in DYNAMIC or c.settled is not None):
        why = f"routing={c.routing!r}" if c.routing not in DYNAMIC else "settling"
        raise LilyError(
            f"shared_router=True: with {why} each layer has weights of its own, and no router; leave shared_router out"
        )
    if c.group_options is None:
        return
    if not isinstance(c.group_options, Mapping) or not all(
        isinstance(key, str) and key and isinstance(own, Mapping) for key, own in c.group_options.items()
    ):
        raise LilyError(f"group_options={c.group_options!r} is not valid; write {{'mlp': {{'activation': 'relu'}}}}")
    for key, own in c.group_options.items():
        if unknown := sorted(map(str, own.keys() - set(OPTIONS))):
            hint = "ranks are given by rank_pattern; " if unknown[0] == "r" else ""
            raise LilyError(f"group_options[{key!r}] has {unknown[0]!r}; {hint}it may have {', '.join(OPTIONS)}")
        try:
            _check_options(Options(**{**{name: getattr(c, name) for name in OPTIONS}, **_sharing(own)}))
        except LilyError as error:
            raise LilyError(f"group_options[{key!r}]: {error}") from None
    c.group_options = {key: dict(own) for key, own in c.group_options.items()} or None


def _sharing(own: Mapping[str, Any]) -> dict[str, Any]:
    return {"stride_A": None, "num_A": None, **own} if {"stride_A", "num_A"} & own.keys() else dict(own)


def _check_options(c: LilyConfig | Options) -> None:
    for name in ("stride_A", "num_A"):
        if getattr(c, name) is not None:
            _check_int(name, getattr(c, name), "a positive integer such as 2")
    if c.stride_A is not None and c.num_A is not None:
        raise LilyError(
            f"stride_A={c.stride_A} and num_A={c.num_A} say the same thing twice; give one of them, "
            "stride_A (layers per A) or num_A (A per group)"
        )
    _check_int("num_B", c.num_B, "a positive integer: 1 for one shared B without a router, 2 or more for experts")
    _check_number("scaling", c.scaling)
    if c.scaling == 0:
        raise LilyError("scaling=0 switches the adapter off; give a number such as 1.0")
    _check_choice("activation", c.activation, ACTIVATIONS)
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


def _check_layers(c: LilyConfig) -> None:
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


def _check_rank_pattern(c: LilyConfig) -> None:
    if not isinstance(c.rank_pattern, dict):
        raise LilyError(f"rank_pattern={c.rank_pattern!r} is not valid; give a mapping such as {{'q_proj': 16}}")
    for pattern, rank in c.rank_pattern.items():
        if not isinstance(pattern, str):
            raise LilyError(f"rank_pattern has the key {pattern!r}; keys are module names or regular expressions")
        _check_regex("rank_pattern key", pattern)
        _check_int(f"rank_pattern[{pattern!r}]", rank, "a positive integer such as 16")
