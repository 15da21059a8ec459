"""Optimizer groups: which parameter learns at which rate, in transformers' Trainer, in TRL and in a training loop."""

from __future__ import annotations

import warnings
from collections import Counter

import peft
import pytest
import torch
from adapters import config_for
from every_kind import KINDS, base, lily_config
from helpers import TARGETS, VOCAB, build, inputs, logits
from peft import LoraConfig, get_peft_model
from peft.optimizers import lorafa, loraplus
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import lily
from lily import LilyError
from lily.layers.find import layers_of
from lily.optim import create_optimizer, parameter_groups
from lily.tuner import peft_optimizers

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")

RATES = {"A": 0.01, "B": 0.04, "router": 0.005, "logits": 0.005, "gain": 0.01, "rest": 0.01}
RATIOS = {"B_lr_ratio": 4.0, "router_lr_ratio": 0.5}


def expected_parts(model):
    """Name -> part of what is trained, by the place where the model keeps it."""
    parts, root = {}, model.base_model.model
    bank = root.lily_bank
    for holder, part in ((bank.lily_A, "A"), (bank.lily_B, "B"), (bank.lily_R, "router")):
        parts |= {id(p): part for p in holder.parameters()}
    for layer in layers_of(root).values():
        for name, part in (
            ("router", "router"),
            ("logits", "logits"),
            ("gain", "gain"),
            ("own_A", "A"),
            ("own_B", "B"),
        ):
            parts |= {id(p): part for p in getattr(layer, f"lily_{name}").parameters()}
    return {name: parts.get(id(p), "rest") for name, p in model.named_parameters() if p.requires_grad}


