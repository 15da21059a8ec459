"""Slices of fused projections: which outputs of one linear layer are the query, the key, the value, the gate.

Models fuse projections that read the same input into one weight and take its output apart afterwards. How, is known
here for common architectures and can be said for any other. A layout is a value, found from names and sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lily.errors import LilyError


@dataclass(frozen=True)
class Rows:
    """Outputs `start` to `stop` of every `period` outputs.

    One run of them where `period` is the layer's whole width; one run a head where heads are interleaved, as
    GPT-NeoX has them: (heads, 3, head size).

    Attributes:
        start: first output of the run.
        stop: one past its last.
        period: outputs after which the next run begins.
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
    """How a fused projection is laid out, if its architecture is known.

    Args:
        name: the layer's own last name, such as `qkv_proj`.
        module: the layer; its `out_features` is read (`nf` of GPT-2's `Conv1D`).
        parent: the module that calls it; its class says which architecture this is.
        config: the model's configuration (of transformers); None for other libraries' models, whose modules say it.

    Returns:
        Slice name -> outputs; None where nothing is known.
    """
    out: int = module.out_features if hasattr(module, "out_features") else getattr(module, "nf", 0)  # type: ignore[assignment]
    path = type(parent).__module__.split(".")
    if path[0] == "timm" and name == "qkv":
        known = TIMM.get(".".join(path[1:]))
        layout = known(parent, out) if known is not None else None
        return layout if layout is not None and _covers(layout, out) else None
    if path[:2] != ["transformers", "models"] or config is None:
        return None
    rule = RULES.get((path[2], name))
    own = getattr(parent, "config", None) or config
    layout = rule(own.get_text_config(), out) if rule is not None else None
    # what a cross-attention of the same name fuses is something else
    return layout if layout is not None and _covers(layout, out) else None


def rows_of(target: str, asked: object, layout: Layout | None, out_features: int) -> Layout:
    """The slices of a layer that the configuration asks for.

    Args:
        target: the layer's name, for messages.
        asked: names of slices of a known layout, or name -> [start, stop] or [start, stop, period].
        layout: the known one, if any.
        out_features: of the layer.

    Returns:
        Slice name -> outputs, in the order of the outputs.

    Raises:
        LilyError: for an unknown name, a layout that is not known, and outputs that overlap or are not there.
    """
    if isinstance(asked, Mapping):
        found = {str(name): _explicit(target, str(name), value, out_features) for name, value in asked.items()}
    else:
        names = list(asked) if isinstance(asked, (list, tuple, set)) else []
        if layout is None:
            raise LilyError(
                f"target_slices: how {target} is laid out is not known; say it, such as "
                f"{{{(names or ['v'])[0]!r}: [{out_features * 2 // 3}, {out_features}]}} (start and stop among its "
                f"{out_features} outputs; a third number is the period at which heads repeat)"
            )
        if wrong := [name for name in names if name not in layout]:
            raise LilyError(f"target_slices: {target} has no slice {wrong[0]!r}; it has {', '.join(layout)}")
        found = {name: rows for name, rows in layout.items() if name in names}
    _refuse_overlap(target, found, out_features)
    return dict(sorted(found.items(), key=lambda item: (item[1].start, item[0])))


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
    """Slices one after the other, in blocks of `period` outputs."""
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
    """All queries, then the fewer keys, then the values."""
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
    """Laid out for four devices: each one's queries, values and keys, in this order."""
    share = out // 12
    return _contiguous(out // 4, q=share, v=share, k=share)


def _thirds(config: Any, out: int) -> Layout:
    """Of the model's width each, so that a cross-attention's key and value are not taken for three."""
    size = config.hidden_size
    return _contiguous(out, q=size, k=size, v=size)


def _in_blocks(attention: Any, out: int) -> Layout:
    """All queries, all keys, all values: timm's most common form, which asks nothing of the module."""
    return _contiguous(out, q=out // 3, k=out // 3, v=out // 3)


def _head_first(attention: Any, out: int) -> Layout:
    size = attention.dim_head
    return _contiguous(3 * size, q=size, k=size, v=size) if attention.head_first else _in_blocks(attention, out)


def _wide_values(attention: Any, out: int) -> Layout:
    """(heads, query + key + value), whose values are of another size."""
    key, value = attention.key_dim, attention.val_dim
    return _contiguous(2 * key + value, q=key, k=key, v=value)


def _global_query(attention: Any, out: int) -> Layout:
    """GCViT's global blocks are given their queries."""
    return _contiguous(out, k=out // 2, v=out // 2) if attention.use_global else _in_blocks(attention, out)


def _gate_up(config: Any, out: int) -> Layout:
    """The gate is what the activation acts on."""
    return _contiguous(out, gate=out // 2, up=out // 2)


def _mamba(config: Any, out: int) -> Layout:
    return _contiguous(out, x=out // 2, z=out // 2)


def _mamba2(config: Any, out: int) -> Layout:
    inner, state = int(config.expand * config.hidden_size), config.n_groups * config.state_size
    return _contiguous(out, z=inner, x=inner, B=state, C=state, dt=config.num_heads)


# Modules of timm whose classes have all queries, all keys and all values in their `qkv`.
IN_BLOCKS = (
    "layers.attention", "layers.attention_pool2d", "layers.diff_attention", "models.beit", "models.cait", "models.coat",
    "models.convit", "models.davit", "models.edgenext", "models.eva", "models.fastvit", "models.hiera",
    "models.hieradet_sam2", "models.metaformer", "models.mvitv2", "models.nest", "models.swin_transformer",
    "models.swin_transformer_v2", "models.swin_transformer_v2_cr", "models.twins", "models.vision_transformer",
    "models.vision_transformer_relpos", "models.vision_transformer_sam", "models.volo", "models.xcit",
)  # fmt: skip

# Module of timm -> the layout of a class's `qkv`, of that attention and its outputs; each is checked against timm's own
# code by tests/test_slices.py. Any other may divide its outputs in a way of its own.
TIMM: dict[str, Callable[[Any, int], Layout]] = {
    **dict.fromkeys(IN_BLOCKS, _in_blocks),
    "models.maxxvit": _head_first,
    "models.tiny_vit": _wide_values,
    "models.efficientformer": _wide_values,
    "models.gcvit": _global_query,
}

# (architecture, layer) -> its layout; each is checked against the model's own code by tests/test_slices.py.
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
