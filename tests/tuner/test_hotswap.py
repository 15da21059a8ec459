"""An adapter is replaced by another one in place: by PEFT, transformers and diffusers, eager and compiled."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from every_kind import KINDS, base, ids, lily_config, lora_config, output
from helpers import randomise
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from torch import nn

import lily
from lily import LilyConfig, LilyError
from lily.layers.find import layers_of
from lily.tuner.adapter import find

pytestmark = [pytest.mark.sample(every=8), pytest.mark.filterwarnings("ignore")]

BOTH = {"target_modules": ["linear", "transposed"]}  # two groups of three layers

# Everything at once that another adapter of the same layers can have.
OTHER = {
    "r": 3,
    "own_r": 1,
    "stride_A": 1,
    "num_B": 3,
    "gain": "signs",
    "distinct": "permute+signs",
    "scaling": 0.5,
}

CHANGES = {
    "smaller rank": {"r": 1},
    "larger rank and default scale": {"r": 5, "scaling": None},
    "scale of a layer": {"scaling_pattern": {"blocks.1.linear": 4.0}},
    "options of a group": {"group_options": {"linear": {"num_B": 3, "scaling": 0.1, "activation": "relu"}}},
    "rank of a group": {"rank_pattern": {"transposed": 4}},
    "one A and one B": {"stride_A": None, "num_A": 1, "num_B": 1},
    "an A per layer": {"stride_A": 1, "num_B": 4},
    "distinction": {"distinct": "signs", "distinct_seed": 4},
    "everything": OTHER,
    "activation and dropout": {"activation": "gelu", "dropout": 0.3},
    "uniform": {"routing": "uniform"},
    "token": {"routing": "token"},
    "shared router": {"routing": "sequence", "shared_router": True},
    "batch": {"routing": "batch"},
    "settling": {"routing": "token", "settled": 0.4},
}


def trained(kind="linear", seed=1, **options):
    """A model with a trained adapter."""
    model = randomise(get_peft_model(base(), lily_config(kind, **options)), scale=0.4, seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save." in name:
                p.mul_(1 + seed)
    return model.eval()


def written(folder, kind="linear", seed=1, **options):
    """A trained adapter's folder."""
    trained(kind, seed, **options).save_pretrained(folder)
    return str(folder)


def loaded(folder, **options):
    return PeftModel.from_pretrained(base(), folder, **options).eval()


def swap(model, folder, adapter="default"):
    hotswap_adapter(model, folder, adapter, torch_device="cpu")
    return output(model)


def close(got, expected):
    return torch.allclose(got, expected, atol=5e-6, rtol=1e-5)


def take_turns(model, others):
    """Each other model's adapter takes the place of the model's, and it computes what the other model does."""
    for other in others:
        state = get_peft_model_state_dict(other)
        hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
        assert close(output(model), output(other))


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_with_other_options_takes_the_place(change):
    first, second = trained(**BOTH), trained(seed=2, **{**BOTH, **CHANGES[change]})
    assert not torch.allclose(output(first), output(second), atol=1e-2)
    model = copy.deepcopy(first)
    take_turns(model, [second, first, second])
    # what would be saved now is the other adapter, to the last bit
    assert model.peft_config["default"].file_dict() == second.peft_config["default"].file_dict()
    state, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(second)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_swapped(kind):
    first, second = trained(kind), trained(kind, seed=2, **OTHER)
    assert not torch.allclose(output(first), output(second), atol=1e-2)
    model = copy.deepcopy(first)
    take_turns(model, [second, first])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert close(output(model), output(first))
    take_turns(model, [second, first])


@pytest.mark.parametrize(("one", "other"), [("sequence", "sequence"), ("static", "token"), ("token", "uniform")])
def test_a_prepared_model_takes_the_routings_of_the_given_configurations(one, other):
    first, second = trained(routing=one, **BOTH), trained(seed=2, routing=other, **{**BOTH, **OTHER})
    model, config = copy.deepcopy(first), second.peft_config["default"]
    prepare_model_for_compiled_hotswap(model, target_rank=7, config={"b": config})
    assert config.r == 3
    take_turns(model, [second, first, second])


