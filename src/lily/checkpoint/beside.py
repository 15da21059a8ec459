"""What stands beside an adapter's own tensors in its file, and where it belongs in a model.

PEFT stores there, under names in the base model:

    <module>.<tensor>                                 modules saved whole (`modules_to_save`, a task's head)
    <layer>[.base_layer].bias                         trained biases
    <layer>.token_adapter.trainable_tokens_delta      trained rows of an embedding (`trainable_token_indices`)
    <embedding>[.base_layer|.token_adapter.base_layer].<tensor>   frozen embeddings, after a change of the vocabulary

Each tensor is written once: not again under the names of PEFT's wrappers (`original_module`, `modules_to_save`), which
files of earlier versions have, and one of several tied tensors, that of the input embedding. Names are resolved by the
modules of the model and not by their text, since a module may be called anything.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lily.checkpoint import format
from lily.checkpoint.heads import wrong_head
from lily.errors import LilyError
from lily.io import untrusted
from lily.io.untrusted import read_header
from lily.layers.find import names_of_parameters
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import SharingPlan
from lily.plan.wrappers import unwrapped

INSERTED = re.compile(r"\.(original_module|(token_adapter\.)?base_layer(\.base_layer)*)(?=\.)")
COPY = re.compile(r"^(?P<module>.+)\.modules_to_save\.(?P<key>.+)$")
ROWS = "token_adapter.trainable_tokens_delta"


def base_modules(model: nn.Module, name: str = "", path: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the base model, path in this model, module), below PEFT's layers and wrappers, and these themselves."""
    yield unwrapped(f"{name}.").removeprefix(format.PREFIX).removesuffix("."), unwrapped(f"{path}.")[:-1], model
    if isinstance(model, TrainableTokensWrapper):
        inner = "token_adapter"
    elif isinstance(model, AuxiliaryTrainingWrapper):
        inner = "original_module"
    elif isinstance(model, BaseTunerLayer):
        inner = "base_layer"
    else:
        for key, child in model.named_children():
            yield from base_modules(child, f"{name}.{key}" if name else key, f"{path}.{key}" if path else key)
        return
    wrapped = getattr(model, inner, None)
    if wrapped is not None:  # the bank has none
        yield from base_modules(wrapped, name, f"{path}.{inner}" if path else inner)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself that a state dict has, by their names in it."""
    found = {**module._parameters, **module._buffers}
    unsaved = module._non_persistent_buffers_set
    return {key: tensor for key, tensor in found.items() if tensor is not None and key not in unsaved}


def tied_modules(model: nn.Module) -> tuple[str | None, list[str]]:
    """The input embedding's name in the base model, and those of the modules that have its weight."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None, []
    found = list(base_modules(model))
    name = next((name for name, _, module in found if module is embedding), None)
    weights = [m._parameters.get("weight") for n, _, m in found if n == name]
    weight = next((w for w in weights if w is not None), None)
    if name is None or weight is None:
        return name, []
    return name, sorted({n for n, _, m in found if n != name and m._parameters.get("weight") is weight})


@dataclass(frozen=True)
class Trained:
    """The modules that an adapter trains beside its own tensors; each by its name in the base model.

    Attributes:
        saved: modules saved whole -> (path in this model, module), the outermost of PEFT's layers and wrappers.
        nested: a module saved whole that is inside another one -> that one.
        rows: layers with trained rows -> (path in this model, module, indices).
        followers: layers with the same rows, since their weight is tied to the input embedding.
        embedding: the input embedding; None: the model has none.
        tied: the modules that have its weight.
    """

    saved: dict[str, tuple[str, nn.Module]]
    nested: dict[str, str]
    rows: dict[str, tuple[str, nn.Module, list[int]]]
    followers: list[str]
    embedding: str | None
    tied: list[str]


