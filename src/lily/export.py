"""Export: a static adapter as a plain LoRA, a merged model, or a stock Lily adapter.

Exact by construction: with static weights the update of a layer is `scaling * (sum_e p_e B_e).T @ A`, which is a LoRA
of the same rank. Nothing is approximated unless a smaller rank is asked for. Every folder is written under a
temporary name and appears when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from lily._version import __version__
from lily.adapted import Adapted, find
from lily.config import LilyConfig
from lily.conv import Conv2d
from lily.errors import LilyError
from lily.files import new_folder, write_text
from lily.kinds import CONV2D, EMBEDDING, EXPERTS, LINEAR, MATRIX, PARAMETERS, SLICE, layer_spec
from lily.layer import Factors, LilyLayer
from lily.nested import NESTED
from lily.plan import Group
from lily.reading import blame, parse_text, read_header, read_json
from lily.targets import select_parameters
from lily.uncalled import uncalled

PROVENANCE = "lily_provenance.json"
PREFIX = "base_model.model."
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Energy that may be lost where the rank must fall, before it takes `force`.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Target:
    """What reads an exported LoRA, and what it asks for.

    Attributes:
        ranks: ranks it accepts; empty: any.
        uniform: all layers must have one rank and one alpha.
        modules_to_save: whether it reads modules saved whole.
        biases: whether it reads trained biases.
        blocks_only: whether it adapts the linear layers of the numbered blocks only, so no output layer.
        kinds: of what it adapts; see `lily.kinds`.
    """

    ranks: tuple[int, ...] = ()
    uniform: bool = False
    modules_to_save: bool = True
    biases: bool = True
    blocks_only: bool = False
    kinds: tuple[str, ...] = (LINEAR,)


TARGETS = {
    "peft": Target(kinds=(LINEAR, CONV2D, EMBEDDING, MATRIX, EXPERTS)),
    "vllm": Target(VLLM_RANKS, uniform=True, modules_to_save=False, biases=False, blocks_only=True),
    "llama.cpp": Target(uniform=True, modules_to_save=False, biases=False),
    "diffusers": Target(uniform=True, modules_to_save=False, biases=False, kinds=(LINEAR, CONV2D)),
}


@dataclass(frozen=True)
class Layer:
    """One layer of an exported LoRA.

    Attributes:
        A: (rank, in), or (experts, rank, in).
        B: (out, rank), or (experts, out, rank).
        scale: what the reader multiplies by, alpha / rank.
        energy: share of the update's squared norm that is kept (of experts, the least); 1 is all of it.
    """

    A: Tensor
    B: Tensor
    scale: float
    energy: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.A.shape[-2]


@dataclass(frozen=True)
class LoraExport:
    """A LoRA, ready to write.

    Attributes:
        layers: name -> its matrices.
        groups: name -> the group that the layer was in.
        rank: the largest rank.
        config: PEFT's configuration of it.
        other: biases and modules saved whole, by their names in the file.
        provenance: where it came from.
        component: the part of a diffusers pipeline that it is for, such as `unet`; None for any other model.
    """

    layers: dict[str, Layer]
    groups: dict[str, Group]
    rank: int
    config: LoraConfig
    other: dict[str, Tensor]
    provenance: dict[str, Any]
    component: str | None = None

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        tensors = [t for layer in self.layers.values() for t in (layer.A, layer.B)] + list(self.other.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def energies(self) -> dict[str, float]:
        """Layer -> kept energy."""
        return {name: layer.energy for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The file's entries."""
        out = dict(self.other)
        for name, layer in self.layers.items():
            for key, tensor in lora_entries(name, layer, self.groups).items():
                out[f"{PREFIX}{key}"] = tensor.contiguous()
        return out