def test_a_folder_takes_the_place_and_other_adapters_stay(tmp_path):
    folders = [written(tmp_path / str(seed), seed=seed, **options) for seed, options in enumerate(({}, {}, OTHER))]
    expected = [output(loaded(folder)) for folder in folders]
    model = loaded(folders[0])
    model.load_adapter(folders[1], "other")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert close(swap(model, folders[2]), expected[2])
    model.set_adapter("other")
    assert close(output(model), expected[1])
    assert close(swap(model, folders[0], "default"), expected[1])  # not the active one
    model.set_adapter("default")
    assert close(output(model), expected[0])


# --- training -------------------------------------------------------------------------------------------------------


def flags(model):
    return {p.requires_grad for name, p in model.named_parameters() if "lily_" in name or "lora_" in name}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("options", [{}, {"r": 1}], ids=["same shapes", "other shapes"])
def test_what_trains_and_in_which_mode_stays_as_with_lora(options, trainable, tmp_path):
    seen = {}
    for method, config in (("lily", lily_config), ("lora", lora_config)):
        get_peft_model(base(), config("linear")).save_pretrained(tmp_path / method / "a")
        get_peft_model(base(), config("linear", **options)).save_pretrained(tmp_path / method / "b")
        model = PeftModel.from_pretrained(base(), str(tmp_path / method / "a"), is_trainable=trainable)
        hotswap_adapter(model, str(tmp_path / method / "b"), "default", torch_device="cpu")
        seen[method] = (flags(model), model.training, model.active_adapters)
    assert seen["lily"] == seen["lora"]


def steps(model, optimizer):
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids()).square().mean().backward()
        optimizer.step()
    return output(model.eval())


