"""A static adapter as a LoRA, a merged model or stock Lily, read in a process where this package cannot be imported."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import adapted, config_for, layers
from helpers import build, inputs, predict, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_utils
from transformers.pytorch_utils import Conv1D

import lily
from lily import LilyConfig, LilyError, export
from lily.deploy import write as folders

pytestmark = [
    pytest.mark.sample(every=10),
    pytest.mark.filterwarnings("ignore:routing=.* on a causal model", "ignore:merging rounded"),
]

KINDS = ("llama", "gpt2", "bert", "vit")
STATIC = [{"routing": "static"}, {"routing": "uniform"}, {"routing": "token", "num_B": 1}]

# Reads the folders with plain PEFT and transformers; `lily` cannot be imported.
STRANGER = """
from peft import PeftModel
for folder, kind in zip(args[::2], args[1::2]):
    seen, base = {}, lambda: build(kind)
    lora = PeftModel.from_pretrained(base(), folder + '/lora').eval()
    seen['lora'] = predict(lora, inputs(kind))
    seen['lora_merged'] = predict(lora.merge_and_unload(), inputs(kind))
    if kind != 'gpt2':
        seen['stock'] = predict(PeftModel.from_pretrained(base(), folder + '/stock').eval(), inputs(kind))
    merged = type(base()).from_pretrained(folder + '/merged').eval()
    seen['merged'] = predict(merged, inputs(kind))
    save_file({k: v.contiguous() for k, v in seen.items()}, folder + '/seen.safetensors')