def trained_beside(model: nn.Module, config: LilyConfig) -> Trained:
    """What an adapter trains beside its own tensors, in a model with or without it, as PEFT selects it."""
    outermost: dict[str, tuple[str, nn.Module]] = {}
    for name, path, module in base_modules(model):
        outermost.setdefault(name, (path, module))
    # as PEFT: a textual suffix, not at a dot boundary
    wanted = (*(config.modules_to_save or ()), *(config.modules_to_tie or ()))
    saved: dict[str, tuple[str, nn.Module]] = {}
    nested: dict[str, str] = {}
    for name, found in outermost.items():
        if name and name.endswith(wanted):
            if (outer := next((n for n in saved if name.startswith(f"{n}.")), None)) is None:
                saved[name] = found
            else:
                nested[name] = outer
    embedding, tied = tied_modules(model)
    asked = config.trainable_token_indices or {}
    asked = asked if isinstance(asked, dict) else {embedding or "embed_tokens": asked}
    rows = {n: (*found, i) for target, i in asked.items() for n, found in outermost.items() if n.endswith(target)}
    first = rows.get(embedding or "")
    followers = [n for n in tied if first is not None and (n not in rows or rows[n][2] == first[2])]
    rows = {n: row for n, row in rows.items() if n not in followers}
    return Trained(saved, nested, rows, followers, embedding, tied)