def test_training_goes_on_with_the_optimizer_from_before(tmp_path):
    folder = written(tmp_path, seed=2)
    fresh = loaded(folder, is_trainable=True)
    before = output(fresh)
    expected = steps(fresh, torch.optim.SGD(fresh.parameters(), 0.1))
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps(model, optimizer)
    state = torch.get_rng_state()
    assert close(swap(model, folder), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert close(steps(model, optimizer), expected)
    assert not torch.allclose(expected, before, atol=1e-3)


def test_parameters_are_the_same_objects_whatever_their_shapes():
    model = trained(routing="token")
    before = {name: id(p) for name, p in model.named_parameters() if "lily_" in name}
    take_turns(model, [trained(routing="token", r=5, num_B=3)])
    assert {name: id(p) for name, p in model.named_parameters() if "lily_" in name} == before


@pytest.mark.parametrize("routing", ["static", "token"])
def test_a_prepared_model_trains_the_shared_tensors(routing):
    model, fresh = trained(routing=routing), trained(seed=2, routing=routing, r=3)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    take_turns(model, [fresh])
    expected = steps(fresh, torch.optim.AdamW(fresh.parameters(), 0.1))
    assert close(steps(model, torch.optim.AdamW(model.parameters(), 0.1)), expected)


def test_a_gradient_in_eval_mode_is_that_of_the_shared_tensors_and_nothing_is_stale():
    model = trained()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = output(model)
    model(input_ids=ids()).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lily_" in name)
    optimizer.step()
    after = output(model)
    assert not torch.allclose(before, after, atol=1e-3)
    assert close(output(model.eval()), after)


# --- what else changes an adapter of a prepared model ---------------------------------------------------------------


def prepared(model):
    model = copy.deepcopy(model)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    return model


def rescale(model):
    for layer in layers_of(model.base_model.model).values():
        layer.set_scale("default", 0.3)


def reload(model):
    model.load_adapter(model.other, "default")


def make_static(model):
    find(model).make_static({name: torch.arange(2.0) for name in find(model).layers})


CHANGED = {
    "scale": rescale,
    "load into the same name": reload,
    "collapse": make_static,
    "merge": lambda model: model.merge_adapter(),
    "disable": lambda model: model.disable_adapter_layers(),
}


@pytest.mark.parametrize("how", CHANGED)
def test_a_prepared_model_follows_every_change_of_its_adapter(how, tmp_path):
    plain = trained(routing="token" if how == "collapse" else "static")
    outputs = []
    for model in (plain, prepared(plain)):
        if how == "load into the same name":
            model.other = written(tmp_path, seed=2)
        before = output(model)
        CHANGED[how](model)
        outputs.append(output(model))
    assert close(*outputs)
    assert how == "merge" or not torch.allclose(before, outputs[0], atol=1e-3)


def test_a_prepared_model_saves_merges_and_deletes_as_any_other():
    other = trained(seed=2, **OTHER)
    model = prepared(trained())
    take_turns(model, [other])
    state, wanted = (get_peft_model_state_dict(m) for m in (model, other))
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert close(output(copy.deepcopy(model).merge_and_unload()), output(other))
    model.add_adapter("other", lily_config("linear"))
    model.delete_adapter("default")
    assert not any(layer.fixed_shapes for layer in layers_of(model.base_model.model).values())


# --- compiled -------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """An embedding, linear layers, a convolution and a parameter, quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 6), nn.Conv2d(1, 1, 3, padding=1)
        self.a, self.b = (nn.ModuleDict({"linear": nn.Linear(6, 6)}) for _ in range(2))
        self.own = Matrix()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = self.b["linear"](torch.tanh(self.a["linear"](x)))
        return self.own(x + self.conv(x.unsqueeze(1)).squeeze(1))


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T


def tiny():
    torch.manual_seed(0)
    return Tiny().eval()


EVERY = {"target_modules": ["embed", "linear", "conv"], "target_parameters": ["own.matrix"]}
COMPILED = {
    "every kind": ({**EVERY, "routing": "static"}, {**EVERY, **OTHER, "routing": "static"}),
    "token": ({"target_modules": ["linear"], "routing": "token"}, {"target_modules": ["linear"], **OTHER}),
    "sequence": ({"target_modules": ["linear"], "routing": "sequence"}, {"target_modules": ["linear"], **OTHER}),
    "batch": ({"target_modules": ["linear"], "routing": "batch"}, {"target_modules": ["linear"], **OTHER}),
    "static to token": (
        {"target_modules": ["linear"], "routing": "static"},
        {"target_modules": ["linear"], **OTHER, "routing": "token"},
    ),
}


def tokens():
    return torch.arange(10).view(2, 5) % 7


@pytest.fixture
def compiled():
    """Compile a model by a backend; after its first call, `torch.compiler` refuses to compile anything."""
    torch._dynamo.reset()

    def make(model, backend="eager"):
        made = torch.compile(model, backend=backend)

        def call():
            with torch.no_grad():
                out = made(input_ids=tokens())
            torch.compiler.set_stance("fail_on_recompile")
            return out

        return made, call

    yield make
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def tiny_adapter(folder, seed, **options):
    options = {"r": 2, "stride_A": 2, "num_B": 2, "scaling": 1.0, **options}
    model = randomise(get_peft_model(tiny(), LilyConfig(**options)), scale=0.4, seed=seed).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return str(folder), model(input_ids=tokens())


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("every kind", "eager"),
        ("token", "eager"),
        *(
            pytest.param(case, backend, marks=pytest.mark.slow)
            for case, backend in itertools.product(COMPILED, ["aot_eager", "inductor"])
        ),
    ],
)
def test_a_compiled_model_is_not_compiled_again(case, backend, compiled, tmp_path):
    first, second = COMPILED[case]
    (a, expected_a) = tiny_adapter(tmp_path / "a", 1, **first)
    (b, expected_b) = tiny_adapter(tmp_path / "b", 2, **{"routing": first["routing"], **second})
    model = PeftModel.from_pretrained(tiny(), a).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=LilyConfig.from_pretrained(b))
    model, call = compiled(model, backend)
    assert close(call(), expected_a)
    for folder, expected in ((b, expected_b), (a, expected_a), (b, expected_b)):
        hotswap_adapter(model, folder, "default", torch_device="cpu")
        assert close(call(), expected)


def test_without_preparation_another_rank_is_compiled_again_and_the_same_shape_is_not(compiled, tmp_path):
    a, _ = tiny_adapter(tmp_path / "a", 1, target_modules=["linear"])
    b, expected = tiny_adapter(tmp_path / "b", 2, target_modules=["linear"])
    c, _ = tiny_adapter(tmp_path / "c", 3, target_modules=["linear"], r=3)
    model, call = compiled(PeftModel.from_pretrained(tiny(), a).eval())
    call()
    hotswap_adapter(model, b, "default", torch_device="cpu")
    assert close(call(), expected)
    hotswap_adapter(model, c, "default", torch_device="cpu")
    with pytest.raises(RuntimeError, match="recompile"):
        call()


