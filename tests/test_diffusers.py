"""Lily on the parts of diffusers' pipelines, exported as a LoRA that the pipelines load themselves."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import pytest
import torch
from adapters import adapted
from helpers import build, randomise
from paths import ROOT
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from safetensors import safe_open

from lily import LilyConfig, LilyError, export

diffusers = pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "lily-peft[diffusion]"')

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in"]


# Attention picks its kernel by what requires a gradient, so models that are compared are frozen alike.
def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        use_linear_projection=True,
    )
    return model.requires_grad_(False).eval()


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return model.requires_grad_(False).eval()


def sd3():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    return model.requires_grad_(False).eval()


def unet_inputs():
    return {"sample": rand(2, 4, 8, 8), "timestep": torch.tensor([3, 500]), "encoder_hidden_states": rand(2, 5, 8)}


def flux_inputs():
    return {
        "hidden_states": rand(2, 6, 4),
        "encoder_hidden_states": rand(2, 5, 8),
        "pooled_projections": rand(2, 8),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": rand(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def sd3_inputs():
    return {
        "hidden_states": rand(2, 16, 8, 8),
        "encoder_hidden_states": rand(2, 5, 8),
        "pooled_projections": rand(2, 8),
        "timestep": torch.tensor([3.0, 500.0]),
    }


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pipeline(kind, model):
    """A pipeline without the parts that loading a LoRA into this model does not touch."""
    absent = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    if kind == "unet":
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        return diffusers.StableDiffusionPipeline(
            **absent, unet=model, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    absent.update(dict.fromkeys(["text_encoder_2", "tokenizer_2"]))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if kind == "flux":
        return diffusers.FluxPipeline(**absent, transformer=model, scheduler=scheduler)
    absent.update(dict.fromkeys(["text_encoder_3", "tokenizer_3"]))
    return diffusers.StableDiffusion3Pipeline(**absent, transformer=model, scheduler=scheduler)


KINDS = {
    "unet": (unet, unet_inputs, "unet"),
    "flux": (flux, flux_inputs, "transformer"),
    "sd3": (sd3, sd3_inputs, "transformer"),
}


def inject(model, config):
    return inject_adapter_in_model(config, model)


def add(model, config):
    model.add_adapter(config)
    return model


WAYS = {"add_adapter": add, "get_peft_model": get_peft_model, "inject_adapter_in_model": inject}


@torch.no_grad()
def output(model, inputs):
    return model(**inputs).sample


def lily(kind, way="add_adapter", **options):
    values = {"r": 4, "num_A": 2, "num_B": 3, "target_modules": TARGETS, "routing": "static", "scaling": 1.0, **options}
    config = LilyConfig(**values)
    return randomise(WAYS[way](KINDS[kind][0](), config), scale=0.4).eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_loads_the_export_and_computes_the_same(kind, way, tmp_path):
    make, inputs, component = KINDS[kind]
    plain = output(make(), inputs())
    model = lily(kind, way, scaling=0.7)
    expected = output(model, inputs())
    assert (expected - plain).abs().max() > 1e-2

    export.write_lora(export.as_lora(model, target="diffusers"), tmp_path / "lora", layout="diffusers")
    fresh = make()
    pipe = pipeline(kind, fresh)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    assert (output(getattr(pipe, component), inputs()) - expected).abs().max() <= 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(output(fresh, inputs()), plain)


def test_a_pipeline_loads_an_export_with_convolutions(tmp_path):
    convolutions = ["conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "conv_out"]
    model = lily("unet", target_modules=[*TARGETS, *convolutions])
    expected = output(model, unet_inputs())
    export.write_lora(export.as_lora(model, target="diffusers"), tmp_path / "lora", layout="diffusers")
    fresh = unet()
    pipeline("unet", fresh).load_lora_weights(str(tmp_path / "lora"))
    assert (output(fresh, unet_inputs()) - expected).abs().max() <= 1e-5
    assert "Conv2d" in {type(layer).__name__ for layer in fresh.modules() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize("way", WAYS)
def test_peft_loads_the_export_too(way, tmp_path):
    model = lily("unet", way, scaling=0.7)
    expected = output(model, unet_inputs())
    export.write_lora(export.as_lora(model), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(unet(), str(tmp_path / "lora")).eval()
    assert (output(loaded, unet_inputs()) - expected).abs().max() <= 1e-5


def test_training_reaches_every_layer_and_starts_at_the_base_model():
    model = unet()
    model.add_adapter(LilyConfig(r=4, num_A=2, num_B=3, target_modules=TARGETS))
    assert torch.equal(output(model, unet_inputs()), output(unet(), unet_inputs()))
    randomise(model)
    model(**unet_inputs()).sample.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lily_" in name for name in trained)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_data_dependent_adapter_is_refused():
    with pytest.raises(LilyError, match="collapse"):
        export.as_lora(lily("unet", routing="sequence"), target="diffusers")


def test_the_component_can_be_named_and_must_be_where_it_is_not_known(tmp_path):
    model = lily("unet")
    lora = export.as_lora(model, target="diffusers")
    assert lora.component == "unet"
    export.write_lora(lora, tmp_path / "named", layout="diffusers", component="transformer")
    with safe_open(tmp_path / "named" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
    other = export.as_lora(adapted("llama", routing="static"), target="diffusers")
    with pytest.raises(LilyError, match="component='unet'"):
        export.write_lora(other, tmp_path / "other", layout="diffusers")
    with pytest.raises(LilyError, match="is only for layout='diffusers'"):
        export.write_lora(other, tmp_path / "other", component="unet")
    with pytest.raises(LilyError, match="choose peft or diffusers"):
        export.write_lora(other, tmp_path / "other", layout="kohya")
    assert not (tmp_path / "other").exists()


def test_what_a_pipeline_would_scale_wrongly_is_refused(tmp_path):
    lora = export.as_lora(lily("unet", scaling=0.5))
    with pytest.raises(LilyError, match="target='diffusers'"):
        export.write_lora(lora, tmp_path / "a", layout="diffusers")
    uneven = lily("unet", rank_pattern={"to_v": 6})
    with pytest.raises(LilyError, match="target='diffusers'"):
        export.write_lora(export.as_lora(uneven), tmp_path / "a", layout="diffusers")
    padded = export.as_lora(uneven, target="diffusers")
    export.write_lora(padded, tmp_path / "b", layout="diffusers")
    pipe = pipeline("unet", unet())
    pipe.load_lora_weights(str(tmp_path / "b"))
    assert (output(pipe.unet, unet_inputs()) - output(uneven, unet_inputs())).abs().max() <= 1e-5
    other = dataclasses.replace(padded, other={"x.bias": torch.ones(1)})
    with pytest.raises(LilyError, match="only A and B"):
        export.write_lora(other, tmp_path / "c", layout="diffusers")


def test_a_model_from_elsewhere_has_no_component():
    model = get_peft_model(build("vit"), LilyConfig(r=4, num_B=1, target_modules=["q_proj"]))
    assert export.as_lora(model).component is None


def test_biases_of_an_injected_adapter_are_exported(tmp_path):
    for way in WAYS:
        model = lily("unet", way, bias="lily_only")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and name.endswith("bias"):
                    p.add_(0.3)
        expected = output(model, unet_inputs())
        export.write_lora(export.as_lora(model), tmp_path / way)
        loaded = PeftModel.from_pretrained(unet(), str(tmp_path / way)).eval()
        assert (output(loaded, unet_inputs()) - expected).abs().max() <= 1e-5, way
        with pytest.raises(LilyError, match="biases"):
            export.as_lora(model, target="diffusers")


def test_adapters_of_a_denoiser_are_swapped_as_lily_and_as_the_lora_that_they_are(tmp_path):
    made = [lily("unet", scaling=0.7), lily("unet", r=6, scaling=1.3, num_B=2)]
    expected = [output(model, unet_inputs()) for model in made]
    named = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "default"}
    for number, model in enumerate(made):
        model.save_lora_adapter(tmp_path / str(number))
    model, state, config = made[1], get_peft_model_state_dict(made[0]), made[0].peft_config["default"]
    with pytest.raises(LilyError, match="is Lily's, and a LoRA cannot take its place"):
        model.load_lora_adapter(tmp_path / "0", hotswap=True, **named)
    assert torch.equal(output(model, unet_inputs()), expected[1])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter_from_state_dict(model, state, "default", config)
    assert (output(model, unet_inputs()) - expected[0]).abs().max() <= 1e-5

    model = unet()
    model.enable_lora_hotswap(target_rank=6)
    for number, wanted in enumerate(expected):
        model.load_lora_adapter(tmp_path / str(number), hotswap=number > 0, **named)
        assert (output(model, unet_inputs()) - wanted).abs().max() <= 1e-5


def test_the_guides_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = ROOT / "docs" / "deploy-targets.md"
    code = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)[1]
    exec(compile(code, guide.name, "exec"), {"unet_config": dict(unet().config)})
    pipe = pipeline("unet", unet())
    pipe.load_lora_weights("unet-lora")
    assert pipe.get_active_adapters() == ["default_0"]


# --- diffusers' own ways to save ------------------------------------------------------------------------------------


ATTENTION = ["to_q", "to_v"]  # diffusers renames the LoRA of attention alone, and reads no mixture of names


def by_model(model, folder):
    model.save_lora_adapter(folder)
    fresh = unet()
    fresh.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    return fresh


def by_recipe(model, folder, convert=True):
    """As the training scripts of diffusers do it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    state = convert_state_dict_to_diffusers(state) if convert else state
    metadata = _collate_lora_metadata({"unet": model})
    StableDiffusionPipeline.save_lora_weights(save_directory=folder, unet_lora_layers=state, **metadata)
    fresh = unet()
    pipeline("unet", fresh).load_lora_weights(folder)
    return fresh


