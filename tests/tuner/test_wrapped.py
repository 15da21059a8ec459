"""Models wrapped by torch.compile, activation checkpointing, FSDP1 or DDP, before or after they are adapted."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import config_for
from helpers import TARGETS, build, inputs, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lily
from lily import export
from lily.layers.layer import LilyLayer

pytestmark = pytest.mark.sample(every=10)

FILE = "adapter_model.safetensors"


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def blocks(wrap):
    def apply(model):
        model.model.layers = nn.ModuleList(wrap(block) for block in model.model.layers)
        return model

    return apply


def linears(wrap):
    def apply(model):
        for block in model.model.layers:
            block.self_attn.q_proj = wrap(block.self_attn.q_proj)
        return model

    return apply


WRAPPINGS = {
    "checkpointed blocks": blocks(checkpoint_wrapper),
    "blocks with offloaded activations": blocks(offload_wrapper),
    "compiled blocks": blocks(compiled),
    "blocks compiled in place": blocks(compiled_in_place),
    "compiled and checkpointed blocks": blocks(lambda block: compiled(checkpoint_wrapper(block))),
    "checkpointed and compiled blocks": blocks(lambda block: checkpoint_wrapper(compiled(block))),
    "data-parallel blocks": blocks(nn.DataParallel),
    "checkpointed linear layers": linears(checkpoint_wrapper),
    "compiled linear layers": linears(compiled),
    "a compiled model": compiled,
    "a compiled model of compiled blocks": lambda model: compiled(blocks(compiled)(model)),
    "a compiled model of checkpointed blocks": lambda model: compiled(blocks(checkpoint_wrapper)(model)),
}
PLACES = {"before": True, "after": False}


def some(*few):
    """These wrappings in the default tests, and all others in the slow ones."""
    return pytest.mark.parametrize(
        "wrap", [pytest.param(w, id=n, marks=[] if n in few else pytest.mark.slow) for n, w in WRAPPINGS.items()]
    )


@pytest.fixture(autouse=True)
def no_recompile_limit():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        yield


def wrapped(wrap, before=True, config=None):
    """A model with an adapter, trained in the sense that no tensor of it is at its first value."""
    config = config or config_for("llama", routing="static")
    if before:
        model = get_peft_model(wrap(build("llama")), config)
    else:
        model = get_peft_model(build("llama"), config)
        model.base_model.model = wrap(model.base_model.model)
    return randomise(model).eval()


def plain(config=None):
    return randomise(get_peft_model(build("llama"), config or config_for("llama", routing="static"))).eval()


def logits(model):
    with torch.no_grad():
        return model(**inputs("llama")).logits


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_file_has_the_names_of_the_plain_model(tmp_path, wrap, before):
    model, reference = wrapped(wrap, before), plain()
    model.save_pretrained(tmp_path / "wrapped")
    reference.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "wrapped" / FILE).keys() == load_file(tmp_path / "plain" / FILE).keys()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("wrapped", "plain")]
    assert configs[0] == configs[1]
    assert model.base_model.model.lily_bank.plans == reference.base_model.model.lily_bank.plans


@some("compiled and checkpointed blocks", "data-parallel blocks", "checkpointed linear layers")
def test_files_go_from_wrapped_to_plain_and_back(tmp_path, wrap):
    model = wrapped(wrap)
    expected = logits(model)
    model.save_pretrained(tmp_path / "wrapped")
    close(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "wrapped").eval()), expected)
    plain().save_pretrained(tmp_path / "plain")
    expected = logits(PeftModel.from_pretrained(build("llama"), tmp_path / "plain").eval())
    loaded = PeftModel.from_pretrained(wrap(build("llama")), tmp_path / "plain").eval()
    close(logits(loaded), expected)
    model.load_adapter(tmp_path / "plain", "other")
    model.set_adapter("other")
    close(logits(model), expected)


@pytest.mark.parametrize("before", PLACES.values(), ids=PLACES)
@some("compiled linear layers")
def test_every_tensor_trains_exports_and_merges(tmp_path, wrap, before):
    model = wrapped(wrap, before)
    ids = inputs("llama")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    expected = logits(model)
    assert model.generate(ids[:1], max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    close(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "lora").eval()), expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, LilyLayer) for m in merged.modules())
    assert not hasattr(merged, "lily_bank")
    close(logits(merged), expected)


@pytest.mark.parametrize("before", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["compiled blocks", "checkpointed linear layers"])
def test_a_merged_model_is_written_under_plain_names(tmp_path, name, before):
    expected = logits(plain())
    export.write_merged(wrapped(WRAPPINGS[name], before), tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)


@pytest.mark.parametrize(
    "selected",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"target_modules": ["layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": r".*\.layers\.[02]\.mlp\.down_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "parallel_modules": ["mlp"]},
        {"target_modules": None, "target_parameters": ["mlp.down_proj.weight"]},
    ],
    ids=lambda values: "-".join(values),
)
@pytest.mark.parametrize(
    "name", ["checkpointed blocks", "a compiled model of compiled blocks", "compiled linear layers"]
)
def test_targets_match_as_without_wrappers(name, selected):
    config = config_for("llama", routing="static", **selected)
    model, reference = wrapped(WRAPPINGS[name], config=config), plain(config_for("llama", routing="static", **selected))
    assert model.base_model.model.lily_bank.plans == reference.base_model.model.lily_bank.plans
    assert config.target_modules == reference.peft_config["default"].target_modules


@pytest.mark.parametrize(
    "beside",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["input_layernorm"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("before", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", ["checkpointed blocks", "a compiled model of compiled blocks"])
def test_what_is_saved_beside_the_adapter_has_plain_names(tmp_path, name, before, beside):
    model = wrapped(WRAPPINGS[name], before, config_for("llama", routing="static", **beside))
    model.save_pretrained(tmp_path / "wrapped")
    plain(config_for("llama", routing="static", **beside)).save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "wrapped" / FILE).keys() == load_file(tmp_path / "plain" / FILE).keys()
    loaded = PeftModel.from_pretrained(WRAPPINGS[name](build("llama")), tmp_path / "wrapped").eval()
    loaded.save_pretrained(tmp_path / "again")
    saved, again = load_file(tmp_path / "wrapped" / FILE), load_file(tmp_path / "again" / FILE)
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    # that the same file computes the same needs no wrapper
    expected = logits(plain(config_for("llama", routing="static", **beside)))
    close(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "wrapped").eval()), expected)


@pytest.mark.parametrize("routing", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:routing=.* on a causal model")
@pytest.mark.parametrize("name", ["a compiled model", "checkpointed blocks"])
def test_each_routing_computes_as_without_wrappers(tmp_path, name, routing):
    mask = {"attention_mask": torch.ones_like(inputs("llama")["input_ids"])}
    mask["attention_mask"][0, :2] = 0
    model = wrapped(WRAPPINGS[name], config=config_for("llama", routing=routing))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    with torch.no_grad():
        close(model(**inputs("llama") | mask).logits, loaded(**inputs("llama") | mask).logits)


@pytest.mark.slow
def test_a_model_compiled_and_run_before_it_is_adapted_uses_the_adapter():
    base = compiled(build("llama"))
    before = logits(base)
    model = get_peft_model(base, config_for("llama", routing="static"))
    close(logits(model), before)
    randomise(model)
    assert (logits(model) - before).abs().max() > 1e-3
    with model.disable_adapter():
        close(logits(model), before)


@pytest.mark.slow
def test_a_lora_of_peft_accepts_the_same_compiled_model(tmp_path):
    config = LoraConfig(r=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM", init_lora_weights=False)
    lora = get_peft_model(compiled(build("llama")), config).eval()
    lily_model = wrapped(compiled)
    for model in (lora, lily_model):
        assert model.generate(inputs("llama")["input_ids"], max_new_tokens=2).ndim == 2
        expected = logits(model)
        merged = model.merge_and_unload()
        assert type(merged).__name__ == "OptimizedModule"
        close(logits(merged), expected)


@pytest.mark.slow
def test_a_trainer_saves_plain_names_and_resumes_under_a_wrapper(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in inputs("llama")["input_ids"]]

    def train(steps, resume=None):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path / "run", max_steps=steps, save_steps=2, per_device_train_batch_size=1, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="steps",
        )  # fmt: skip
        model = get_peft_model(blocks(compiled)(build("llama")), config_for("llama", routing="static"))
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    train(2)
    model = train(4, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "run" / "checkpoint-4" / FILE))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "run" / "checkpoint-4").eval()
    close(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize(
    "outer", [pytest.param(compiled, marks=pytest.mark.slow), nn.DataParallel], ids=["compiled", "data-parallel"]
)
def test_analysis_and_export_take_the_wrapped_peft_model(tmp_path, outer):
    model = plain(config_for("llama", routing="token"))
    around = outer(model)
    batches = [inputs("llama")]
    report = lily.collapse(around, batches, held_out=batches)
    assert report.drift.kl is not None
    assert not model.peft_config["default"].dynamic
    assert export.as_lora(around).layers.keys() == export.as_lora(model).layers.keys()
    expected = logits(model)
    export.write_merged(around, tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)


def test_an_adapter_inside_ddp_of_several_processes_is_warned_of(monkeypatch):
    model = build("llama")
    model.model.layers[0] = nn.DataParallel(model.model.layers[0])
    model.model.layers[0].__class__ = nn.parallel.DistributedDataParallel
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="inside DistributedDataParallel.*adapt first, then wrap"):
        get_peft_model(model, config_for("llama", routing="static"))
