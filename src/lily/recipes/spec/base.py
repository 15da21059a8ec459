"""What every section of a recipe has in common: strict reading of values, and the types of single values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator

from lily.recipes.spec import values
from lily.recipes.spec.locations import KeyLocations

if TYPE_CHECKING:
    from typing_extensions import Self

Task = Literal["text-classification", "text-regression", "sft", "image-classification"]
CLASSIFYING = ("text-classification", "image-classification")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Field(description="auto: bfloat16 autocast if the hardware supports it (CUDA, AVX512-BF16, AMX), else float32."),
]
BRatio = Annotated[
    float,
    Field(gt=0, description="LoRA+'s ratio: multiple of the learning rate for B, of Lily and of LoRA alike."),
]
RouterRatio = Annotated[
    float, Field(gt=0, description="Multiple of the learning rate for routers and static weights of Lily.")
]
CHOSEN_BY = Field(
    "",
    description="What chose the learning rates and scales in which methods differ: a search, a paper. Without it, "
    "differences that the recipe does not have for every method are warned of.",
)
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Delimiter = Annotated[str, AfterValidator(values.delimiter)]
Encoding = Annotated[str, AfterValidator(values.encoding)]


class Section(BaseModel):
    """Base of every section of a recipe: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic alone would take true for 1 and 010 for 10."""
        if wrong := values.misread(value, cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(wrong)
        return value


class RecipeBase(Section):
    """Base of recipes of every kind: they know where their keys were written."""

    _locations: KeyLocations = PrivateAttr(default_factory=KeyLocations)

    @property
    def locations(self) -> KeyLocations:
        """File and line of each key; empty for a recipe that was not read from a file."""
        return self._locations

    def written_at(self, locations: KeyLocations) -> Self:
        """The same recipe with these locations."""
        copy = self.model_copy()
        copy._locations = locations
        return copy