# --- refused --------------------------------------------------------------------------------------------------------


def everything(model):
    """A model's tensors, configurations and output, to compare."""
    tensors = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    configs = {n: copy.deepcopy(c.to_dict()) for n, c in model.peft_config.items()}
    settings = {n: dict(layer.settings) for n, layer in layers_of(model.base_model.model).items()}
    return tensors, configs, settings, output(model)


def unchanged(model, before):
    now = everything(model)
    return (
        now[0].keys() == before[0].keys()
        and all(torch.equal(now[0][name], before[0][name]) for name in now[0])
        and now[1:3] == before[1:3]
        and torch.equal(now[3], before[3])
    )


def damage(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(f"{folder}/adapter_model.safetensors")
    state.pop(next(name for name in state if "lily_B" in name))
    save_file(state, f"{folder}/adapter_model.safetensors")


def merged(model):
    model.merge_adapter()


def recorded(model):
    for layer in layers_of(model.base_model.model).values():
        layer.statistics["default"] = object()


REFUSED = {  # options of the other adapter, what is done to the model before, the error
    "fewer layers": ({"target_modules": ["blocks.0.linear"]}, None, r"does not adapt blocks\.1\.linear"),
    "more layers": (BOTH, None, r"adapts blocks\.0\.transposed"),
    "saved module": ({"modules_to_save": ["head"]}, None, "trains the same beside its layers"),
    "biases": ({"bias": "lily_only"}, None, "trains the same beside its layers"),
    "merged": ({}, merged, r"call unmerge_adapter\(\)"),
    "recorded": ({}, recorded, "is being recorded"),
}
NOT_COMPILED = {  # options of the adapter of a prepared model, of the other one, the error
    "rank": ({}, {"r": 4, "own_r": 2}, "has rank 6, and the model is prepared for 5; prepare it with target_rank=6"),
    "routing": ({}, {"routing": "token"}, r"has routing='token', and the model is prepared for 'static'"),
    "another dynamic routing": ({"routing": "token"}, {"routing": "batch"}, "prepared for 'token'"),
    "experts": ({"routing": "token"}, {"routing": "token", "num_B": 3}, "has num_B=3, and the model is prepared for 2"),
    "activation": ({}, {"activation": "relu"}, "has activation='relu', and the model is compiled for 'none'"),
    "settling": ({"routing": "token"}, {"routing": "token", "settled": 0.5}, "is settling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_take_the_place_is_refused_and_changes_nothing(case, tmp_path):
    options, do, error = REFUSED[case]
    model = trained()
    if do is not None:
        do(model)
    before = everything(model)
    with pytest.raises(LilyError, match=error):
        hotswap_adapter(model, written(tmp_path, seed=2, **options), "default", torch_device="cpu")
    assert unchanged(model, before)


@pytest.mark.parametrize("case", NOT_COMPILED)
def test_what_needs_recompilation_is_refused_by_a_prepared_model_and_changes_nothing(case):
    first, second, error = NOT_COMPILED[case]
    model, other = prepared(trained(**first)), trained(seed=2, **second)
    before, state = everything(model), get_peft_model_state_dict(other)
    with pytest.raises(LilyError, match=error):
        hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert unchanged(model, before)


def test_files_that_are_no_adapter_for_the_model_are_refused(tmp_path):
    model = trained()
    before = everything(model)
    damage(other := written(tmp_path / "b", r=3))
    get_peft_model(base(), lora_config("linear")).save_pretrained(tmp_path / "lora")
    for folder, adapter, error in (
        (other, "default", "no B of"),
        (str(tmp_path / "lora"), "default", "Incompatible PEFT types"),
        (written(tmp_path / "c"), "absent", "no Lily adapter 'absent' to replace on this model; there are default"),
    ):
        with pytest.raises(ValueError, match=error):
            hotswap_adapter(model, folder, adapter, torch_device="cpu")
    assert unchanged(model, before)


def test_a_model_that_cannot_be_prepared_is_refused():
    model, other = trained(routing="token", r=3), lily_config("linear", routing="sequence")
    for options, error in (
        ({"target_rank": 2}, "target_rank=2 is below the rank 3"),
        ({"config": other}, "routing sequence and token cannot replace one another"),
    ):
        with pytest.raises(LilyError, match=error):
            prepare_model_for_compiled_hotswap(model, **options)
    assert not any(layer.fixed_shapes for layer in layers_of(model.base_model.model).values())
    with pytest.raises(LilyError, match="compiled already"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=4)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=4, check_compiled="warn")
    with pytest.raises(ValueError, match="No adapter layers found"):  # PEFT's own
        prepare_model_for_compiled_hotswap(base(), target_rank=4)


# --- other ways in --------------------------------------------------------------------------------------------------


def test_a_convolution_with_groups_is_swapped_but_not_prepared():
    def adapted(r):
        torch.manual_seed(r)
        model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten())
        return randomise(get_peft_model(model, LilyConfig(r=r, num_B=2, target_modules=["0"])), seed=r).eval()

    first, second, x = adapted(2), adapted(4), torch.randn(2, 4, 9)
    second.base_model.model[0].base_layer.load_state_dict(first.base_model.model[0].base_layer.state_dict())
    with pytest.raises(LilyError, match=r"0 is a convolution with groups=2.*exclude_modules, or hot-swap without"):
        prepare_model_for_compiled_hotswap(first, target_rank=8)
    hotswap_adapter_from_state_dict(first, get_peft_model_state_dict(second), "default", second.peft_config["default"])
    assert torch.allclose(first(x), second(x), atol=1e-6)


def test_a_state_dicts_names_may_have_the_adapters():
    model, other = trained(), trained(seed=2, **OTHER)
    config, plain = other.peft_config["default"], get_peft_model_state_dict(other)
    named = {name.replace(".weight", ".default.weight"): t for name, t in plain.items()}
    named = {f"{name}.default" if name.endswith("lily_logits") else name: t for name, t in named.items()}
    hotswap_adapter_from_state_dict(model, named, "default", config)
    assert close(output(model), output(other))
    assert model.peft_config["default"] is not config


def test_transformers_swaps_when_asked_or_enabled(tmp_path):
    folders = [written(tmp_path / "a"), written(tmp_path / "b", seed=2, **OTHER)]
    expected = [output(loaded(folder)) for folder in folders]
    model = base()
    model.load_adapter(folders[0])
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folders[1])
    model.load_adapter(folders[1], hotswap=True)
    assert close(output(model), expected[1])
    with pytest.raises(ValueError, match="there must already be an existing adapter"):
        model.load_adapter(folders[1], "absent", hotswap=True)

    model = base()
    model.enable_peft_hotswap(target_rank=6)
    model.load_adapter(folders[0], is_trainable=True)
    assert {layer.fixed_shapes["default"].shape.r for layer in layers_of(model).values()} == {6}
    assert flags(model) == {True}
    model.load_adapter(folders[1])
    assert close(output(model), expected[1])
    assert flags(model) == {False}
    model.load_adapter(folders[0], adapter_name="other")
    model.set_adapter("other")
    assert close(output(model), expected[0])


def test_lora_is_swapped_and_prepared_as_without_lily(tmp_path):
    for seed, r in ((1, 2), (2, 3)):
        lora = get_peft_model(base(), lora_config("linear", r=r))
        with torch.no_grad():
            for name, p in lora.named_parameters():
                if "lora_" in name:
                    p.normal_(generator=torch.Generator().manual_seed(seed))
        lora.eval().save_pretrained(tmp_path / str(seed))
    model = loaded(str(tmp_path / "1"))
    config = model.peft_config["default"]
    prepare_model_for_compiled_hotswap(model, target_rank=4, config=config)
    assert config.r == 4
    assert close(swap(model, str(tmp_path / "2")), output(lora))


def test_unregistered_peft_has_its_own_functions():
    from peft.utils import hotswap

    ours = hotswap.hotswap_adapter, hotswap.prepare_model_for_compiled_hotswap
    lily.unregister()
    try:
        stock = hotswap.hotswap_adapter, hotswap.prepare_model_for_compiled_hotswap
        assert not set(stock) & set(ours)
        assert all(function.__module__ == "peft.utils.hotswap" for function in stock)
    finally:
        lily.register()