"""
CASES = [
    *((kind, STATIC[0]) for kind in KINDS),
    *(("llama", options) for options in STATIC[1:]),
    ("llama", {**STATIC[0], "scaling_pattern": {r".*layers\.1\..*": 2.5, "v_proj": 0.4}}),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, stranger):
    """What each case should compute, and the folder with what one process without this package made of its exports."""
    found = []
    for kind, options in CASES:
        folder = tmp_path_factory.mktemp(kind)
        model = adapted(kind, scaling=5.0 if kind == "bert" else 0.7, **options)
        found.append((predict(model, inputs(kind)), folder))
        export.write_lora(export.as_lora(model), folder / "lora")
        if kind == "gpt2":
            with pytest.raises(LilyError, match="stock Lily adapts nn"):
                export.write_stock(model, folder / "stock")
        else:
            export.write_stock(model, folder / "stock")
        export.write_merged(model, folder / "merged")
    pairs = [text for (kind, _), (_, folder) in zip(CASES, found, strict=True) for text in (str(folder), kind)]
    said = stranger(STRANGER, *pairs)
    assert "Traceback" not in said, said
    return found


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{kind}-{o['routing']}{o.get('num_B', '')}" for kind, o in CASES]
)
def test_a_process_without_this_package_computes_the_same(case, exported):
    kind, (expected, folder) = CASES[case][0], exported[case]
    assert (expected - predict(build(kind), inputs(kind))).abs().max() > 1e-2
    seen = load_file(folder / "seen.safetensors")
    assert len(seen) == (3 if kind == "gpt2" else 4)
    for name, values in seen.items():
        assert (values - expected).abs().max() <= 1e-5, name


class Several(nn.Module):
    """Layers of two names and two shapes, so that plans have several groups."""

    def __init__(self, depth, wide, dtype):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, wide), "down": nn.Linear(wide, 6), "gate": nn.Linear(6, 6)})
            for _ in range(depth)
        )
        self.to(dtype)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x))) * torch.sigmoid(block["gate"](x))
        return x

    def save_pretrained(self, folder, **_):
        save_file(self.state_dict(), f"{folder}/model.safetensors")


def close(seen, expected, dtype):
    """Equal up to what computing in that dtype rounds."""
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    return (seen - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4),
    st.integers(4, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["static", "uniform"]),
    st.sampled_from([0.5, 1.0, 0.3, 2.0, -1.5]),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.sampled_from(["none", "lily_only", "all"]),
    st.sampled_from(list(export.TARGETS)),
)
def test_any_plan_survives_merging_exporting_and_reading_back(
    tmp_path_factory, depth, wide, r, stride, experts, routing, scaling, dtype, bias, target
):
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(depth + 10 * wide)
    base = Several(depth, wide, dtype)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    config = LilyConfig(
        r=r, stride_A=stride, num_B=experts, routing=routing, scaling=scaling, bias=bias,
        target_modules=["up", "down", "gate"], rank_pattern={"gate": r + 1},
    )  # fmt: skip
    model = randomise(get_peft_model(base, config, autocast_adapter_dtype=False), scale=0.5).eval()
    if bias != "none":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.add_(0.1)
    x = torch.randn(2, 3, 6, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
    if bias != "none" and target != "peft":
        with pytest.raises(LilyError, match="reads no trained biases"):
            export.as_lora(model, target=target)
    else:
        lora = export.as_lora(model, target=target)
        assert all(energy == 1 for energy in lora.energies.values())
        assert lora.provenance["exact"]
        for name, layer in layers(model).items():
            found = lora.layers[name.removeprefix("base_model.model.")]
            delta = layer.get_delta_weight("default")
            assert torch.allclose(found.scale * found.B @ found.A, delta, atol=1e-5 * float(delta.abs().max()))
        if target == "vllm":
            assert lora.rank in export.VLLM_RANKS
        export.write_lora(lora, folder / "lora")
        fresh = Several(depth, wide, dtype)
        fresh.load_state_dict(weights)
        back = PeftModel.from_pretrained(fresh, folder / "lora", autocast_adapter_dtype=False).eval()
        assert isinstance(back.peft_config["default"], LoraConfig)
        with torch.no_grad():
            assert close(back(x), expected, dtype)
    before = {n: m.get_base_layer().weight.clone() for n, m in layers(model).items()}
    model.merge_adapter()
    with torch.no_grad():
        assert close(model(x), expected, dtype)
    merged = {n.removeprefix("base_model.model."): m.get_base_layer().weight.clone() for n, m in layers(model).items()}
    model.unmerge_adapter()
    assert all(torch.equal(m.get_base_layer().weight, before[n]) for n, m in layers(model).items())
    export.write_merged(model, folder / "merged")
    fresh = Several(depth, wide, dtype)
    fresh.load_state_dict(load_file(folder / "merged" / "model.safetensors"))
    assert all(torch.equal(fresh.get_submodule(name).weight, weight) for name, weight in merged.items())
    with torch.no_grad():
        assert close(fresh(x), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_what_rounds_nothing_is_called_exact(dtype):
    base = build("llama").to(dtype)
    model = randomise(get_peft_model(base, config_for("llama", routing="static"), autocast_adapter_dtype=False))
    lora = export.as_lora(model)
    assert {t.dtype for t in lora.state_dict().values()} == {torch.float32}
    assert lora.provenance["exact"]
    assert export.as_lora(model, dtype=torch.float32).provenance["exact"]
    assert not export.as_lora(model, dtype=dtype).provenance["exact"]


@pytest.mark.parametrize("options", [{"scaling": 2}, {"scaling_pattern": {"q_proj": 2, "v_proj": 2}}])
def test_scales_may_be_integers(options):
    model = adapted("llama", routing="static", **options)
    assert export.as_lora(model).config.lora_alpha == 2 * 4
    for layer in layers(model).values():
        layer.scaling["default"] = 3
    assert export.as_lora(model).config.lora_alpha == 3 * 4


@pytest.mark.parametrize("options", [{"scaling_pattern": {"^up": 3.0}}, {"rank_pattern": {"^up": 2}}])
def test_a_layer_whose_name_others_end_with_has_its_own_rank_and_scale(options, tmp_path):
    def base():
        torch.manual_seed(0)
        inner = nn.Sequential()
        inner.add_module("up", nn.Linear(6, 6))
        outer = nn.Sequential()
        outer.add_module("inner", inner)
        outer.add_module("up", nn.Linear(6, 9))
        return outer

    model = get_peft_model(base(), LilyConfig(r=4, num_B=1, scaling=1.0, target_modules=["up"], **options))
    x = torch.randn(5, 6)
    expected = randomise(model).eval()(x)
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    assert close(PeftModel.from_pretrained(base(), tmp_path / "lora").eval()(x), expected, torch.float32)


def test_an_export_knows_where_it_came_from(tmp_path):
    model = adapted("llama", routing="static")
    lora = export.as_lora(model, provenance={"trained_on": "rows"})
    export.write_lora(lora, tmp_path / "lora")
    (tmp_path / "lora" / export.PROVENANCE).unlink()  # the weights themselves carry it too
    found = export.provenance(tmp_path / "lora")
    assert found["routing"] == "static"
    assert found["trained_on"] == "rows"
    assert found["plan"] == str(model.base_model.model.lily_bank.plans["default"]).splitlines()
    assert export.provenance(tmp_path) is None


def test_the_report_of_a_collapse_goes_wherever_the_adapter_goes(tmp_path):
    model = adapted("llama", routing="token")
    report = json.loads(json.dumps(lily.collapse(model, [inputs("llama")]).to_dict()))
    model.save_pretrained(tmp_path / "own")
    for name, write in WRITERS.items():
        write(PeftModel.from_pretrained(build("llama"), tmp_path / "own"), tmp_path / name)
        assert export.provenance(tmp_path / name)["collapse"] == report
    (tmp_path / "stock" / export.PROVENANCE).unlink()
    assert export.provenance(tmp_path / "stock")["format"] == "lily stock"


def test_an_adapter_that_was_injected_is_not_written_merged_and_the_error_says_why(tmp_path):
    model = randomise(inject_adapter_in_model(config_for("llama", routing="static"), build("llama")))
    with pytest.raises(LilyError, match="this LlamaForCausalLM had its adapter injected"):
        export.write_merged(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_adapter_that_is_merged_now_is_not_written_along(tmp_path):
    model = adapted("llama", routing="static")
    model.add_adapter("other", config_for("llama", routing="static", target_modules=["o_proj"]))
    randomise(model, seed=7)
    expected = predict(model, inputs("llama"))
    model.merge_adapter(adapter_names=["other"])
    with pytest.raises(LilyError, match="adapter 'other' is merged into the base weights"):
        export.write_merged(model, tmp_path / "out", adapter="default")
    model.unmerge_adapter()
    export.write_merged(model, tmp_path / "out", adapter="default")
    merged = type(build("llama")).from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(predict(merged, inputs("llama")), expected, atol=1e-5)


def test_the_announced_size_is_what_is_written(tmp_path):
    lora = export.as_lora(adapted("llama", routing="static"))
    export.write_lora(lora, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as opened:
        assert lora.size == sum(opened.get_tensor(k).nbytes for k in opened.keys())  # noqa: SIM118


def test_targets_are_short_names_where_those_mean_the_same_layers():
    assert export.as_lora(adapted("llama", routing="static")).config.target_modules == {
        "q_proj",
        "v_proj",
        "down_proj",
    }
    partly = adapted("llama", routing="static", target_modules=["q_proj"], layers_to_transform=[1, 2])
    lora = get_peft_model(build("llama"), export.as_lora(partly).config)
    adapted_by_lora = {n for n, m in lora.named_modules() if isinstance(m, LoraLayer)}
    assert adapted_by_lora == set(layers(partly))


def test_modules_saved_whole_go_along(tmp_path):
    config = config_for("bert", routing="static", modules_to_save=["classifier"])
    model = randomise(get_peft_model(build("bert"), config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.3)
    expected = predict(model, inputs("bert"))
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    back = PeftModel.from_pretrained(build("bert"), tmp_path / "lora").eval()
    assert torch.allclose(predict(back, inputs("bert")), expected, atol=1e-5)
    with pytest.raises(LilyError, match="vllm reads no modules saved whole, but the adapter has classifier"):
        export.as_lora(model, target="vllm")


def test_all_biases_and_a_saved_head_go_along_together(tmp_path):
    model = randomise(get_peft_model(build("bert"), config_for("bert", routing="static", bias="all"))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lily_" not in name:
                p.add_(0.3)
    expected = predict(model, inputs("bert"))
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    back = PeftModel.from_pretrained(build("bert"), tmp_path / "lora").eval()
    assert torch.allclose(predict(back, inputs("bert")), expected, atol=1e-5)
    assert not torch.allclose(predict(build("bert"), inputs("bert")), expected, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_smaller_rank_is_the_best_one_and_says_what_it_keeps(rank):
    model = adapted("llama", routing="static")
    cut = export.as_lora(model, rank=rank, tolerance=1.0)
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight("default").detach()
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        got = cut.layers[name.removeprefix("base_model.model.")]
        assert torch.allclose(got.scale * got.B @ got.A, best, atol=1e-5)
        assert got.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-6)
    assert not cut.provenance["exact"]
    assert cut.provenance["energies"] == cut.energies
    assert "energies" not in export.as_lora(model).provenance
    with pytest.raises(LilyError, match=r"keeps too little of \d+ of \d+ layers"):
        export.as_lora(model, rank=rank)
    assert export.as_lora(model, rank=rank, force=True).rank == rank


def test_a_rank_beyond_what_vllm_takes_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(600, 600)), LilyConfig(r=600, num_B=1, target_modules=["0"]))
    with pytest.raises(LilyError, match="accepts ranks up to 512, but the adapter has 600"):
        export.as_lora(model, target="vllm")
    assert export.as_lora(model, target="vllm", rank=300, tolerance=1.0).rank == 320


def test_an_output_layer_is_not_for_vllm():
    model = adapted("llama", routing="static", target_modules=["q_proj", "lm_head"])
    with pytest.raises(LilyError, match="vllm adapts only numbered layers, and lm_head is outside"):
        export.as_lora(model, target="vllm")


WRITERS = {
    "lora": lambda model, out, **o: export.write_lora(export.as_lora(model), out, **o),
    "merged": export.write_merged,
    "stock": export.write_stock,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_dynamic_adapter_is_refused_and_nothing_is_written(writer, tmp_path):
    with pytest.raises(LilyError, match=r"depends on the data; make it static first \(lily.collapse"):
        WRITERS[writer](adapted("llama", routing="token"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_is_never_overwritten_unless_asked(writer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(LilyError, match="exists; name another folder, or give --overwrite"):
        WRITERS[writer](adapted("llama", routing="static"), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]
    WRITERS[writer](adapted("llama", routing="static"), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_folder_and_nothing_else(writer, tmp_path, monkeypatch):
    WRITERS[writer](adapted("llama", routing="static"), tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device", "out")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[writer](adapted("llama", routing="static"), tmp_path / "out", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_up_under_safetensors_is_an_error_that_names_the_folder(writer, tmp_path, monkeypatch):
    def full(tensors, file, *_, **__):
        Path(file).write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folders, "save_file", full)
    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        WRITERS[writer](adapted("llama", routing="static"), tmp_path / "out")
    assert raised.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_others_can_read_what_is_written_if_the_umask_lets_them(writer, tmp_path):
    before = os.umask(0o027)
    try:
        WRITERS[writer](adapted("llama", routing="static"), tmp_path / "out")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_stock_has_the_scale_that_each_layer_has_now(tmp_path):
    model = adapted("llama", routing="static")
    next(iter(layers(model).values())).set_scale("default", 0)
    export.write_stock(model, tmp_path / "stock")
    back = PeftModel.from_pretrained(build("llama"), tmp_path / "stock")
    torch.testing.assert_close(predict(back, inputs("llama")), predict(model, inputs("llama")), atol=1e-5, rtol=1e-5)


def test_a_batch_routed_adapter_goes_to_stock_as_it_is(tmp_path):
    model = adapted("llama", routing="batch")
    export.write_stock(model, tmp_path / "stock")
    model.save_pretrained(tmp_path / "own")
    own, stock = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("own", "stock"))
    assert own.keys() == stock.keys()
    assert json.loads((tmp_path / "stock" / "adapter_config.json").read_text())["peft_type"] == "LILY"


def test_an_unknown_target_and_a_bad_rank_are_named():
    model = adapted("llama", routing="static")
    with pytest.raises(LilyError, match="no export target 'tgi'; choose one of peft, vllm"):
        export.as_lora(model, target="tgi")
    for rank in (0, 5):
        with pytest.raises(LilyError, match=f"rank={rank} is not valid: the adapter has 4; give"):
            export.as_lora(model, rank=rank)
    assert export.as_lora(model, rank=4).provenance["exact"]


def test_a_model_without_an_adapter_is_named():
    with pytest.raises(LilyError, match="carries no Lily adapter"):
        export.as_lora(build("llama"))


def test_a_merged_model_is_written_in_shards_with_its_generation_config(tmp_path):
    model = adapted("llama", routing="static")
    export.write_merged(model, tmp_path / "merged", max_shard_size="20KB")
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors.index.json", "generation_config.json", "config.json"} <= names
    assert not any(n.endswith(".bin") for n in names)


MEMORY = """
import resource, sys, torch, lily
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
sizes = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=8, vocab_size=4000)
base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
model = get_peft_model(base, lily.LilyConfig(r=8, num_B=1, target_modules='all-linear', init_weights=False))
size = sum(p.numel() * p.element_size() for p in base.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lily.export.write_merged(model, sys.argv[1], max_shard_size='20MB')
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert grown < size / 2, (grown, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_merging_and_writing_never_holds_the_model_twice(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_a_merged_model_keeps_the_dtype_of_its_base(tmp_path):
    model = randomise(get_peft_model(build("llama").to(torch.bfloat16), config_for("llama", routing="static")))
    export.write_merged(model, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}


def test_damaged_provenance_is_one_error(tmp_path):
    (tmp_path / export.PROVENANCE).write_text("{")
    with pytest.raises(LilyError, match=f"{export.PROVENANCE}: not valid JSON"):
        export.provenance(tmp_path)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    adapted("llama", routing="static").save_pretrained(tmp_path / "own")
    assert PeftConfig.from_pretrained(tmp_path / "own").routing == "static"
    with pytest.raises(LilyError, match=r"matches no module"):
        PeftModel.from_pretrained(build("bert"), tmp_path / "own")
    state = load_file(tmp_path / "own" / "adapter_model.safetensors")
    name = next(k for k in state if "lily_A" in k)
    state[name] = state[name][:, :5].contiguous()
    save_file(state, tmp_path / "own" / "adapter_model.safetensors")
    with pytest.raises(LilyError, match=r"has shape .* expected .* is it the file of this configuration"):
        PeftModel.from_pretrained(build("llama"), tmp_path / "own")


def deep(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, vocab_size=61
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("depth", "sharing", "routing"),
    [
        (3, {"num_A": 1}, {"routing": "uniform"}),
        (8, {"num_A": 1}, {"num_B": 1}),
        (3, {"num_A": 2}, {"routing": "static"}),
        (8, {"stride_A": 4}, {"routing": "token"}),
        (8, {"num_A": 2}, {"routing": "batch"}),
    ],
    ids=str,
)
def test_an_adapter_for_another_depth_is_refused(tmp_path, depth, sharing, routing):
    options = {"r": 3, "num_B": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    randomise(get_peft_model(deep(4), LilyConfig(**{**options, **sharing, **routing}))).save_pretrained(tmp_path)
    with pytest.raises(LilyError, match=r"base model"):
        PeftModel.from_pretrained(deep(depth), tmp_path)


def test_the_depth_that_an_adapter_is_for_is_named_and_older_files_still_load(tmp_path):
    model = adapted("llama", routing="uniform")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["adapted_layers"] == {"q_proj": 4, "v_proj": 4, "down_proj": 4}
    expected = predict(model, inputs("llama"))
    assert torch.equal(predict(PeftModel.from_pretrained(build("llama"), tmp_path).eval(), inputs("llama")), expected)
    with pytest.raises(LilyError, match=r"was made for 4 layers named '.*', but this base model has 2 to adapt"):
        PeftModel.from_pretrained(deep(2), tmp_path)
    del values["adapted_layers"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert torch.equal(predict(PeftModel.from_pretrained(build("llama"), tmp_path).eval(), inputs("llama")), expected)


def test_what_stock_reads_says_nothing_that_stock_does_not_know(tmp_path):
    adapted("llama", routing="batch").save_pretrained(tmp_path)
    assert "adapted_layers" not in json.loads((tmp_path / "adapter_config.json").read_text())


class Flat(nn.Module):
    """A Conv1D as in GPT-2, a linear layer and a parameter, in a given order of modules."""

    def __init__(self, order):
        super().__init__()
        made = {"conv": Conv1D(6, 6), "linear": nn.Linear(6, 6)}
        for name in order:
            setattr(self, name, made[name])
        self.inner = Matrix()

    def forward(self, x):
        return self.inner(self.linear(self.conv(x)) if hasattr(self, "linear") else self.conv(x))


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("order", "loads"), [(("conv", "linear"), True), (("linear", "conv"), False), (("conv",), False)]
)
def test_a_lora_of_conv1d_and_of_parameters_is_written_only_if_peft_can_load_it(order, loads, tmp_path):
    torch.manual_seed(0)
    base = Flat(order).eval()
    options = {"target_modules": list(order), "target_parameters": ["inner.weight"]}
    x = torch.randn(2, 6)
    lily_model = randomise(get_peft_model(copy.deepcopy(base), LilyConfig(r=2, num_A=1, num_B=1, **options))).eval()
    if loads:
        export.write_lora(export.as_lora(lily_model), tmp_path / "lora")
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "lora")(x), lily_model(x))
        return
    with pytest.raises(LilyError, match=r"Conv1D \(conv\) together with one of parameters \(inner\.weight\)"):
        export.as_lora(lily_model)
    with pytest.raises(ValueError, match="fan_in_fan_out"):  # as the message says of PEFT
        get_peft_model(base, LoraConfig(r=2, fan_in_fan_out=True, **options))


def test_a_sliced_conv1d_counts_as_one_beside_parameters():
    sliced = {"target_modules": [], "target_slices": {"conv": {"k": [2, 4]}}, "target_parameters": ["inner.weight"]}
    model = randomise(get_peft_model(Flat(("conv",)).eval(), LilyConfig(r=2, num_A=1, num_B=1, **sliced))).eval()
    with pytest.raises(LilyError, match=r"Conv1D \(conv\) together with one of parameters \(inner\.weight\)"):
        export.as_lora(model)