@pytest.mark.parametrize("way", [by_model, by_recipe, partial(by_recipe, convert=False)])
def test_what_diffusers_saves_of_a_static_adapter_is_the_lora_that_it_is(way, tmp_path):
    model = lily("unet", scaling=0.7, target_modules=ATTENTION)
    expected = output(model, unet_inputs())
    assert (output(way(model, str(tmp_path)), unet_inputs()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("way", [by_model, by_recipe, partial(by_recipe, convert=False)])
def test_a_dynamic_adapter_is_refused_with_what_to_do_and_warned_of_before_training(way, tmp_path):
    with pytest.warns(UserWarning, match="save_lora_weights will refuse it; use routing='static'"):
        model = lily("unet", routing="sequence")
    with pytest.raises(LilyError, match=r"depends on the data.*lily\.collapse.*nothing is lost.*lily\.Settling"):
        way(model, str(tmp_path / "new"))
    assert not list(tmp_path.glob("new/*"))


def test_a_pipeline_moves_the_tensors_of_one_adapter():
    from peft import LoraConfig

    model, made = lily("unet"), LilyConfig(r=4, num_B=2, target_modules=["to_q"], routing="static")
    model.add_adapter(made, adapter_name="other")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="lora")
    pipeline("unet", model).set_lora_device(["other", "lora"], "meta")
    moved = {name for name, p in model.named_parameters() if p.is_meta}
    assert moved == {name for name, _ in model.named_parameters() if ".other." in name or ".lora." in name}


def test_saving_a_pickle_is_refused(tmp_path):
    with pytest.raises(LilyError, match="safe_serialization=False writes a pickle"):
        lily("unet").save_lora_adapter(tmp_path, safe_serialization=False)


def test_loras_are_saved_as_without_lily(tmp_path):
    from peft import LoraConfig

    model = unet()
    model.add_adapter(LoraConfig(r=2, target_modules=ATTENTION))
    randomise(model)
    expected = output(model.eval(), unet_inputs())
    for way in (by_model, by_recipe):
        assert (output(way(model, str(tmp_path / way.__name__)), unet_inputs()) - expected).abs().max() <= 1e-5
