"""`LilyConfig`: every option of the method, validated when it is created."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import peft
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType, TaskType
from peft.utils.other import get_pattern_key

from lily.errors import LilyError
from lily.functional import default_scaling
from lily.io.atomic import write_text
from lily.plan import lora_options
from lily.plan.config_checks import check
from lily.plan.options import DYNAMIC, OPTIONS, PAPER, PATTERNS, Options, layer_patterns, sharing

# Written as the peft_type of adapters whose mathematics stock PEFT cannot express: PEFT without this package then
# refuses them (it names the missing method) where it would otherwise ignore unknown keys and compute batch routing.
EXTENDED_TYPE = "LILY_PEFT"

BY_RANK = "by rank"  # the default scale, in a file that was written before a model decided it

CAUSAL_TASKS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)


def _help_from_docstring(cls: type[Any]) -> type[Any]:
    """Set `metadata["help"]`, which every option of PEFT has, of the fields that `cls` declares from its docstring."""
    texts = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    for name, text in texts:
        if name in cls.__annotations__:
            cls.__dataclass_fields__[name].metadata = MappingProxyType({"help": " ".join(text.split())})
    return cls


def _answering_loras_options(cls: type[Any]) -> type[Any]:
    """Let `cls` answer options of LoRA's alone, where a dataclass raises a bare TypeError."""
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        lora_options.refuse(options)
        made(self, *args, **options)

    cls.__init__ = __init__
    return cls