def lora_entries(name: str, layer: Layer, groups: Mapping[str, Group]) -> dict[str, Tensor]:
    """One layer's entries of a file, as PEFT's LoRA lays out a layer of that kind.

    Source: `peft.tuners.lora.layer` (`_ConvNd`, `Embedding`, `ParamWrapper`).

    Args:
        name: of the layer.
        layer: its matrices.
        groups: of all layers, in the model's order: adapted parameters of one module are nested, the last outermost.
    """
    group, A, B = groups[name], layer.A, layer.B
    if group.kind == CONV2D:
        A, B = A.view(-1, *group.shape[1:]), B.view(*B.shape, 1, 1)
    elif group.kind == EMBEDDING:
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    elif group.kind in PARAMETERS:
        module = name.rpartition(".")[0]
        beside = [n for n, g in groups.items() if g.kind in PARAMETERS and n.rpartition(".")[0] == module]
        name = module + NESTED * (len(beside) - 1 - beside.index(name))
        if group.kind == EXPERTS:  # A expert by expert, B with the experts innermost
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def as_lora(
    model: nn.Module,
    *,
    adapter: str | None = None,
    target: str = "peft",
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> LoraExport:
    """A static adapter as a LoRA.

    Args:
        model: carries the adapter.
        adapter: default: the active one.
        target: what is to read it: `peft`, `vllm`, `llama.cpp` or `diffusers`; decides padding and what is refused.
        rank: default: the adapter's own, which is exact. A smaller one cuts each layer's update by a truncated SVD.
        tolerance: share of a layer's energy (squared norm of its update) that may be lost that way.
        force: cut although more is lost.
        dtype: of the tensors; default: the adapter's, or float32 where that is half precision, whose mixed experts
            half precision cannot hold.
        provenance: further facts to keep with it.

    Raises:
        LilyError: if the adapter depends on the data, the target cannot read a part of it, or cutting loses too much.
    """
    found = find(model, adapter)
    wanted = TARGETS.get(target)
    if wanted is None:
        raise LilyError(f"no export target {target!r}; choose one of {', '.join(TARGETS)}")
    other = _other(model, found, frozen=wanted.modules_to_save)
    _check_readable(target, wanted, found, other)
    factors, groups = _joined(found)
    own = max(f.A.shape[-2] for f in factors.values())
    _check_rank(rank, own)
    layers = {name: _cut(f, rank) for name, f in factors.items()}
    poor = {n: layer.energy for n, layer in layers.items() if 1 - layer.energy > tolerance}
    if poor and not force:
        worst = min(poor, key=poor.__getitem__)
        raise LilyError(
            f"rank {rank} keeps too little of {len(poor)} of {len(layers)} layers (least: {poor[worst]:.1%} of the "
            f"energy of {worst}; the tolerance is {1 - tolerance:.1%}); give a larger rank, or force"
        )
    largest = max(layer.rank for layer in layers.values())
    rank_to = _padded_rank(largest, target, wanted)
    layers = {
        name: _finished(layer, rank_to if wanted.uniform or wanted.ranks else layer.rank, dtype, wanted.uniform)
        for name, layer in layers.items()
    }
    config = _lora_config(found, layers, rank_to)
    rounded = dtype is not None and any(torch.promote_types(f.B.dtype, dtype) != dtype for f in factors.values())
    exact = not rounded and all(layer.energy == 1 for layer in layers.values())
    facts = _origin(found, "export", provenance) | {
        "exact": exact, "scaling": found.config.scaling, "rank": rank_to,
        "adapter_parameters": found.plan.parameters.total,
    }  # fmt: skip
    if rank is not None and rank < own:
        facts["energies"] = {name: layer.energy for name, layer in layers.items()}
    return LoraExport(layers, groups, rank_to, config, other, facts, _component(found.root))


def _check_rank(rank: int | None, own: int) -> None:
    if rank is not None and not 1 <= rank <= own:
        raise LilyError(
            f"rank={rank} is not valid: the adapter has {own}; give a positive integer up to that, or leave it out for "
            "an exact export"
        )


def _joined(found: Adapted) -> tuple[dict[str, Factors], dict[str, Group]]:
    """Each layer's update and group, where the slices of one layer have become one update of the whole layer.

    That is exact: its rank is the sum of theirs, A has theirs one below the other, and B is zero where a slice's
    columns meet the outputs of another.
    """
    factors: dict[str, Factors] = {}
    groups: dict[str, Group] = {}
    slices: dict[str, list[tuple[Group, Factors]]] = {}
    for name, layer in found.layers.items():
        group, update = found.plan.group_of(name), layer.factors(found.name)
        if group.kind == SLICE:
            slices.setdefault(name.rpartition(".")[0], []).append((group, update))
        else:
            factors[name], groups[name] = update, group
    for name, parts in slices.items():
        out = layer_spec(name, found.root.get_submodule(name)).out_features
        wide = []
        for group, update in parts:
            assert group.rows is not None
            whole = update.B.new_zeros(update.B.shape[0], out)
            part = group.rows.view(whole)
            part.copy_((update.scaling * update.B).view(part.shape))
            wide.append(whole)
        factors[name] = Factors(torch.cat([update.A for _, update in parts]), torch.cat(wide), 1.0)
        first, rank = parts[0][0], factors[name].A.shape[0]
        groups[name] = Group(name, first.in_features, out, rank, 1, ((name,),))
    return factors, groups


def _origin(found: Adapted, kind: str, further: Mapping[str, Any] | None) -> dict[str, Any]:
    """What every export says of where it came from."""
    config = found.config
    return {
        "format": f"lily {kind}", "lily": __version__, "base_model": config.base_model_name_or_path,
        "routing": config.routing, "plan": str(found.plan).splitlines(),
        **(config.provenance or {}), **(further or {}),
    }  # fmt: skip


def _header(facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file that says where it came from, should it be parted from its folder."""
    return {"format": "pt", "lily": json.dumps(facts, ensure_ascii=False)}


def _check_readable(target: str, wanted: Target, found: Adapted, other: Mapping[str, Tensor]) -> None:
    read = uncalled(dict(found.root.named_modules()))
    # PEFT's LoRA acts in calls, so never on dt_proj, and refuses out_proj of state-space models.
    lost = [name for name in found.layers if name in read and name.endswith(("dt_proj", "out_proj"))]
    if lost:
        why = read[lost[0]]
        raise LilyError(
            f"no reader of a LoRA applies one to {lost[0]}: {why.parent} reads its weight {why.why}; export --to "
            "merged instead, or train without it (exclude_modules)"
        )
    saved = saved_modules(found.config)
    if saved and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads no modules saved whole, but the adapter has {', '.join(sorted(saved))} "
            "(modules_to_save); export --to merged instead, or train without modules_to_save"
        )
    if found.config.bias != "none" and not wanted.biases:
        raise LilyError(f"{target} reads no trained biases (bias={found.config.bias!r}); export --to merged instead")
    for name, layer in found.layers.items():
        kind = found.plan.group_of(name).kind
        if kind not in wanted.kinds and not (kind == SLICE and LINEAR in wanted.kinds):
            raise LilyError(
                f"{target} reads LoRAs of {' and '.join(wanted.kinds)} layers, and {name} is of the kind {kind}; "
                "export --to merged instead, or a LoRA for PEFT"
            )
        if isinstance(layer, Conv2d) and (more := layer.beyond_lora()) is not None:
            raise LilyError(
                f"{target} reads a LoRA of a convolution as one without {more}, which {name} has; export --to merged "
                "instead, or train without it (exclude_modules)"
            )
    outside = [name for name in found.layers if not any(part.isdigit() for part in name.split("."))]
    if outside and wanted.blocks_only:
        raise LilyError(
            f"{target} adapts the layers of a model's blocks, and {', '.join(outside)} is in none; export --to merged "
            "instead, or train without it (exclude_modules)"
        )
    if other and not wanted.modules_to_save:
        raise LilyError(
            f"{target} reads nothing but A and B, but the adapter comes with {sorted(other)[0].removeprefix(PREFIX)} "
            "(an embedding whose vocabulary was changed?); export --to merged instead"
        )


def saved_modules(config: LilyConfig) -> list[str] | None:
    """The modules that an adapter saves whole; PEFT adds the same names again at every load."""
    return list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None


def _cut(f: Factors, rank: int | None) -> Layer:
    """A layer's update at its own rank, exactly, or at a smaller one by a truncated SVD of its two thin factors."""
    r = f.A.shape[-2]
    if rank is None or rank >= r:
        return Layer(f.A, f.B.mT, f.scaling)
    q_in, r_in = torch.linalg.qr(f.A.mT.double())  # (..., in, r)
    q_out, r_out = torch.linalg.qr(f.B.mT.double())  # (..., out, r)
    u, s, v = torch.linalg.svd(r_out @ r_in.mT)
    total, kept = s.square().sum(-1), s[..., :rank].square().sum(-1)
    energy = float(torch.where(total > 0, kept / total, 1.0).min())
    root = s[..., :rank].sqrt()
    A = (q_in @ (v[..., :rank, :].mT * root.unsqueeze(-2))).mT
    B = q_out @ (u[..., :rank] * root.unsqueeze(-2))
    return Layer(A.to(f.A.dtype), B.to(f.B.dtype), f.scaling, energy)


def _padded_rank(rank: int, target: str, wanted: Target) -> int:
    if not wanted.ranks:
        return rank
    fitting = [r for r in wanted.ranks if r >= rank]
    if not fitting:
        raise LilyError(
            f"{target} accepts ranks up to {wanted.ranks[-1]}, but the adapter has {rank}; cut it with rank"
        )
    return fitting[0]


def _finished(layer: Layer, rank: int, dtype: torch.dtype | None, uniform: bool) -> Layer:
    """Padded with zeros to `rank`; the scaling as an alpha that is a whole number, else inside B."""
    missing = rank - layer.rank
    A, B = nn.functional.pad(layer.A, (0, 0, 0, missing)), nn.functional.pad(layer.B, (0, missing))
    scale = layer.scale
    if uniform or not (scale * rank).is_integer() or scale <= 0:
        B, scale = B * scale, 1.0
    return Layer(A.to("cpu", dtype), B.to("cpu", dtype), scale, layer.energy)


def _lora_config(found: Adapted, layers: Mapping[str, Layer], rank: int) -> LoraConfig:
    config = found.config
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: round(layer.scale * ranks[name]) for name, layer in layers.items()}
    alpha = alphas[next(n for n, r in ranks.items() if r == rank)]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_target_modules(found),
        target_parameters=_target_parameters(found),
        rank_pattern={n: r for n, r in ranks.items() if r != rank},
        alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        fan_in_fan_out=any(type(m.get_base_layer()).__name__ == "Conv1D" for m in found.layers.values()),
        bias={"lily_only": "lora_only"}.get(config.bias, config.bias),
        modules_to_save=saved_modules(config),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _target_modules(found: Adapted) -> list[str]:
    """The shortest names that mean these layers and no others."""
    specs = [spec for group in found.plan.groups for spec in group.specs if group.kind not in PARAMETERS]
    layers = list(dict.fromkeys(spec.path for spec in specs))
    if not layers:
        return []
    inside = tuple(f"{name}." for name in layers)
    others = [n for n, _ in found.root.named_modules() if n and n not in layers and not n.startswith(inside)]
    return sorted(_find_minimal_target_modules(layers, others))


def _target_parameters(found: Adapted) -> list[str] | None:
    """The names of the adapted parameters, or `module.parameter` of them where no others are called that."""
    names = [name for name in found.layers if found.plan.group_of(name).kind in PARAMETERS]
    short = sorted({".".join(name.split(".")[-2:]) for name in names})
    if names and {spec.name for spec in select_parameters(found.root, short)} == set(names):
        return short
    return names or None


def _other(model: nn.Module, found: Adapted, frozen: bool = True) -> dict[str, Tensor]:
    """What an adapter file holds besides Lily's own tensors: biases, modules saved whole.

    PEFT also saves the frozen weight of an adapted output layer; `frozen` says whether to keep that.
    """
    wrapped = isinstance(model, peft.PeftModel)
    state = get_peft_model_state_dict(model if wrapped else found.root, adapter_name=found.name)
    if not wrapped:  # a wrapper's names are what the file has
        state = {f"{PREFIX}{k}": v for k, v in state.items()}
    # With bias="all" a saved module's bias comes again under its wrapper's names, which are no names of a file.
    own = ("lily_A", "lily_B", "lily_router", "lily_logits", "modules_to_save.", "original_module.")
    left_out = own if frozen else (*own, "base_layer.")
    return {k: v.detach().cpu().contiguous() for k, v in state.items() if not any(f".{o}" in k for o in left_out)}


def _component(root: nn.Module) -> str | None:
    """What diffusers' pipelines call such a model; a model from elsewhere is no part of them."""
    kind = type(root)
    if kind.__module__.partition(".")[0] != "diffusers":
        return None
    return "unet" if "UNet" in kind.__name__ else "transformer" if "Transformer" in kind.__name__ else None


def write_lora(
    export: LoraExport,
    folder: str | Path,
    *,
    overwrite: bool = False,
    layout: str = "peft",
    component: str | None = None,
) -> None:
    """Write an exported LoRA as a folder.

    Args:
        export: from `as_lora`.
        folder: appears when it is complete.
        overwrite: replace an existing folder.
        layout: `peft` (also for vLLM), or `diffusers`: a file that `load_lora_weights` of a pipeline reads.
        component: diffusers: the part of the pipeline that it is for, `unet` or `transformer`; default: read off the
            class of the adapted model.

    Raises:
        LilyError: if the folder exists, or the layout cannot express the export.
        OSError: if it cannot be written; nothing is left then.
    """
    if layout not in ("peft", "diffusers"):
        raise LilyError(f"layout={layout!r} is not known; choose peft or diffusers")
    if component is not None and layout != "diffusers":
        raise LilyError(f"component={component!r} goes with layout='diffusers'; leave it out")
    header = _header(export.provenance)
    state = _pipeline_state(export, component) if layout == "diffusers" else export.state_dict()
    with new_folder(folder, overwrite) as new:
        if layout == "diffusers":
            save_file(state, new / "pytorch_lora_weights.safetensors", metadata=header)
        else:
            export.config.save_pretrained(str(new))
            save_file(state, new / SAFETENSORS_WEIGHTS_NAME, metadata=header)
        _write_provenance(new, export.provenance)


def _write_provenance(folder: Path, facts: Mapping[str, Any]) -> None:
    write_text(folder / PROVENANCE, json.dumps(facts, indent=2, ensure_ascii=False))


def _pipeline_state(export: LoraExport, component: str | None) -> dict[str, Tensor]:
    """The entries of a diffusers file: it has no configuration, so its reader takes alpha to be the rank."""
    component = component or export.component
    if component is None:
        raise LilyError(
            "which part of a pipeline this LoRA is for cannot be read off the adapted model; "
            "name it: write_lora(..., layout='diffusers', component='unet') or 'transformer'"
        )
    plain = all(layer.scale == 1 and layer.rank == export.rank for layer in export.layers.values())
    if export.other or not plain:
        raise LilyError(
            "a diffusers file holds nothing but A and B of one rank, without a scale; "
            "make the export with as_lora(model, target='diffusers')"
        )
    return {f"{component}.{k.removeprefix(PREFIX)}": v for k, v in export.state_dict().items()}


def write_merged(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    provenance: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Merge a static adapter into its base model and write that as a plain model folder.

    The weights are merged in place, one at a time, so the model is in memory once; `model` is used up.

    Args:
        model: a `PeftModel` around a model with `save_pretrained`.
        folder: appears when it is complete.
        adapter: default: the active one.
        tokenizer: written beside it, if given.
        overwrite: replace an existing folder.
        max_shard_size: of one safetensors file.
        provenance: further facts to keep with it.

    Returns:
        The merged model.

    Raises:
        LilyError: if the adapter cannot be merged or the folder exists; nothing is merged then.
    """
    found = find(model, adapter)
    adapted = [module for module in found.root.modules() if isinstance(module, LilyLayer)]
    others = {name for layer in adapted for name in layer.merged_adapters} - {found.name}
    if others:
        raise LilyError(
            f"adapter {sorted(others)[0]!r} is merged into the base weights now, and would be written too; "
            "unmerge_adapter() first"
        )
    for layer in found.layers.values():
        layer.check_merge(found.name, safe_merge=True)
    if not isinstance(model, peft.PeftModel):
        raise LilyError(
            f"this {type(model).__name__} had its adapter injected, and only a PeftModel can be merged and unloaded; "
            "load the adapter with PeftModel.from_pretrained, or export a LoRA"
        )
    if not hasattr(found.root, "save_pretrained"):
        raise LilyError(
            f"a {type(found.root).__name__} has no save_pretrained; merge_and_unload() and save it yourself"
        )
    facts = _origin(found, "merged", provenance)
    with new_folder(folder, overwrite) as new:
        merged: Any = model.merge_and_unload(adapter_names=[found.name])
        merged.save_pretrained(str(new), max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        _write_provenance(new, facts)
    return merged  # type: ignore[no-any-return]


def write_stock(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter so that plain PEFT, without this package, computes the same.

    Stock Lily knows batch routing only. A batch-routed adapter is written as it is. A static one gets layers of their
    own, each with its mixed B twice and a router of zeros, which weighs both alike; that is larger than a LoRA, which
    is the better export unless stock Lily itself is wanted.

    Args:
        model: carries the adapter.
        folder: appears when it is complete.
        adapter: default: the active one.
        overwrite: replace an existing folder.
        provenance: further facts to keep with it.

    Raises:
        LilyError: if stock PEFT cannot express the adapter, or the folder exists.
    """
    found = find(model, adapter)
    config = found.config
    facts = _origin(found, "stock", provenance)
    if config.routing == "batch" and config.file_dict()["peft_type"] == "LILY":
        with new_folder(folder, overwrite) as new:
            state = get_peft_model_state_dict(model, adapter_name=found.name)
            config.save_pretrained(str(new))
            save_file({k: v.contiguous() for k, v in state.items()}, new / SAFETENSORS_WEIGHTS_NAME, _header(facts))
            _write_provenance(new, facts)
        return
    if config.bias != "none":
        raise LilyError(f"stock Lily trains no biases (bias={config.bias!r}); export --to lora or --to merged")
    other = {
        type(layer.get_base_layer()).__name__
        for name, layer in found.layers.items()
        if found.plan.group_of(name).kind != LINEAR or not isinstance(layer.get_base_layer(), nn.Linear)
    }
    if other:
        raise LilyError(f"stock Lily adapts nn.Linear only, not {', '.join(sorted(other))}; export --to lora")
    factors = {name: layer.factors(found.name) for name, layer in found.layers.items()}
    r = max(f.A.shape[0] for f in factors.values())
    state = _other(model, found)
    for name, f in factors.items():
        padded = (0, 0, 0, r - f.A.shape[0])
        A, B = nn.functional.pad(f.A, padded), nn.functional.pad(f.B, padded)
        state[f"{PREFIX}{name}.lily_A.weight"] = A.cpu().contiguous()
        state[f"{PREFIX}{name}.lily_B.weight"] = torch.cat([B, B]).cpu().contiguous()
        state[f"{PREFIX}{name}.lily_router.weight"] = torch.zeros(2, r)
    values = {
        "peft_type": "LILY", "r": r, "num_B": 2, "stride_A": 1, "scaling": config.scaling, "init_weights": True,
        "target_modules": sorted(found.layers), "modules_to_save": saved_modules(config),
        "task_type": config.task_type, "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision, "inference_mode": True,
    }  # fmt: skip
    with new_folder(folder, overwrite) as new:
        write_text(new / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True))
        save_file(state, new / SAFETENSORS_WEIGHTS_NAME, _header(facts))
        _write_provenance(new, facts)


def provenance(folder: str | Path) -> dict[str, Any] | None:
    """Where an exported folder came from, or None for one that this package did not write.

    Raises:
        LilyError: if what it says cannot be read.
    """
    folder = Path(folder)
    if (folder / PROVENANCE).is_file():
        return _facts(folder / PROVENANCE, read_json(folder / PROVENANCE))
    for file in sorted(folder.glob("*.safetensors")):
        text = read_header(file).metadata.get("lily")
        if text:
            return _facts(file, parse_text(file, text.encode("utf-8", "surrogatepass")).value)
    return None


def _facts(file: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise blame(file, "its provenance is no object with named values")
    return found
