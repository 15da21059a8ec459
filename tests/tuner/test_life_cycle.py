"""Every operation on several adapters, for every kind of adapted layer: outputs, active adapters and what trains.

The judge is PEFT's LoRA. Each static Lily adapter has a LoRA with the same updates; an operation runs on both, and
after each of its steps the two models must agree.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from every_kind import KINDS, base, lily_config, lora_config, output, write_pair
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from lily import LilyError

pytestmark = [pytest.mark.sample(every=10), pytest.mark.filterwarnings("ignore")]


class Method:
    """One of the two methods, with two trained adapters in folders.

    Attributes:
        name: `lily` or `lora`.
        first, second: the folders.
    """

    def __init__(self, name: str, kind: str, folder: Path, tmp_path: Path) -> None:
        self.name, self.kind, self.tmp = name, kind, tmp_path / name
        self.first, self.second = (str(folder / number / name) for number in ("first", "second"))

    def config(self, **options: Any) -> Any:
        return (lily_config if self.name == "lily" else lora_config)(self.kind, **options)

    def other_config(self) -> Any:
        """Another rank and, for Lily, another sharing of the same layers."""
        return self.config(**({"r": 3, "stride_A": 3, "num_B": 3} if self.name == "lily" else {"r": 3}))

    def loaded(self, trainable: bool) -> PeftModel:
        return copy.deepcopy(loaded(self.first, self.second, trainable))


@functools.cache
def loaded(first: str, second: str, trainable: bool) -> PeftModel:
    model = PeftModel.from_pretrained(base(), first, is_trainable=trainable).eval()
    model.load_adapter(second, "second")
    return model


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("pairs")
            for seed, number in enumerate(("first", "second")):
                write_pair(kind, made[kind] / number, seed=seed)
        return made[kind]

    return folder_of


def seen(model: nn.Module) -> dict[str, Any]:
    """What both methods must agree on; `trains` has the flags of each adapter's tensors and of the base model's."""
    trains: dict[str, set[bool]] = {}
    adapters = list(getattr(model, "peft_config", None) or {})
    for name, p in model.named_parameters():
        own = [a for a in adapters if f".{a}." in f"{name}." and ("lily_" in name or "lora_" in name)]
        saved = [a for a in adapters if f".modules_to_save.{a}." in name]
        owner = own[0] if own else f"{saved[0]}, saved" if saved else "base"
        trains.setdefault(owner, set()).add(p.requires_grad)
    layers = (m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper)))
    active = {tuple(m.active_adapters) for m in layers}
    return {"adapters": adapters, "active": active, "trains": trains, "output": output(model)}


Steps = Iterator[nn.Module]
OPERATIONS: dict[str, Callable[[Method, PeftModel], Steps]] = {}
FROM_BASE: dict[str, Callable[[Method, nn.Module], Steps]] = {}
MERGING = set()


def operation(name: str, merges: bool = False) -> Callable[[Any], Any]:
    """Register a function that operates on a model with two loaded adapters and yields it after each step."""

    def register(function: Any) -> Any:
        OPERATIONS[name] = function
        if merges:
            MERGING.add(name)
        return function

    return register


def from_base(name: str) -> Callable[[Any], Any]:
    """Register a function that operates on a base model."""
    return lambda function: FROM_BASE.setdefault(name, function)


def copied(model: PeftModel, source: str, name: str) -> None:
    """Copy an adapter as TRL makes the reference of DPO and GRPO, which misses only LoRA's embeddings."""
    model.add_adapter(name, model.peft_config[source])
    for path, p in model.named_parameters():
        if f".{source}." in path or path.endswith((f"lora_embedding_A.{source}", f"lora_embedding_B.{source}")):
            model.get_parameter(f"{path}.".replace(f".{source}.", f".{name}.")[:-1]).data.copy_(p.data)


@operation("load")
def _(method: Method, model: PeftModel) -> Steps:
    yield model


@operation("switch")
def _(method: Method, model: PeftModel) -> Steps:
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        yield model


@operation("switch for inference")
def _(method: Method, model: PeftModel) -> Steps:
    model.set_adapter("second", inference_mode=True)
    yield model
    model.load_adapter(method.first, "third")
    yield model


@operation("several at once")
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.set_adapter(["default", "second"])
    yield model
    model.set_adapter("default")
    yield model


@operation("add")
def _(method: Method, model: PeftModel) -> Steps:
    model.add_adapter("third", method.config())
    yield model
    model.set_adapter("third")
    yield model
    model.set_adapter("second")
    yield model


@operation("add with another plan")
def _(method: Method, model: PeftModel) -> Steps:
    model.add_adapter("third", method.other_config())
    yield model
    model.base_model.set_adapter(["second", "third"])
    yield model


@operation("add while several act")
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.set_adapter(["default", "second"])
    model.add_adapter("third", method.config())
    yield model