@_help_from_docstring
@_answering_loras_options
@dataclass
class LilyConfig(peft.LilyConfig):  # type: ignore[misc]
    """Configuration of a Lily adapter. Extends PEFT's own; a drop-in for `LoraConfig` where the names agree.

    Args:
        r: rank of the update of every layer; `A` is `(r, in_features)`. At LoRA's budget choose it several times
            larger than LoRA's (`lily plan` computes it).
        stride_A: how many consecutive layers of a group share one A. Default 1 (an A per layer).
        num_A: how many A per group; instead of `stride_A`, which is then `ceil(layers / num_A)`.
        num_B: experts per group; all layers of the group share them. 1 means one shared B and no router.
        scaling: multiplies the update directly (there is no `alpha / r`). Finite and not zero. Default: by the rank
            of each layer, so that LoRA's learning rate at `lora_alpha = 2 r` is a good start for every shape (see
            `lily.functional.default_scaling`); a configuration from a file without the key means 1, as in stock PEFT.
        routing: what the expert weights depend on: `token`, `sequence`, `batch`, `static` or `uniform`. Default:
            `token` for `task_type` CAUSAL_LM and SEQ_2_SEQ_LM, for state-space models and for a model that is or
            holds a causal one, under any head; else `sequence`; with `target_parameters`, `static`. A configuration
            written by stock PEFT has no such key and means `batch`, as does a plain `peft.LilyConfig`.
        batch_scope: what `batch` routing averages over when several processes train: `local`, the rows of each
            process, as in stock PEFT; or `global`, the rows of all processes, by an all-reduce. For training only;
            not written to files.
        dropout: dropout probability on the hidden state of rank r, in [0, 1).
        activation: activation between A and B: `none`, `relu`, `gelu` or `silu`.
        target_modules: names (suffixes at a dot boundary), a regular expression, or `"all-linear"`. Default: by
            architecture, as for LoRA.
        exclude_modules: names or a regular expression of modules to leave out.
        target_parameters: names of parameters to adapt (suffixes at a dot boundary), as in LoRA: matrices, and the
            stacked weights of a mixture's experts, such as `experts.gate_up_proj`. Their update must be a matrix, so
            the routing is `static` (the default then) or `uniform`, or `num_B` is 1. With `target_modules=[]` no
            layers are adapted; without `target_modules`, those of the architecture, if it is known.
        target_slices: layer -> which slices of its output to adapt, each with separate experts, such as
            `{"qkv": ["k", "v"]}`; where the architecture's layout is not known, `{"qkv": {"v": [1536, 2304]}}` (start
            and stop among the outputs, and a period where heads repeat); see `lily.plan.fused_layouts`. The layers need
            not be in `target_modules` too.
        parallel_modules: names (suffixes at a dot boundary) or classes of whole modules, such as `mlp` or `Mlp`, with
            an adapter beside them: input -> A -> activation -> B, added to the module's output. For any module whose
            input and output share the leading dimensions; not merged or exported, since it is no matrix of the model.
        group_options: target -> options that differ for layers of that name: `num_B`, `stride_A` or `num_A`,
            `scaling`, `dropout`, `activation`, such as `{"mlp": {"activation": "relu"}}`. Ranks: `rank_pattern`.
        shared_router: one router for all layers of a group, instead of one per layer (the paper's Vim). With
            data-dependent routing only.
        layers_to_transform: layer indices to adapt; with names in `target_modules` only.
        layers_pattern: name of the layer list, with `layers_to_transform`; needed where the list is at the root of the
            model (`blocks.1.x`).
        rank_pattern: rank for modules that match a name or regular expression. Ranks inside one group must agree.
        scaling_pattern: scale for modules that match a name or regular expression, single layers too; in place of
            `scaling` and that of `group_options`. What `alpha_pattern` is for LoRA.
        modules_to_save: modules trained and saved whole, such as a classification head.
        trainable_token_indices: rows of the input embedding that train, such as those of new tokens, and nothing else
            of it; or layer -> rows. On a model with tied weights the output layer follows.
        ensure_weight_tying: on a model whose output layer has the weight of the input embedding, keep what is trained
            of the two tied, as in LoRA: a module in `modules_to_save`, and `trainable_token_indices`.
        bias: which biases of the base model train: `none`, `all` or `lily_only` (those of adapted layers).
        distinct: a fixed difference between the layers of a group, without parameters: `permute` the rank coordinates
            of each layer, flip their `signs`, or `permute+signs`. Derived from `distinct_seed` and the layer's place in
            its group (see `lily.functional.distinction`), so that files hold nothing for it; the first layer of a
            group is not changed. Default: `permute`, without which layers that share A and B write into the same
            directions; with `batch` routing, that of the published method, and in a configuration from a file without
            the key, `none`.
        distinct_seed: which permutations and signs `distinct` takes, and the signs at which `gain` starts.
        gain: a learned gain (r,) per layer on the rows of A: starting at `ones`, at `signs`, or at `half-signs` (the
            second half of the ranks). Default: `none`, as in the paper.
        own_r: rank of a pair of A and B that each layer has for itself, beside the shared ones (RaSA, arXiv
            2503.12576). Default: 0, as in the paper.
        settled: how far a data-dependent routing has moved to static weights (0 to 1), if it becomes static during
            training; set and moved by `lily.SettleCallback`. Default: the routing does not settle.
        adapted_layers: last name -> how many adapted layers have it. Written to files that stock PEFT refuses, because
            an adapter whose tensors are all shared would otherwise fit a model of any depth. Not set by users.
        provenance: what happened to the adapter after training, such as the report of its collapse; kept in every
            file and export. Not set by users.
        init_weights: how A and B start. True: A Kaiming-uniform and B at zero, so that an untrained adapter changes
            nothing. `orthonormal`: A with orthogonal rows. `data`: A with the top right singular vectors of its
            inputs, after `lily.initialize_from_data(model, dataloader)`. With both, B starts at zero. False: both at
            random.

    Raises:
        LilyError: (a ValueError) for any value or combination that cannot work, with the fix.
    """

    # None, where stock PEFT has 1: it must stay visible which of `stride_A` and `num_A` was set.
    stride_A: int | None = None
    num_A: int | None = None
    scaling: float | str | None = None
    routing: str | None = None
    batch_scope: str = "local"
    dropout: float = 0.0
    activation: str = "none"
    target_parameters: list[str] | None = None
    target_slices: dict[str, Any] | None = None
    parallel_modules: list[str] | None = None
    group_options: dict[str, dict[str, Any]] | None = None
    shared_router: bool = False
    distinct: str | None = None
    distinct_seed: int = 0
    gain: str = "none"
    own_r: int = 0
    init_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    scaling_pattern: dict[str, float] | None = field(default_factory=dict)
    bias: str = "none"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    settled: float | None = None
    adapted_layers: dict[str, int] | None = None
    provenance: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check and complete every value (stock's own `__post_init__` refuses values that are legal here)."""
        PeftConfig.__post_init__(self)
        from_file = getattr(self, "peft_type", None) is not None  # only configurations read from a file have a type yet
        self.peft_type = PeftType.LILY
        self.from_file = from_file
        if from_file and self.num_A is not None:
            self.stride_A = None  # written beside num_A for stock readers; see `file_dict`
        # Values that only a model can decide: see `lily.tuner.model`.
        self.routing_is_default = self.routing is None and not from_file
        self.stock_refusal: str | None = None
        self.resolved_stride: int | None = None
        self.portable_targets: set[str] | None = None
        self.layers_by_name: dict[str, int] | None = None
        self.stock_grouping = False
        self.modules_to_tie: set[str] | None = None
        if self.scaling is None and from_file:
            self.scaling = 1.0
        elif self.scaling == BY_RANK:
            self.scaling = None
        if self.routing is None:
            self.routing = "batch" if from_file else self.default_routing(self.task_type in CAUSAL_TASKS)
        if self.distinct is None:
            self.distinct = "none" if from_file or self.routing == "batch" else "permute"
        if self.stride_A is None and self.num_A is None:
            self.stride_A = 1
        self.rank_pattern, self.scaling_pattern = self.rank_pattern or {}, self.scaling_pattern or {}
        check(self)
        for name, more in (("target_modules", self.target_slices or ()), ("exclude_modules", ())):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or more):
                setattr(self, name, {*(value or ()), *more})

    def default_routing(self, causal: bool) -> str:
        """The routing where none is set, on a model that is `causal` or not."""
        return "static" if self.target_parameters else "token" if causal else "sequence"

    @property
    def dynamic(self) -> bool:
        """Whether the expert weights depend on the data, so that the adapter cannot be merged."""
        routed = self.num_B > 1 or any(own.get("num_B", 1) > 1 for own in (self.group_options or {}).values())
        return routed and self.routing in DYNAMIC and self.settled != 1

    def options_of(self, group: str) -> Options:
        """The options of the layers of a group.

        Args:
            group: the group's name in the plan, such as `q_proj` or `qkv.v`.
        """
        values = {name: getattr(self, name) for name in OPTIONS}
        return Options(**{**values, **sharing(self._own_of(group))})

    def scaling_of(self, group: str, layer: str) -> float:
        """The scale of one layer, by its full name, once `resolve_scaling` has decided the default."""
        patterns = self.scaling_pattern or {}
        scaling = patterns.get(get_pattern_key(patterns.keys(), layer), self.options_of(group).scaling)
        assert scaling is not None
        return float(scaling)

    def _own_of(self, group: str) -> dict[str, Any]:
        own = self.group_options or {}
        fitting = [key for key in own if _fits(key, group)]
        return own[max(fitting, key=len)] if fitting else {}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build a configuration from a file's keys, or from those of the paper's repository."""
        return super().from_peft_type(**_from_paper(kwargs))

    @classmethod
    def paper(cls, **options: Any) -> LilyConfig:
        """The method as published (section 3), without what this package adds to it.

        Args:
            options: as of the class; they come before those of the paper.
        """
        return cls(**{**PAPER, **options})

    def resolve_scaling(self, ranks: Sequence[tuple[str, Sequence[str], int]]) -> None:
        """Replace the default scale by numbers, which files keep.

        Args:
            ranks: (name, layers, rank of their updates) of each group, own ranks included.
        """
        if self.scaling is not None:
            return
        open_ = [
            (name, layers, default_scaling(rank))
            for name, layers, rank in ranks
            if self.options_of(name).scaling is None
        ]
        self.scaling = open_[0][2] if open_ else default_scaling(self.r + self.own_r)
        keys = layer_patterns(layer for _, layers, _ in ranks for layer in layers)
        for name, layers, own in open_:
            alike = {other for key, _, other in open_ if _fits(name, key)}
            if len(alike) > 1:  # groups of other shapes and ranks, whose options the name would set too
                self.scaling_pattern = {**(self.scaling_pattern or {}), **{keys[layer]: own for layer in layers}}
            elif own != self.scaling:
                mine = self.group_options or {}
                self.group_options = {**mine, name: {**(self._own_of(name)), "scaling": own}}

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
        """The contents of `adapter_config.json`: readable by stock PEFT where it can express the adapter."""
        values: dict[str, Any] = self.to_dict()
        if self.settled == 1:
            values.update(routing="static", settled=None)
        values["target_modules"] = self.portable_targets or self.target_modules
        for key, value in values.items():
            if isinstance(value, set):
                values[key] = sorted(value)
        values["peft_type"] = PeftType.LILY.value
        del values["batch_scope"]
        for key in (
            "trainable_token_indices",
            "ensure_weight_tying",
            "scaling_pattern",
        ):  # which stock PEFT would warn about
            if not values[key]:
                del values[key]
        refusal = self.stock_refusal or stock_refusal(self)
        if self.scaling is None:  # no model has decided it yet
            values["scaling"] = BY_RANK if refusal is not None else default_scaling(self.r)
        if refusal is not None:
            values["peft_type"] = EXTENDED_TYPE
            values["adapted_layers"] = self.layers_by_name or self.adapted_layers
        else:  # every layer has a router in the file, and stock PEFT would warn about the keys
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
        # Not `sort_keys`: in the patterns the first key that fits a layer counts.
        in_order = {key: values[key] for key in sorted(values)}
        write_text(os.path.join(save_directory, CONFIG_NAME), json.dumps(in_order, indent=2))


def _fits(key: str, group: str) -> bool:
    """Whether options under a key are those of a group."""
    return group == key or group.endswith(f".{key}")


def stock_refusal(config: LilyConfig) -> str | None:
    """Why stock PEFT would compute something else from this configuration, or None if it would not.

    The sharing itself can be a further reason; see `lily.checkpoint.stock`.
    """
    if config.num_B == 1:
        return "num_B=1"
    if config.settled is not None:
        return "a routing that is settling"
    if config.routing != "batch":
        return f"routing={config.routing}"
    if config.activation != "none":
        return f"activation={config.activation}"
    for name in PATTERNS:
        if getattr(config, name):
            return name
    if config.bias != "none":
        return f"bias={config.bias}"
    if config.target_parameters:
        return "target_parameters"
    for name in ("target_slices", "parallel_modules", "group_options", "shared_router", "trainable_token_indices",
                  "ensure_weight_tying", "own_r"):  # fmt: skip
        if getattr(config, name):
            return name
    for name in ("distinct", "gain"):
        if getattr(config, name) != "none":
            return f"{name}={getattr(config, name)}"
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
