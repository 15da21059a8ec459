"""The sections of a recipe that say how a model is adapted: `lily`, `lora` and `peft`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from lily.recipes.spec import values
from lily.recipes.spec.base import Count, Fraction, Positive, PositiveInt, Section
from lily.recipes.spec.data import GeneralText

MethodName = Literal["lily", "stock-lily", "lora", "rslora", "dora", "peft", "none"]
Activation = Literal["none", "relu", "gelu", "silu"]
Distinct = Literal["none", "permute", "signs", "permute+signs"]
Gain = Literal["none", "ones", "signs", "half-signs"]


class NullSpace(GeneralText):
    """Texts whose main directions no A reads, so that training changes less there; see `lily.null_space`."""

    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of the inputs' squared norm that these directions hold."
    )


class Settle(Section):
    """When a data-dependent routing becomes static, as fractions of training; see `lily.SettleCallback`."""

    start: Fraction = Field(0.6, description="Until here the routing does not change.")
    end: Fraction = Field(0.8, description="From here the routing is static, and training continues.")


class Group(Section):
    """Options for layers of one name; default: those of the section lily."""

    r: PositiveInt | None = None
    num_A: PositiveInt | None = None
    stride_A: PositiveInt | None = None
    num_B: PositiveInt | None = None
    scaling: Positive | None = None
    dropout: Fraction | None = None
    activation: Activation | None = None
    distinct: Distinct | None = None
    gain: Gain | None = None
    own_r: Count | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, without the rank, as `LilyConfig.group_options`."""
        return self.model_dump(exclude_none=True, exclude={"r"})


class Lily(Section):
    """Options of Lily, most with the names of `lily.LilyConfig`. `params` replaces r, num_A and num_B."""

    preset: Literal["paper"] | None = Field(
        None, description="`paper`: the method as published, where nothing else is given; see `LilyConfig.paper`."
    )
    params: str | int | None = Field(None, description="Parameter budget such as 1.2M; sets r, num_A and num_B.")
    fewest: PositiveInt | None = Field(
        None,
        description="Least num_A and num_B that `params` chooses, where they fit. Default: 2, and 1 where layers are "
        "distinct and `params` is below the size of LoRA of rank 4.",
    )
    r: PositiveInt | None = None
    num_A: PositiveInt | None = None
    stride_A: PositiveInt | None = None
    num_B: PositiveInt | None = None
    scaling: Positive | None = Field(None, description="Default: by the rank; see `lily.functional.default_scaling`.")
    routing: Literal["batch", "sequence", "token", "static", "uniform"] | None = Field(
        None, description="Default: token for causal models, sequence otherwise."
    )
    batch_scope: Literal["local", "global"] = Field(
        "local",
        description="For batch routing on several processes: average over the rows of each process, or over all.",
    )
    dropout: Fraction = 0.0
    activation: Activation = "none"
    slices: dict[str, list[str] | dict[str, list[int]]] | None = Field(
        None,
        description="Parts of a fused projection: `{qkv: [k, v]}`; if the layout is not built in, start and stop of "
        "the outputs (and the period if they repeat): `{qkv: {v: [1536, 2304]}}`.",
    )
    parallel: list[str] | None = Field(None, description="Modules with an adapter in parallel, such as [mlp].")
    groups: dict[str, Group] | None = Field(
        None, description="Options by layer name: `{mlp: {r: 64, activation: relu}}`."
    )
    shared_router: bool = Field(False, description="One router for all layers of a group, instead of one per layer.")
    distinct: Distinct | None = Field(
        None,
        description="A fixed permutation and signs of the rank coordinates of each layer, without parameters. Default: "
        "permute; none with batch routing, the published method's.",
    )
    distinct_seed: Count = Field(0, description="Which permutations and signs.")
    gain: Gain = Field("none", description="A learned gain on each rank of each layer, and where it starts.")
    own_r: Count = Field(0, description="Rank of an A and B of each layer's own, beside the shared ones.")
    init_weights: bool | Literal["orthonormal", "data"] = Field(
        True,
        description="How A starts: Kaiming-uniform (true), with orthogonal rows, or with the main directions of its "
        "layers' inputs on the first training batches (data). false starts B at random too.",
    )
    null_space: NullSpace | None = Field(None, description="Keep A out of what general text uses, against forgetting.")
    settle: Settle | None = Field(None, description="Make the routing static during training, to merge exactly.")
    learning_rate: Positive | None = Field(None, description="Replaces train.learning_rate.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "paper":
            return values
        from lily.plan.options import PAPER  # imports PEFT

        return {**PAPER, **values}

    @model_validator(mode="after")
    def _budget_or_shape(self) -> Lily:
        if self.params is not None and any(v is not None for v in (self.r, self.num_A, self.stride_A, self.num_B)):
            raise ValueError(
                "params chooses r, num_A and num_B; give either params or those (`r: null` drops an inherited one)"
            )
        if self.fewest is not None and self.params is None:
            raise ValueError("fewest is for what params chooses; remove it, or give num_A and num_B")
        return self


class Lora(Section):
    """PEFT's LoRA, also for the methods `rslora` and `dora`."""

    r: PositiveInt | Literal["equal"] = Field(
        "equal", description="Rank, or `equal`: the largest rank with no more parameters than the section lily."
    )
    alpha: Positive | None = Field(
        None, description="Default: 2 * r, so the scale is 2; for rslora, whose scale is alpha / sqrt(r), 16."
    )
    dropout: Fraction = 0.0
    learning_rate: Positive | None = Field(None, description="Replaces train.learning_rate.")


class Peft(Section):
    """Any method of PEFT (`method: peft`): its type, and the options of its configuration class."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: str | None = Field(None, description="PEFT's name of the method, such as VERA, LOHA or IA3.")
    r: PositiveInt | Literal["equal"] | None = Field(
        None, description="Rank, or `equal`: the largest with no more parameters than the section lily. Default: "
        "equal if the method's size grows with its rank, else PEFT's default.",
    )  # fmt: skip
    learning_rate: Positive | None = Field(None, description="Replaces train.learning_rate.")

    @property
    def options(self) -> dict[str, Any]:
        """All other keys, which PEFT's class validates."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _plain_options(self) -> Peft:
        for name, value in self.options.items():
            if wrong := values.untyped(value):
                raise ValueError(f"{name}: {wrong}")
        return self