@operation("load a trainable one")
def _(method: Method, model: PeftModel) -> Steps:
    model.load_adapter(method.second, "third", is_trainable=True)
    yield model
    model.set_adapter("third")
    yield model


@operation("load in little memory")
def _(method: Method, model: PeftModel) -> Steps:
    model.load_adapter(method.first, "third", low_cpu_mem_usage=True)
    yield model
    model.set_adapter("third")
    yield model


@operation("load into the same name")
def _(method: Method, model: PeftModel) -> Steps:
    model.load_adapter(method.second, "default")
    yield model


@operation("hot-swap")
def _(method: Method, model: PeftModel) -> Steps:
    hotswap_adapter(model, method.second, "default", torch_device="cpu")
    yield model
    model.set_adapter("second")
    hotswap_adapter(model, method.first, "second", torch_device="cpu")
    yield model


@operation("copy")
def _(method: Method, model: PeftModel) -> Steps:
    copied(model, "second", "third")
    yield model
    model.set_adapter("third")
    yield model


@operation("rename")
def _(method: Method, model: PeftModel) -> Steps:
    copied(model, "default", "third")
    model.delete_adapter("default")
    model.set_adapter("third")
    yield model


@operation("delete")
def _(method: Method, model: PeftModel) -> Steps:
    model.delete_adapter("default")
    yield model
    model.load_adapter(method.first, "default")
    model.delete_adapter("default")
    yield model


@operation("delete one of several")
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.set_adapter(["default", "second"])
    model.delete_adapter("default")
    yield model


@operation("delete all")
def _(method: Method, model: PeftModel) -> Steps:
    model.delete_adapter("second")
    model.base_model.delete_adapter("default")
    yield model.base_model.model


@operation("disable and enable")
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.disable_adapter_layers()
    yield model
    model.base_model.enable_adapter_layers()
    yield model


@operation("the disable_adapter context")
def _(method: Method, model: PeftModel) -> Steps:
    with model.disable_adapter():
        yield model
    yield model


@operation("set_requires_grad")
def _(method: Method, model: PeftModel) -> Steps:
    model.set_requires_grad("second")
    yield model
    model.add_adapter("third", method.config())
    yield model
    model.set_requires_grad(["default", "second"], False)
    yield model
    model.set_requires_grad(["default"])
    yield model


@operation("save and load")
def _(method: Method, model: PeftModel) -> Steps:
    model.save_pretrained(method.tmp)
    back = PeftModel.from_pretrained(base(), method.tmp / "second").eval()
    yield back
    back.load_adapter(method.tmp, "other")
    back.base_model.set_adapter(["default", "other"])
    yield back


@operation("deepcopy")
def _(method: Method, model: PeftModel) -> Steps:
    twin = copy.deepcopy(model)
    model.delete_adapter("default")
    yield twin
    twin.set_adapter("second")
    yield twin


@operation("merge one of two", merges=True)
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["second"])
    yield model
    model.unmerge_adapter()
    yield model


@operation("merge both and switch", merges=True)
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    yield model
    model.set_adapter("second")
    yield model


@operation("add while merged", merges=True)
def _(method: Method, model: PeftModel) -> Steps:
    model.merge_adapter()
    model.load_adapter(method.second, "third")
    yield model


@operation("merge_and_unload one of two", merges=True)
def _(method: Method, model: PeftModel) -> Steps:
    yield model.merge_and_unload(adapter_names=["second"])


@operation("merge_and_unload both", merges=True)
def _(method: Method, model: PeftModel) -> Steps:
    model.base_model.set_adapter(["default", "second"])
    yield model.merge_and_unload()


@operation("unload")
def _(method: Method, model: PeftModel) -> Steps:
    plain = model.unload()
    yield plain
    again = get_peft_model(plain, method.config())
    yield again
    again.load_adapter(method.first, "default")
    yield again


@from_base("get_peft_model")
def _(method: Method, model: nn.Module) -> Steps:
    yield get_peft_model(model, method.config())


@from_base("get_peft_model for inference")
def _(method: Method, model: nn.Module) -> Steps:
    yield get_peft_model(model, method.config(inference_mode=True))


@from_base("get_peft_model twice")
def _(method: Method, model: nn.Module) -> Steps:
    get_peft_model(model, method.config())
    yield get_peft_model(model, method.other_config())


@from_base("get_peft_model twice with another name")
def _(method: Method, model: nn.Module) -> Steps:
    get_peft_model(model, method.config())
    second = get_peft_model(model, method.config(), adapter_name="second")
    yield second
    second.load_adapter(method.first, "default")
    second.set_adapter("default")
    yield second


@from_base("load a trainable one")
def _(method: Method, model: nn.Module) -> Steps:
    model = PeftModel.from_pretrained(model, method.first, is_trainable=True)
    yield model
    model.load_adapter(method.second, "second", is_trainable=True)
    yield model