def check_groups(model):
    """Every trained parameter is in one group, with its part's rate; returns the parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of models without routers
        optimizer = create_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1, **RATIOS)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    parts = expected_parts(model)
    assert Counter(name for name, _ in found) == Counter(list(parts))
    decayed = Trainer.get_decay_parameter_names(None, model)
    for name, group in found:
        part = parts[name]
        assert group["name"].removesuffix("_no_decay") == part, name
        assert group["lr"] == RATES[part], name
        decays = name in decayed and part not in ("logits", "gain")
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
        assert group["name"].endswith("_no_decay") == (not decays and part not in ("logits", "gain")), name
    group_names = [group["name"] for group in optimizer.param_groups]
    assert len(set(group_names)) == len(group_names)
    return set(parts.values())


@pytest.mark.parametrize("options", [{}, {"gain": "ones", "own_r": 2}])
@pytest.mark.parametrize("shared", [False, True])
def test_every_trained_parameter_is_in_one_group(routing, options, shared):
    options = {**options, "shared_router": shared and routing not in ("static", "uniform")}
    parts = check_groups(get_peft_model(build("llama"), config_for("llama", routing=routing, **options)))
    decides = {"static": {"logits"}, "uniform": set()}.get(routing, {"router"})
    assert parts == {"A", "B", *decides, *({"gain"} if "gain" in options else ())}


@pytest.mark.parametrize("adapted", KINDS)
def test_of_every_kind_of_adapted_thing_too(adapted):
    parts = check_groups(get_peft_model(base(), lily_config(adapted, gain="ones", own_r=1)))
    assert parts == {"A", "B", "logits", "gain", *({"rest"} if adapted == "saved module" else ())}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"bias": "lily_only", "modules_to_save": ["classifier"]}),
        ("bert", {"bias": "all"}),
        ("bert", {"modules_to_save": ["LayerNorm", "classifier"]}),
        ("llama", {"modules_to_save": ["norm", "lm_head"]}),
        ("llama", {"trainable_token_indices": [1, 3]}),
    ],
)
def test_what_is_trained_beside_the_adapter_is_the_rest(kind, options):
    parts = check_groups(get_peft_model(build(kind), config_for(kind, routing="token", **options)))
    assert parts == {"A", "B", "router", "rest"}


def test_of_two_adapters_those_that_are_trained_are_in_the_groups():
    model = get_peft_model(build("llama"), config_for("llama", routing="token"))
    model.add_adapter("other", config_for("llama", routing="static", r=2, gain="signs"))
    assert check_groups(model) == {"A", "B", "router"}
    model.set_adapter("other")
    assert check_groups(model) == {"A", "B", "logits", "gain"}
    model.base_model.set_adapter(["default", "other"])
    assert check_groups(model) == {"A", "B", "router", "logits", "gain"}


def test_wrappers_change_no_group():
    model = get_peft_model(build("llama"), config_for("llama", routing="token"))
    expected = parameter_groups(model, 0.01, **RATIOS)
    for layer in model.base_model.model.model.layers:
        layer.mlp = torch.compile(layer.mlp)
    wrapped = parameter_groups(torch.compile(model), 0.01, **RATIOS)
    assert [g["name"] for g in wrapped] == [g["name"] for g in expected] == ["A", "B", "router"]
    for got, wanted in zip(wrapped, expected, strict=True):
        assert {id(p) for p in got["params"]} == {id(p) for p in wanted["params"]}


def test_the_static_weights_of_a_routing_that_settles_learn_as_routers_do():
    model = get_peft_model(build("llama"), config_for("llama", routing="token"))
    lily.Settling(model, total_steps=10)
    assert check_groups(model) == {"A", "B", "router", "logits"}


# --- training -------------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """The rate at which each parameter moved in each step of SGD: what it moved by, divided by its gradient."""

    def __init__(self, model):
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rates = []

    def on_pre_optimizer_step(self, *_, **__):
        self.before = {n: (p.detach().clone(), p.grad.detach().clone()) for n, p in self.trained.items()}

    def on_optimizer_step(self, *_, **__):
        moved = {n: (p - self.trained[n].detach(), g) for n, (p, g) in self.before.items()}
        self.rates.append({n: float((d * g).sum() / g.square().sum()) for n, (d, g) in moved.items()})


COUNT = 4


def check_rates(model, steps):
    """The rates fell linearly from those of `RATES` to 0, for every parameter at every step."""
    parts = expected_parts(model)
    assert len(steps.rates) == COUNT
    assert set(parts.values()) == {"A", "B", "router", "gain", "rest"}
    for number, rates in enumerate(steps.rates):
        expected = {name: RATES[part] * (1 - number / COUNT) for name, part in parts.items()}
        assert rates == {name: pytest.approx(rate, rel=1e-4) for name, rate in expected.items()}


def trained_model(model, **options):
    """In float64, with B away from zero, so that each step can be divided by its gradient."""
    config = lily.LilyConfig(
        r=4, stride_A=2, num_B=2, routing="token", gain="ones", own_r=1, scaling=4.0, task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(model, config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lily_" in name and p.requires_grad:
                p.copy_(0.3 * torch.randn_like(p))  # routers that do not saturate have gradients
    return model


def test_in_a_training_loop_a_schedule_keeps_the_ratios():
    torch.manual_seed(0)
    model = trained_model(build("llama"), target_modules=TARGETS["llama"], modules_to_save=["lm_head"])
    optimizer = create_optimizer(model, torch.optim.SGD, lr=0.01, **RATIOS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / COUNT)
    steps = Steps(model)
    for step in range(COUNT):
        logits(model, inputs("llama", seed=step)).square().mean().backward()
        steps.on_pre_optimizer_step()
        optimizer.step()
        steps.on_optimizer_step()
        schedule.step()
        optimizer.zero_grad()
    check_rates(model, steps)


ARGUMENTS = {
    "learning_rate": 0.5,  # the optimizer has its rates already
    "max_steps": COUNT,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "linear",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "bf16": False,
}


def test_in_transformers_trainer(tmp_path):
    torch.manual_seed(0)
    model = trained_model(build("llama"), target_modules=TARGETS["llama"], modules_to_save=["lm_head"])
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB, (16, 8))]
    steps = Steps(model)
    optimizer = create_optimizer(model, torch.optim.SGD, lr=0.01, **RATIOS)
    Trainer(
        model,
        TrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[steps],
    ).train()
    check_rates(model, steps)


def test_settling_takes_an_optimizer_that_was_made_before(tmp_path):
    model = get_peft_model(build("llama"), config_for("llama", routing="token", settled=0.0))
    optimizer = create_optimizer(model, torch.optim.SGD, lr=0.01, **RATIOS)
    Trainer(
        model,
        TrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=[{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB, (16, 8))],
        optimizers=(optimizer, None),
        callbacks=[lily.SettleCallback(0.25, 0.5)],
    ).train()
    assert model.peft_config["default"].routing == "static"


def test_in_trls_trainer(tmp_path, chat_model, chat_table):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = trained_model(
        AutoModelForCausalLM.from_pretrained(chat_model), target_modules=TARGETS["llama"], modules_to_save=["lm_head"]
    )
    rows = [{"prompt": "question good film", "completion": " yes"}, {"prompt": "question bad", "completion": " no"}] * 8
    steps = Steps(model)
    optimizer = create_optimizer(model, torch.optim.SGD, lr=0.01, **RATIOS)
    SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(chat_model),
        optimizers=(optimizer, None),
        callbacks=[steps],
    ).train()
    check_rates(model, steps)


# --- PEFT's optimizers ----------------------------------------------------------------------------------------------


def rates_of(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def lora():
    return get_peft_model(build("llama"), LoraConfig(r=2, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"))


def test_a_lora_has_the_rates_of_pefts_own_function():
    model = lora()
    stock = loraplus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    assert len(stock.param_groups) == 4  # stock's, also where the adapter is not ours
    ours = create_optimizer(model, torch.optim.AdamW, lr=0.01, B_lr_ratio=16.0)
    assert rates_of(model, ours) == rates_of(model, stock)
    assert set(rates_of(model, ours).values()) == {0.01, 0.16}


@pytest.mark.parametrize("owner", [peft.optimizers, loraplus])
@pytest.mark.parametrize("routing", ["token", "static"])
def test_pefts_function_for_loraplus_is_right_for_lily(owner, routing):
    model = get_peft_model(build("llama"), config_for("llama", routing=routing, own_r=1, gain="ones"))
    optimizer = owner.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, betas=(0.8, 0.9)
    )
    parts = expected_parts(model)
    assert rates_of(model, optimizer) == {n: 0.16 if part == "B" else 0.01 for n, part in parts.items()}
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups}["B"] == 0.1
    assert optimizer.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_adapters_of_embeddings_have_a_rate_of_their_own_as_loras_do(kind):
    model = get_peft_model(base(), lily_config(kind, own_r=1, gain="ones"))
    optimizer = peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2.0, loraplus_lr_embedding=0.003
    )
    rates = rates_of(model, optimizer)
    assert set(rates) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(rates.values()) == ({0.003} if kind == "embedding" else {0.1, 0.2})
    assert all(group["params"] for group in optimizer.param_groups)


def test_embeddings_beside_other_layers_have_pefts_default_rate():
    model = get_peft_model(build("llama"), config_for("llama", target_modules=["embed_tokens", "q_proj"]))
    optimizer = peft.optimizers.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2.0)
    slow = {n for n, rate in rates_of(model, optimizer).items() if rate == 1e-6}
    assert {id(model.get_parameter(n)) for n in slow} == {id(p) for p in peft_optimizers._of_embeddings(model)}
    assert slow
    assert set(rates_of(model, optimizer).values()) == {1e-6, 0.1, 0.2}
    assert [group["lr"] for group in optimizer.param_groups[:2]] == [0.1, 1e-6]  # PEFT's order


def test_lora_fa_is_refused_for_lily_alone():
    model = get_peft_model(build("llama"), config_for("llama"))
    with pytest.raises(LilyError, match=r"Call lily\.optim\.create_optimizer"):
        peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lily_A" in n)
    assert len(peft.optimizers.create_lorafa_optimizer(lora(), r=2, lora_alpha=4, lr=0.01).param_groups) == 1


def test_unregistering_restores_pefts_functions():
    def owners():
        functions = [m.create_loraplus_optimizer for m in (peft.optimizers, loraplus)]
        functions += [m.create_lorafa_optimizer for m in (peft.optimizers, lorafa)]
        return [f.__code__.co_filename.rpartition("/")[2] for f in functions]

    lily.unregister()
    try:
        assert owners() == ["loraplus.py", "loraplus.py", "lorafa.py", "lorafa.py"]
    finally:
        lily.register()
    assert owners() == ["peft_optimizers.py"] * 4


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["B_lr_ratio", "router_lr_ratio"])
def test_a_ratio_is_finite_and_positive(name, value):
    model = get_peft_model(build("plain"), config_for("plain"))
    with pytest.raises(LilyError, match=f"{name}={value} is not a finite number above 0"):
        create_optimizer(model, torch.optim.SGD, lr=0.01, **{name: value})


def test_a_model_without_anything_to_train_is_refused():
    model = get_peft_model(build("plain"), config_for("plain")).requires_grad_(False)
    with pytest.raises(LilyError, match="no parameter of this PeftModel requires a gradient"):
        parameter_groups(model, 0.01)


def test_a_ratio_without_effect_is_reported():
    one = get_peft_model(build("plain"), config_for("plain", num_B=1))
    with pytest.warns(UserWarning, match="router_lr_ratio=2 has no effect: no router"):
        parameter_groups(one, 0.01, router_lr_ratio=2.0)
    with pytest.warns(UserWarning, match="B_lr_ratio=2 has no effect: no B is trained"):
        parameter_groups(build("plain"), 0.01, B_lr_ratio=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter_groups(one, 0.01, B_lr_ratio=2.0)


def test_parameters_that_fsdp_has_joined_have_no_ratio():
    joined = torch.nn.Module()
    joined._flat_param = torch.nn.Parameter(torch.zeros(3))
    assert len(parameter_groups(joined, 0.01)) == 1
    with pytest.raises(LilyError, match=r"joined A, B and routers into _flat_param.*use_orig_params=True"):
        parameter_groups(joined, 0.01, router_lr_ratio=2.0)


def test_embeddings_keep_32_bits_under_an_8_bit_optimizer():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    model = get_peft_model(build("llama"), config_for("llama"))
    manager = GlobalOptimManager.get_instance()
    before = len(manager.module_weight_config_triple)
    create_optimizer(model, AdamW8bit, lr=0.01, B_lr_ratio=2.0)
    added = manager.module_weight_config_triple[before:]
    assert added == [(model.get_input_embeddings(), "weight", {"optim_bits": 32})]
