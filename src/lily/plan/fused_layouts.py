"""Slices of fused projections: which outputs of one linear layer are the query, the key, the value, the gate.

Models fuse projections that read the same input into one weight and split its output afterwards. The layouts of common
architectures are listed here; for others the configuration states them. Only names and sizes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lily.errors import LilyError
from lily.plan.attention import InProjection


@dataclass(frozen=True)
class Rows:
    """Outputs `start` to `stop` of every `period` outputs.

    One range if `period` is the layer's whole width; one range per head if heads are interleaved, as in GPT-NeoX:
    (heads, 3, head size).

    Attributes:
        start: first output of the range.
        stop: one past its last output.
        period: distance from one range to the next.
    """

    start: int
    stop: int
    period: int

    def size(self, out_features: int) -> int:
        """How many of `out_features` outputs these are."""
        return out_features // self.period * (self.stop - self.start)

    def view(self, y: Tensor) -> Tensor:
        """These outputs of `y` (..., out) as a view (..., out / period, stop - start): writing there writes into y."""
        return y.view(*y.shape[:-1], -1, self.period)[..., self.start : self.stop]


Layout = dict[str, Rows]


def layout_of(name: str, module: nn.Module, parent: nn.Module, config: Any) -> Layout | None:
    """The layout of a fused projection, if its architecture is known.

    Args:
        name: last part of the layer's name, such as `qkv_proj`.
        module: the layer; its `out_features` is read (`nf` of GPT-2's `Conv1D`).
        parent: the module that calls it; its class identifies the architecture.
        config: the model's configuration (of transformers); None for other libraries, whose modules hold the sizes.

    Returns:
        Slice name -> outputs; None if the architecture is not known.
    """
    out: int = module.out_features if hasattr(module, "out_features") else getattr(module, "nf", 0)  # type: ignore[assignment]
    if isinstance(module, InProjection):
        width = module.in_features
        return {part: Rows(i * width, (i + 1) * width, out) for i, part in enumerate("qkv")}
    path = type(parent).__module__.split(".")
    if path[0] == "timm" and name == "qkv":
        rule = TIMM.get(".".join(path[1:]))
        layout = rule(parent, out) if rule is not None else None
        return layout if layout is not None and _covers(layout, out) else None
    if path[:2] != ["transformers", "models"] or config is None:
        return None
    rule = RULES.get((path[2], name))
    own = getattr(parent, "config", None) or config
    layout = rule(own.get_text_config(), out) if rule is not None else None
    # a cross-attention layer of the same name fuses other projections
    return layout if layout is not None and _covers(layout, out) else None


def rows_of(target: str, asked: object, layout: Layout | None, out_features: int) -> Layout:
    """The slices of a layer that the configuration asks for.

    Args:
        target: the layer's name, for error messages.
        asked: names of slices of a known layout, or name -> [start, stop] or [start, stop, period].
        layout: the known layout; None: there is none.
        out_features: number of outputs of the layer.

    Returns:
        Slice name -> outputs, in the order of the outputs.

    Raises:
        LilyError: for an unknown name or layout, and for outputs that overlap or do not exist.
    """
    if isinstance(asked, Mapping):
        slices = {str(name): _explicit(target, str(name), value, out_features) for name, value in asked.items()}
    else:
        names = list(asked) if isinstance(asked, (list, tuple, set)) else []
        if layout is None:
            raise LilyError(
                f"target_slices: the layout of {target} is not known; state it, such as "
                f"{{{(names or ['v'])[0]!r}: [{out_features * 2 // 3}, {out_features}]}} (start and stop among its "
                f"{out_features} outputs; a third number is the period at which heads repeat)"
            )
        if wrong := [name for name in names if name not in layout]:
            raise LilyError(f"target_slices: {target} has no slice {wrong[0]!r}; it has {', '.join(layout)}")
        slices = {name: rows for name, rows in layout.items() if name in names}
    _refuse_overlap(target, slices, out_features)
    return dict(sorted(slices.items(), key=lambda item: (item[1].start, item[0])))


def _explicit(target: str, name: str, value: object, out: int) -> Rows:
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if len(numbers) not in (2, 3) or not all(type(n) is int for n in numbers):
        raise LilyError(f"target_slices: {name}: {value!r} of {target} is not [start, stop] or [start, stop, period]")
    rows = Rows(numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else out)
    if not 0 <= rows.start < rows.stop <= rows.period <= out or out % rows.period:
        raise LilyError(
            f"target_slices: {name}: {value!r} does not fit {target}, which has {out} outputs; expected "
            f"0 <= start < stop <= period, and a period that divides {out}"
        )
    return rows


def _refuse_overlap(target: str, layout: Layout, out: int) -> None:
    owner: dict[int, str] = {}
    for name, rows in layout.items():
        for first in range(0, out, rows.period):
            for i in range(first + rows.start, first + rows.stop):
                if owner.setdefault(i, name) != name:
                    raise LilyError(f"target_slices: {owner[i]!r} and {name!r} of {target} overlap at output {i}")


def _covers(layout: Layout, out: int) -> bool:
    return all(out % rows.period == 0 for rows in layout.values()) and sum(r.size(out) for r in layout.values()) == out


def _contiguous(period: int, **sizes: int) -> Layout:
    """Consecutive slices, repeated every `period` outputs."""
    layout, start = {}, 0
    for name, size in sizes.items():
        layout[name] = Rows(start, start + size, period)
        start += size
    return layout


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _heads(config: Any, out: int) -> Layout:
    """(heads, 3, head size): each head's query, key and value side by side."""
    size = _head_size(config)
    return _contiguous(3 * size, q=size, k=size, v=size)


def _grouped(config: Any, out: int) -> Layout:
    """All queries, then all keys, then all values, with fewer key-value heads than query heads."""
    heads, size = config.num_attention_heads, _head_size(config)
    few = int(getattr(config, "num_key_value_heads", None) or heads) * size
    return _contiguous(out, q=heads * size, k=few, v=few)


def _dbrx(config: Any, out: int) -> Layout:
    few = config.attn_config.kv_n_heads * (config.d_model // config.n_heads)
    return _contiguous(out, q=config.d_model, k=few, v=few)


def _falcon(config: Any, out: int) -> Layout:
    size, heads = config.head_dim, config.num_attention_heads
    if config.new_decoder_architecture:  # (groups, queries of a group + key + value, head size)
        shared = heads // config.num_kv_heads
        return _contiguous((shared + 2) * size, q=shared * size, k=size, v=size)
    return _contiguous(out, q=heads * size, k=size, v=size) if config.multi_query else _heads(config, out)


def _bigcode(config: Any, out: int) -> Layout:
    size = _head_size(config)
    return _contiguous(out, q=config.n_embd, k=size, v=size) if config.multi_query else _heads(config, out)


def _codegen(config: Any, out: int) -> Layout:
    """Split for four devices: the queries, values and keys of each, in this order."""
    share = out // 12
    return _contiguous(out // 4, q=share, v=share, k=share)


def _thirds(config: Any, out: int) -> Layout:
    """Each as wide as the model, so that a cross-attention's key and value are not mistaken for three slices."""
    size = config.hidden_size
    return _contiguous(out, q=size, k=size, v=size)


def _in_thirds(attention: Any, out: int) -> Layout:
    """All queries, all keys, all values: timm's most common layout."""
    return _contiguous(out, q=out // 3, k=out // 3, v=out // 3)


def _head_first(attention: Any, out: int) -> Layout:
    size = attention.dim_head
    return _contiguous(3 * size, q=size, k=size, v=size) if attention.head_first else _in_thirds(attention, out)


def _wide_values(attention: Any, out: int) -> Layout:
    """(heads, query + key + value), with values of another size."""
    key, value = attention.key_dim, attention.val_dim
    return _contiguous(2 * key + value, q=key, k=key, v=value)


def _global_query(attention: Any, out: int) -> Layout:
    """The global attention of GCViT receives its queries as an input."""
    return _contiguous(out, k=out // 2, v=out // 2) if attention.use_global else _in_thirds(attention, out)


def _gate_up(config: Any, out: int) -> Layout:
    """The gate is the half that the activation is applied to."""
    return _contiguous(out, gate=out // 2, up=out // 2)


def _mamba(config: Any, out: int) -> Layout:
    return _contiguous(out, x=out // 2, z=out // 2)


def _mamba2(config: Any, out: int) -> Layout:
    inner, state = int(config.expand * config.hidden_size), config.n_groups * config.state_size
    return _contiguous(out, z=inner, x=inner, B=state, C=state, dt=config.num_heads)


# Modules of timm whose `qkv` is all queries, all keys, all values.
IN_THIRDS = (
    "layers.attention", "layers.attention_pool2d", "layers.diff_attention", "models.beit", "models.cait", "models.coat",
    "models.convit", "models.davit", "models.edgenext", "models.eva", "models.fastvit", "models.hiera",
    "models.hieradet_sam2", "models.metaformer", "models.mvitv2", "models.nest", "models.swin_transformer",
    "models.swin_transformer_v2", "models.swin_transformer_v2_cr", "models.twins", "models.vision_transformer",
    "models.vision_transformer_relpos", "models.vision_transformer_sam", "models.volo", "models.xcit",
)  # fmt: skip

# Module of timm -> the layout of its `qkv`, from the attention module and its number of outputs. Checked against
# timm's code by tests/plan/test_fused_layouts.py; for modules that are not listed no layout is assumed.
TIMM: dict[str, Callable[[Any, int], Layout]] = {
    **dict.fromkeys(IN_THIRDS, _in_thirds),
    "models.maxxvit": _head_first,
    "models.tiny_vit": _wide_values,
    "models.efficientformer": _wide_values,
    "models.gcvit": _global_query,
}

# (architecture, layer) -> its layout; each is checked against the model's code by tests/plan/test_fused_layouts.py.
RULES: dict[tuple[str, str], Callable[[Any, int], Layout]] = {
    **{(name, "query_key_value"): _heads for name in ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")},
    ("falcon", "query_key_value"): _falcon,
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("codegen", "qkv_proj"): _codegen,
    ("phi3", "qkv_proj"): _grouped,
    ("dbrx", "Wqkv"): _dbrx,
    **{(name, "c_attn"): _thirds for name in ("gpt2", "decision_transformer", "imagegpt", "openai")},
    **{(name, "Wqkv"): _thirds for name in ("mpt", "modernbert")},
    **{(name, "gate_up_proj"): _gate_up for name in ("phi3", "glm", "glm4")},
    ("modernbert", "Wi"): _gate_up,
    **{(name, "in_proj"): _mamba for name in ("mamba", "falcon_mamba")},
    ("mamba2", "in_proj"): _mamba2,
}
