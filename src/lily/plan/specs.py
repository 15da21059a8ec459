"""What can be adapted: the kinds of layers and parameters, and the matrix shape (out, in) of each.

The input of a convolution's matrix is the pixels under its kernel, that of an embedding a one-hot row, and each of the
fused experts of a mixture is a separate matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from lily.errors import LilyError
from lily.plan.fused_layouts import Rows

LINEAR, CONV1D, CONV2D, CONV3D, EMBEDDING = "linear", "conv1d", "conv2d", "conv3d", "embedding"
CONVOLUTIONS = (CONV1D, CONV2D, CONV3D)
SLICE = "slice"  # some outputs of a linear layer
PARALLEL_MODULE = "block"  # an adapter runs beside a whole module; the value stays, since JSON reports contain it
MATRIX, EXPERTS = "matrix", "experts"  # parameters: one matrix, or a stack of them
PARAMETERS = (MATRIX, EXPERTS)
UNSEEN = (EMBEDDING, *PARAMETERS)  # kinds whose input is an index, or is not visible
PARTS = (SLICE, MATRIX, EXPERTS)  # parts of a module, named <module>.<part>

CONV_CLASSES: dict[type[nn.Module], str] = {nn.Conv1d: CONV1D, nn.Conv2d: CONV2D, nn.Conv3d: CONV3D}

SUPPORTED = "nn.Linear (also quantized), GPT-2's Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and nn.Embedding"


@dataclass(frozen=True)
class ModuleSpec:
    """One thing to adapt: its dotted name in the model and its sizes.

    Attributes:
        name: name of the layer or parameter; of a slice `<layer>.<slice>`.
        in_features: columns of A.
        out_features: columns of B.
        kind: `linear`, `conv1d`, `conv2d`, `conv3d` or `embedding` for a layer; `slice` for some outputs of a linear
            one; `block` for a parallel module; `matrix` or `experts` for a parameter.
        kernel: kernel size of a convolution; its `in_features` are channels / groups * kernel size.
        experts: number of matrices that a parameter stacks; 1 for anything else.
        rows: outputs of the layer that a slice selects.
        conv_groups: groups of a convolution; 1 for anything else.
    """

    name: str
    in_features: int
    out_features: int
    kind: str = LINEAR
    kernel: tuple[int, ...] = ()
    experts: int = 1
    rows: Rows | None = None
    conv_groups: int = 1

    @property
    def reach(self) -> int:
        """Outputs that one rank reaches: all, or those of its group in a convolution."""
        return self.out_features // self.conv_groups

    @property
    def path(self) -> str:
        """Name of the module that gets the adapter: itself, or the module that a part belongs to."""
        return self.name.rpartition(".")[0] if self.kind in PARTS else self.name


def layer_spec(name: str, module: nn.Module) -> ModuleSpec:
    """A layer's kind and sizes, from its attributes.

    Raises:
        LilyError: if a layer of this kind cannot be adapted.
    """
    base = base_of(module)
    for cls, kind in CONV_CLASSES.items():
        if isinstance(base, cls):
            return _conv_spec(name, base, cls, kind)
    if isinstance(base, nn.Embedding):
        return ModuleSpec(name, base.num_embeddings, base.embedding_dim, EMBEDDING)
    sizes: tuple[int | None, int | None] = (None, None)
    if not isinstance(base, nn.MultiheadAttention):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sizes = _get_in_out_features(base)
        if any("Unsupported layer type" in str(w.message) for w in caught):
            sizes = (None, None)
    if sizes[0] is None or sizes[1] is None:
        raise LilyError(
            f"target {name} is a {type(base).__name__}, not a linear layer or another that can be adapted; Lily adapts "
            f"{SUPPORTED}, and stacked weights of experts by target_parameters. Narrow target_modules, or exclude it "
            "with exclude_modules"
        )
    return ModuleSpec(name, int(sizes[0]), int(sizes[1]))


def _conv_spec(name: str, base: Any, cls: Any, kind: str) -> ModuleSpec:
    if type(base).forward is not cls.forward:
        raise LilyError(
            f"target {name} is a {type(base).__name__}, a subclass of nn.{cls.__name__} with a different forward, "
            "which an adapter cannot follow. Narrow target_modules, or exclude it with exclude_modules"
        )
    kernel = tuple(base.kernel_size)
    columns = base.in_channels // base.groups * math.prod(kernel)
    return ModuleSpec(name, columns, base.out_channels, kind, kernel, conv_groups=base.groups)


def parallel_module_spec(name: str, module: nn.Module) -> ModuleSpec:
    """The sizes of a parallel module: the input of its first linear layer and the output of its last.

    Raises:
        LilyError: if it has no linear layer.
    """
    sizes = [(spec.in_features, spec.out_features) for spec in linear_layers(name, module)]
    if not sizes:
        raise LilyError(
            f"parallel_modules: {name} is a {type(module).__name__} without linear layers, so that the sizes of its "
            "input and output are not known; name a module with linear layers"
        )
    return ModuleSpec(name, sizes[0][0], sizes[-1][1], PARALLEL_MODULE)


def linear_layers(name: str, module: nn.Module) -> Iterator[ModuleSpec]:
    """The linear layers of a module: itself, or those inside it.

    Args:
        name: the module's name.
        module: the module; the layers of adapters inside it do not count.
    """
    adapters = (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))
    theirs = {m for a in adapters for n, m in a.named_modules() if n and not n.startswith("base_layer")}
    for path, inner in module.named_modules(prefix=name):
        if inner not in theirs and (isinstance(inner, nn.Linear) or type(inner).__name__ == "Conv1D"):
            yield layer_spec(path, inner)


def parameter_spec(name: str, module: nn.Module) -> ModuleSpec:
    """A parameter's kind and sizes, as PEFT's LoRA reads them.

    Args:
        name: name of the parameter, of shape (out, in), (experts, out, in), or (experts, in, out) if `is_transposed`.
        module: the module that owns it.

    Raises:
        LilyError: if it has another number of dimensions, or is not a floating-point weight of at least 16 bits.
    """
    parameter: Any = getattr(module, name.rpartition(".")[2])
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: DeepSpeed's, of a sharded one
    if len(shape) not in (2, 3):
        raise LilyError(
            f"target parameter {name} has shape {shape}; Lily adapts matrices (out, in) and stacked ones (experts, "
            "out, in). Name other parameters in target_parameters"
        )
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        raise LilyError(
            f"target parameter {name} has dtype {parameter.dtype}, to whose few values its update would be rounded; "
            "load the base model without quantization, or name other target_parameters"
        )
    if len(shape) == 2:
        return ModuleSpec(name, shape[1], shape[0], MATRIX)
    experts, rows, columns = shape
    return ModuleSpec(name, *((rows, columns) if is_transposed(module) else (columns, rows)), EXPERTS, (), experts)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stacks its experts' weights as (experts, in, out), by the flag that transformers sets."""
    return bool(getattr(module, "is_transposed", False))


def base_of(module: nn.Module) -> nn.Module:
    """The base layer, without the adapters around it."""
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base  # type: ignore[no-any-return]


def base_compute(modules: Sequence[ModuleSpec]) -> int:
    """Multiply-adds per token of the base layers: in * out, for an embedding, which looks up, out."""
    return sum((1 if m.kind == EMBEDDING else m.in_features) * m.out_features * m.experts for m in modules)


def require_modules(modules: Sequence[ModuleSpec]) -> None:
    """Raise a LilyError if there are no modules to adapt."""
    if not modules:
        raise LilyError("there are no layers to adapt; choose target modules that match some")


def require_positive(**values: int | None) -> None:
    """Raise a LilyError that names the first value that is neither None nor a positive integer."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise LilyError(f"{name}={value!r} is not valid; give a positive integer")