class Beside:
    """What a file of an adapter may and must hold besides its own tensors.

    Args:
        model: the model, with or without its adapters.
        config: the adapter's configuration.
        plan: the adapter's plan.
        adapter: name of the adapter, if the model has it.

    Attributes:
        base: name in the base model -> its tensor.
        paths: name in the base model -> name in this model.
        saved: name in the base model -> tensor, for every module saved whole: the adapter's copy if it has one.
        rows: name in the file -> shape, of trained rows of an embedding.
        biases: names of the trained biases.
        embedding: name of the input embedding; None: the model has none.
        row_followers: names of rows that PEFT repeats, since they are tied to the input embedding's.
        embeddings: names of the layers whose frozen tensors are stored too when the vocabulary was changed.
        needed: names that a file must have; a tensor tied to another one need not be there.
    """

    def __init__(self, model: nn.Module, config: LilyConfig, plan: SharingPlan, adapter: str | None = None) -> None:
        self.config = config
        self.base: dict[str, Tensor] = {}
        self.paths: dict[str, str] = {}
        self.saved: dict[str, Tensor] = {}
        self.rows: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, str] = {}  # name of a saved tensor or of rows -> name in this model, for PEFT's loader
        modules = list(base_modules(model))
        for name, path, module in modules:
            for key, tensor in own_tensors(module).items():
                if not isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
                    self.base[_join(name, key)] = tensor
                    self.paths[_join(name, key)] = _join(path, key)
        trained = trained_beside(model, config)
        for name, (path, module) in trained.saved.items():
            if isinstance(module, ModulesToSaveWrapper):
                mine = adapter in module.modules_to_save
                module = module.modules_to_save[adapter] if mine else module.original_module
            for key, tensor in module.state_dict(keep_vars=True).items():
                self.saved[unwrapped(f"{name}.{key}")] = tensor
                self._places[unwrapped(f"{name}.{key}")] = unwrapped(f"{path}.{key}")
        for name, (path, _, indices) in trained.rows.items():
            self.rows[f"{name}.{ROWS}"] = (len(indices), *_shape(self.base[f"{name}.weight"])[1:])
            self._places[f"{name}.{ROWS}"] = f"{path}.{ROWS}"
        follows = tuple(f"{name}." for name in config.modules_to_tie or ())
        self.embedding, self.row_followers = trained.embedding, {f"{name}.{ROWS}" for name in trained.followers}
        targets = {spec.path for spec in format.specs_of(plan)}
        self.biases = [
            name for name in self.base
            if config.bias != "none" and name.rpartition(".")[2] == "bias" and name not in self.saved
            and (config.bias == "all" or name.rpartition(".")[0] in targets)
        ]  # fmt: skip
        self.embeddings = {trained.embedding, *trained.tied} | _output_embedding(model, modules)
        self.needed = [*(n for n in self.saved if not n.startswith(follows)), *self.biases, *self.rows]

    def resolve(self, name: str) -> tuple[str, str] | None:
        """What a name in a file is: `saved`, `rows`, `base` or `copy` (of a saved tensor), and its name in the base.

        Returns:
            None if there can be no such tensor in a file of the adapter.
        """
        plain = unwrapped(name).removeprefix(format.PREFIX)
        if plain in self.saved:
            return "saved", plain
        if plain in self.rows:
            return "rows", plain
        if plain in self.row_followers:
            return "copy", f"{self.embedding}.{ROWS}"
        if (match := COPY.match(plain)) is not None and plain not in self.base:
            keys = (match["key"], match["key"].partition(".")[2])  # PEFT removes the adapter's name only from the end
            copied = next((n for key in keys if (n := f"{match['module']}.{key}") in self.saved), None)
            return None if copied is None else ("copy", copied)
        plain = plain if plain in self.base else INSERTED.sub("", plain)
        owner, _, key = plain.rpartition(".")
        known = owner in self.embeddings or plain in self.biases or (key == "bias" and self.config.bias == "all")
        return ("base", plain) if known and plain in self.base else None

    def tensor_of(self, kind: str, name: str) -> Tensor | None:
        """The model's tensor of a resolved name; None for rows, which a model without the adapter does not have."""
        return None if name in self.rows else self.base[name] if kind == "base" else self.saved[name]

    def check(
        self, other: Mapping[str, Tensor], loose_sizes: bool = False, labels: Sequence[str] | None = None
    ) -> None:
        """Check names, shapes and dtypes of a file's entries besides Lily's.

        Args:
            other: name -> tensor, which may be on the meta device.
            loose_sizes: do not compare shapes.
            labels: the classes, for the error about a head of another size.

        Raises:
            LilyError: if a tensor is missing, does not belong to the adapter, or has the wrong shape or dtype.
        """
        present = set()
        for name, tensor in other.items():
            resolved = self.resolve(name)
            if resolved is None:
                raise LilyError(
                    f"{name!r} does not belong to a Lily adapter of this configuration (modules_to_save="
                    f"{sorted(self.config.modules_to_save or ())}, bias={self.config.bias!r}) on this model; is it the "
                    "base model that the adapter was trained on?"
                )
            present.add(resolved[1])
            mine = self.tensor_of(*resolved)
            expected = self.rows[resolved[1]] if mine is None else _shape(mine)
            if not loose_sizes and tuple(tensor.shape) != expected:
                if resolved[0] == "saved" and (wrong := wrong_head(name, tensor.shape, expected, labels)) is not None:
                    raise wrong
                resized = ""
                if resolved[1].rpartition(".")[0] in self.embeddings and tensor.ndim:
                    resized = f", with its vocabulary resized (resize_token_embeddings({tensor.shape[0]}))"
                raise LilyError(
                    f"{name!r} has shape {tuple(tensor.shape)}, but the model's has {expected}; is it the base model "
                    f"that the adapter was trained on{resized}?"
                )
            floats = tensor.dtype in untrusted.FLOATS and (mine is None or mine.is_floating_point())
            if not floats and (mine is None or tensor.dtype != mine.dtype):
                there = "a float type" if mine is None else _type(mine)
                raise LilyError(f"{name!r} has dtype {_type(tensor)}, but the model's has {there}")
        missing = next((name for name in self.needed if name not in present), None)
        if missing is not None:
            raise LilyError(f"the adapter file has no {missing!r}, which its configuration trains; is it complete?")

    def for_model(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checked file's entries under the names that PEFT's loader expects for a model with the adapter.

        Lily's are unchanged, copies are left out, and every tensor tied to one of the file is there too.
        """
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            resolved = None if format.KEY.match(unwrapped(name)) else self.resolve(name)
            if resolved is None:
                out[name] = tensor
            elif resolved[0] != "copy":
                out[self._place(*resolved)] = tensor
        for name in self.config.modules_to_tie or ():
            source, place = self._places[f"{self.embedding}.weight"], self._places[f"{name}.weight"]
            if place not in out and source in out:
                out[place] = out[source]
        mine = [("base", n) for n in self.base] + [("saved", n) for n in self.saved]
        ids = {self._place(*m): id(self.tensor_of(*m)) for m in mine}
        given = {ids[name]: tensor for name, tensor in out.items() if name in ids}
        return out | {name: given[key] for name, key in ids.items() if key in given and name not in out}

    def tie(self, model: nn.Module, adapter: str) -> None:
        """Let the modules saved whole that are tied to the input embedding have its parameter, after loading.

        PEFT ties them as it wraps them, which is undone where parameters are replaced (`low_cpu_mem_usage`).
        """
        wrappers = {name: module for name, _, module in base_modules(model) if isinstance(module, ModulesToSaveWrapper)}
        for name in self.config.modules_to_tie or ():
            source = wrappers[self.embedding or ""].modules_to_save[adapter]
            wrappers[name].modules_to_save[adapter].weight = source.weight

    def _place(self, kind: str, name: str) -> str:
        return self.paths[name] if kind == "base" else self._places[name]


def once(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that PEFT collects for an adapter's file, each tensor once.

    Args:
        model: the model with the adapter.
        adapter: its name.
        state: name in the file -> tensor.
    """
    embedding, _ = tied_modules(model)
    ids: dict[str, int] = {}  # name in a file -> identity of the model's tensor
    first: list[str] = []  # paths of the input embedding, whose name is kept of tied tensors
    renamed: dict[str, str | None] = {}  # start of a name -> what replaces it; None: no such tensor is written
    for name, path, module in base_modules(model):
        ids.update((_join(path, key), id(tensor)) for key, tensor in own_tensors(module).items())
        if name == embedding:
            first.append(f"{path}.")
        if isinstance(module, ModulesToSaveWrapper):
            own = adapter in module.modules_to_save
            # the frozen original is written only for an adapter that does not replace it
            renamed |= {f"{path}.original_module.": None if own else f"{path}.", f"{path}.modules_to_save.": None}
            if own:
                copy = module.modules_to_save[adapter].state_dict(keep_vars=True)
                ids.update((f"{path}.{key}", id(tensor)) for key, tensor in copy.items())
        elif isinstance(module, TrainableTokensWrapper):
            # PEFT writes the embedding's tensors by their names in the model too, which are those of all adapters
            renamed[f"{path}.{ROWS}" if module.token_adapter.tied_adapter else f"{path}.{ROWS}."] = None
    lily = {name: tensor for name, tensor in state.items() if format.KEY.match(unwrapped(name))}
    out, written = dict(lily), set()
    for name in sorted(state.keys() - lily.keys(), key=lambda name: not unwrapped(name).startswith(tuple(first))):
        plain, kept = unwrapped(name), name
        start = next((start for start in renamed if plain.startswith(start)), None)
        if start is not None:
            if (replacement := renamed[start]) is None:
                continue
            kept = replacement + plain.removeprefix(start)
        if (own_id := ids.get(plain)) is None or own_id not in written:
            out[kept] = state[name]
            written.add(own_id)
    return out


def resize_to_file(model: Any, folder: Path) -> None:
    """Give a base model the vocabulary that an adapter's file holds, if the file holds every embedding whole.

    Args:
        model: the base model, without adapters.
        folder: the adapter's folder.
    """
    embedding, tied = tied_modules(model)
    wanted = {embedding, *_output_embedding(model, base_modules(model))} - set(tied) - {None}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file() or not wanted:
        return
    entries = {INSERTED.sub("", name.removeprefix(format.PREFIX)): e for name, e in read_header(file).entries.items()}
    rows = {entries[key].meta.shape[0] if (key := f"{name}.weight") in entries else None for name in wanted}
    size, own = rows.pop(), getattr(model.get_input_embeddings(), "weight", None)  # image models embed patches
    if not rows and own is not None and size not in (None, own.shape[0]):
        model.resize_token_embeddings(size, mean_resizing=False)


@contextlib.contextmanager
def keep_tied(model: nn.Module) -> Iterator[None]:
    """Context: parameters that have several names have them afterwards too, when each name was given a parameter."""
    names = names_of_parameters(model)
    yield
    for first, *others in names.values():
        for name in others:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, model.get_parameter(first))


def _output_embedding(model: nn.Module, modules: Iterable[tuple[str, str, nn.Module]]) -> set[str]:
    with contextlib.suppress(AttributeError, NotImplementedError):
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
        return {name for name, _, module in modules if output is not None and module is output}
    return set()


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 keeps the shape there, and an empty tensor


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
