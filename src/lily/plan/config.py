"""`LilyConfig`: every option of the method, validated where it is written down."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from typing import Any

import peft
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType, TaskType

from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.plan.config_checks import check
from lily.plan.options import DYNAMIC, OPTIONS, Options, sharing

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
            and stop among the outputs, and a period where heads repeat); see `lily.plan.fused_layouts`. The layers need
            not be in `target_modules` too.
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
        # Values that only a model can settle: see `lily.tuner.model`.
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
        check(self)
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
        return Options(**{**values, **(sharing(own[max(fitting, key=len)]) if fitting else {})})

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