@from_base("transformers: add")
def _(method: Method, model: nn.Module) -> Steps:
    model.add_adapter(method.config(), "default")
    yield model
    model.add_adapter(method.other_config(), "second")
    yield model
    model.set_adapter("default")
    yield model


@from_base("transformers: load")
def _(method: Method, model: nn.Module) -> Steps:
    model.load_adapter(method.first)
    yield model
    model.load_adapter(method.second, adapter_name="second")
    yield model


@from_base("transformers: switch, disable, delete")
def _(method: Method, model: nn.Module) -> Steps:
    model.load_adapter(method.first)
    model.load_adapter(method.second, adapter_name="second")
    model.set_adapter("default")
    yield model
    model.disable_adapters()
    yield model
    model.enable_adapters()
    yield model
    model.delete_adapter("default")
    yield model
    model.load_adapter(method.first, adapter_name="default")
    yield model
    model.delete_adapter(["default", "second"])
    yield model


@from_base("transformers: several at once")
def _(method: Method, model: nn.Module) -> Steps:
    model.add_adapter(method.config(), "default")
    model.add_adapter(method.config(), "second")
    model.set_adapter(["default", "second"])
    yield model


@from_base("transformers: load a trainable one")
def _(method: Method, model: nn.Module) -> Steps:
    model.load_adapter(method.first)
    model.load_adapter(method.second, adapter_name="second", is_trainable=True)
    yield model


# Of the class of a linear layer in all that this file tests, so they run with the slow tests.
SLOW = ("Conv1D", "conv")

# What LoRA cannot do: (kind, operation) -> the model whose output the last step must have.
BEYOND_LORA: dict[tuple[str, str], Callable[[Method], nn.Module]] = {
    ("embedding", "hot-swap"): lambda method: PeftModel.from_pretrained(base(), method.first),
    ("saved module", "hot-swap"): lambda method: PeftModel.from_pretrained(base(), method.first),
    ("parameter", "get_peft_model twice"): lambda method: base(),
    ("experts", "get_peft_model twice"): lambda method: base(),
    ("saved module", "transformers: load"): lambda method: PeftModel.from_pretrained(base(), method.second),
    ("saved module", "transformers: load a trainable one"): lambda method: PeftModel.from_pretrained(
        base(), method.second
    ),
    ("saved module", "transformers: switch, disable, delete"): lambda method: base(),
}


def steps_of(run: Callable[[Method], Steps], method: Method) -> list[Any]:
    """What is seen after each step, and at the end whether PEFT refused to activate several saved modules at once."""
    torch.manual_seed(0)
    steps: list[Any] = []
    try:
        steps += (seen(model) for model in run(method))
    except ValueError as error:
        if not any(
            part in str(error) for part in ("Only one adapter can be set at a time", "at once for modules_to_save")
        ):
            raise
        steps.append("refused")
    return steps


def compare(run: Callable[[Method], Steps], name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    lora, lily = (Method(method, kind, folder, tmp_path) for method in ("lora", "lily"))
    steps = {"lily": steps_of(run, lily)}
    if (kind, name) in BEYOND_LORA:
        expected = output(BEYOND_LORA[kind, name](lily))
        assert torch.allclose(steps["lily"][-1]["output"], expected, atol=1e-5)
        return
    steps["lora"] = steps_of(run, lora)
    assert len(steps["lily"]) == len(steps["lora"]) > 0
    for number, (judge, ours) in enumerate(zip(steps["lora"], steps["lily"], strict=True)):
        if "refused" in (judge, ours):
            assert judge == ours, f"step {number}"
            continue
        for what in ("adapters", "active", "trains"):
            # without its last adapter LoRA leaves empty layers, and Lily the base model's
            expected = set() if what == "active" and not judge["adapters"] else judge[what]
            assert ours[what] == expected, f"{what} after step {number}"
        assert torch.allclose(ours["output"], judge["output"], atol=1e-4, rtol=1e-4), f"output after step {number}"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("kind", "trainable"),
    [
        pytest.param(
            kind, trainable, marks=[pytest.mark.slow] if kind in SLOW or (trainable and kind != "linear") else []
        )
        for trainable in (False, True)
        for kind in KINDS
    ],
)
def test_an_operation_on_two_adapters_is_what_it_is_for_lora(kind, name, trainable, pairs, tmp_path):
    if kind == "parallel" and name in MERGING:
        method = Method("lily", kind, pairs(kind), tmp_path)
        with pytest.raises(LilyError, match="runs in parallel to a Side"):
            list(OPERATIONS[name](method, method.loaded(trainable)))
        return
    compare(lambda method: OPERATIONS[name](method, method.loaded(trainable)), name, kind, pairs(kind), tmp_path)


@pytest.mark.parametrize("name", FROM_BASE)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_an_operation_on_a_base_model_is_what_it_is_for_lora(kind, name, pairs, tmp_path):
    compare(lambda method: FROM_BASE[name](method, base()), name, kind, pairs(kind), tmp_path)
