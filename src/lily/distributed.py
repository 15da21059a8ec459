"""Gather, save and load the adapters of distributed models.

DDP keeps the whole model in every process; FSDP and DeepSpeed's ZeRO-3 keep a part of each tensor in each. Only the
adapter is gathered, one tensor (or, under FSDP1, one unit) at a time, and the first process writes the same files as a
single process.

    lily.save_adapter(model, "adapter")          # every process calls it
    lily.distributed.load_weights(model, "adapter")
    lily.sum_bank_gradients(stage)               # pipeline stages in separate processes

Every function here that takes a model is a collective: all processes must call it, with the wrapped model (DDP, FSDP,
DeepSpeedEngine) or with the PeftModel. Without a process group they do the same as PEFT.
"""

from __future__ import annotations

import os
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from lily.errors import LilyError
from lily.io.atomic import new_folder
from lily.layers import sharding
from lily.layers.bank import LilyBank
from lily.layers.find import names_of_parameters
from lily.layers.sharding import from_first as from_first
from lily.layers.sharding import world_size as world_size
from lily.plan.vocabulary import vocabulary_changed
from lily.plan.wrappers import plain_name, plain_names, unwrapped


def rank() -> int:
    """Index of this process; process 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def peft_model_of(model: nn.Module) -> PeftModel:
    """The PeftModel inside a wrapped model.

    Raises:
        LilyError: if there is none.
    """
    inner = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if inner is None:
        raise LilyError(f"this {type(model).__name__} contains no PeftModel; create one with peft.get_peft_model")
    return inner


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of the model's adapters, on the CPU of the first process.

    Args:
        model: the wrapped model. All processes must call this.

    Returns:
        In the first process: name in the `PeftModel` -> tensor, for all adapters (including frozen ones, saved modules
        and their buffers); for `PeftModel.save_pretrained(state_dict=...)`. In the others: an empty dict.
    """
    parameters, buffers = _parts(model)
    state: dict[str, Tensor] = {}
    for unit in sharding.units(model, parameters, change=False):
        for name, p in unit.items():
            tensor = sharding.whole(p)
            if rank() == 0:
                state[parameters[name]] = tensor.detach().cpu().clone()
    if rank() == 0:
        state.update({name: b.detach().cpu().clone() for name, b in buffers.items()})
    return _with_tied(model, state)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Gather the adapter and write it as PEFT does, from the first process.

    Args:
        model: the wrapped model. All processes must call this.
        folder: the folder to write, atomically.
        overwrite: replace it if it exists.

    Raises:
        LilyError: in all processes, if the folder exists or its parent does not.
        OSError: in all processes, if it cannot be written.
    """
    # without a process group PEFT selects the tensors, for VeRA including frozen buffers
    alone, failed = not (dist.is_available() and dist.is_initialized()), None
    state = None if alone else gathered_state(model)
    if rank() == 0:
        try:
            inner = peft_model_of(model)
            with new_folder(folder, overwrite) as new, plain_names(inner):
                inner.save_pretrained(str(new), state_dict=state)
        except (LilyError, OSError) as error:
            failed = error
    failed = from_first(failed)
    if failed is not None:
        raise failed


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load a saved adapter's weights into the model's active adapter, which must have the same configuration.

    Args:
        model: the wrapped model. All processes must call this; only the first one reads the folder.
        folder: an adapter folder of PEFT.

    Raises:
        LilyError: in all processes, if the file lacks a tensor of the adapter or has one with another shape.
        OSError: in all processes, if it cannot be read.
    """
    if world_size() == 1:
        file = peft.load_peft_weights(str(folder), device="cpu")
        peft.set_peft_model_state_dict(peft_model_of(model), file)
        return
    parameters, buffers = _parts(model)
    state: Any = None
    if rank() == 0:
        try:
            state = _by_name(model, peft.load_peft_weights(str(folder), device="cpu"))
        except (LilyError, OSError) as error:
            state = error
    state = from_first(state)
    if isinstance(state, Exception):
        raise state
    with torch.no_grad():
        for unit in sharding.units(model, parameters, change=True):
            for name, p in unit.items():
                if parameters[name] in state:
                    sharding.put(p, state[parameters[name]])
        for name, buffer in buffers.items():
            if name in state:
                buffer.copy_(state[name])


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The whole state of the optimizer, as the `state_dict()` of an optimizer in a single process.

    Args:
        model: the wrapped model (DDP, FSDP1 or FSDP2). All processes must call this.
        optimizer: optimizer of its parameters, which accelerate may have wrapped.

    Returns:
        In the first process: the state, on the CPU. In the others: undefined.
    """
    from torch.distributed.checkpoint import state_dict  # takes time to import

    plain = getattr(optimizer, "optimizer", optimizer)
    # for a model on the CPU, FSDP1 would offload into memory that it frees
    offload = next(model.parameters()).device.type != "cpu"
    whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=offload)
    numbers = {name: i for i, name in enumerate(_optimized(model, plain))}
    named: Any = state_dict.get_optimizer_state_dict(model, plain, options=whole)
    groups = [{**group, "params": [numbers[n] for n in group["params"]]} for group in named["param_groups"]]
    return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Load the result of `optimizer_state`, or of a plain optimizer's `state_dict()`.

    Args:
        model: the wrapped model. All processes must call this.
        optimizer: optimizer of its parameters.
        state: the state, the same in all processes.
    """
    from torch.distributed.checkpoint import state_dict

    plain = getattr(optimizer, "optimizer", optimizer)
    names = _optimized(model, plain)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    named: Any = {"state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}
    state_dict.set_optimizer_state_dict(model, plain, named, options=state_dict.StateDictOptions(full_state_dict=True))


def _optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    sharding.reshard(model)
    names = {id(p): unwrapped(name) for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _parts(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The tensors of the adapters: name of a parameter in `model` -> in its PeftModel; name there -> buffer."""
    sharding.reshard(model)
    peft_model = peft_model_of(model)
    root = next(name for name, module in model.named_modules() if module is peft_model)
    inside = f"{root}." if root else ""
    prefix, plain = getattr(peft_model.base_model, "prefix", "lora_"), plain_name(peft_model)
    resized = {id(p) for module in _resized_embeddings(peft_model) for p in module.parameters()}
    parameters = {
        name: plain(name.removeprefix(inside))
        for name, p in model.named_parameters()
        if p.requires_grad or any(part in name for part in (prefix, SAVED, ROWS)) or id(p) in resized
    }
    buffers = {plain(name): b for name, b in peft_model.named_buffers() if SAVED in name}
    return parameters, buffers


SAVED, ROWS = "modules_to_save.", "token_adapter.trainable_tokens_delta."


def _resized_embeddings(model: PeftModel) -> list[nn.Module]:
    """The embeddings that PEFT writes beside an adapter: those of a changed vocabulary."""
    base: Any = model.get_base_model()
    if not any(vocabulary_changed(base, config) for config in model.peft_config.values()):
        return []
    return [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]


def _with_tied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with each tensor under all names that it has in the PeftModel; PEFT looks up each."""
    groups = (list(map(unwrapped, names)) for names in names_of_parameters(peft_model_of(model)).values())
    known = {name: state[n] for group in groups for n in group if n in state for name in group}
    return {**known, **state}


def _by_name(model: nn.Module, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by their names in the PeftModel, which PEFT maps to names in the file when it saves."""
    parameters, buffers = _parts(model)
    here = {parameters[name]: p for name, p in model.named_parameters() if name in parameters} | buffers
    here = _with_tied(model, here)
    names = {id(tensor): name for name, tensor in here.items()}
    out = {}
    inner = peft_model_of(model)
    with plain_names(inner):
        written = get_peft_model_state_dict(inner, state_dict=here)
    for key, tensor in written.items():
        expected = sharding.shape_of(tensor)
        if key not in file:
            raise LilyError(f"the adapter file has no {key}; is it the file of this configuration and base model?")
        if file[key].shape != expected and not sharding.is_flat(tensor):
            raise LilyError(f"{key!r} has shape {tuple(file[key].shape)} in the file, expected {tuple(expected)}")
        out[names[id(tensor)]] = file[key]
    return out


@torch.no_grad()
def sum_bank_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every pipeline stage the whole gradient of the tensors that layers of several stages share.

    With `torch.distributed.pipelining` each process holds some of the layers. The bank's tensors are shared by all of
    them, so every process has them and computes the part of their gradient from its layers. Called after the
    schedule's backward, before clipping and the optimizer's step, this sums the parts, so that the copies stay equal. A
    router belongs to one layer and thus to one stage.

    Args:
        model: the stage with the bank; layers of other stages may be missing.
        group: the processes with the stages of one pipeline; default: all.

    Raises:
        LilyError: if there is no bank in the model.
    """
    bank = next((m for m in model.modules() if isinstance(m, LilyBank)), None)
    if bank is None:
        raise LilyError(f"this {type(model).__name__} contains no lily_bank; keep the adapted model's in each stage")
    for shared in bank.parameters():
        if shared.requires_grad:
            if shared.grad is None:  # no layer of this stage uses it
                shared.grad = torch.zeros_like(shared)
            dist.all_reduce(shared.grad, group=group)
