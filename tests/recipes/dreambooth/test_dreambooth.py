"""Subject-driven generation: the objectives, the loop, its files, and what other programs make of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from dreambooth_helpers import KINDS, RESOLUTION, draw_subject, recipe, save, values
from helpers import tally
from paths import ROOT
from safetensors.torch import load_file
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader

diffusers = pytest.importorskip("diffusers", reason='diffusers is not installed: pip install "lily-peft[diffusion]"')

from lily import LilyConfig  # noqa: E402
from lily.recipes import methods  # noqa: E402
from lily.recipes.dreambooth import adapters, families, latents, loop, objectives, pipelines, run, samples, tiny  # noqa: E402
from lily.recipes.spec.dreambooth import Pipeline  # noqa: E402

pytestmark = pytest.mark.sample(every=10)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="session")
def pipes(tmp_path_factory):
    """Kind -> a folder with a very small pipeline of it."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: save(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    return draw_subject(tmp_path_factory.mktemp("subject") / "square")


def trained(tmp_path, pipeline, images, *overrides, **changes):
    chosen = recipe(tmp_path, values(pipeline, images, tmp_path / "run", **changes), *overrides)
    return chosen, run.train(chosen, quiet=True)


def pixels(file):
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).astype("int64"))


def fresh(pipeline, tmp_path):
    """The pipeline read anew, and what is drawn with it after `change` was done to it, as a run draws."""
    pipe = pipelines.load_pipeline(Pipeline(path=str(pipeline)))
    family = families.family_of(type(pipe).__name__)

    def again(chosen, change):
        change(pipe, getattr(pipe, family.component))
        with torch.no_grad():
            text = family.encode(pipe, [chosen.subject.prompt, ""], chosen.model.max_tokens)
        v = chosen.validation
        made = samples.draw(pipe, family, text.rows([0]), text.rows([1]), RESOLUTION, v, v.images, v.seed)
        samples.write_grid(made, tmp_path / "again.png")
        return pixels(tmp_path / "again.png")

    return again


# --- the objectives -------------------------------------------------------------------------------------------------


def noise_schedule(**options):
    return diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)


def batch(count=5):
    source = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(count, 4, 4, 4, generator=source, dtype=torch.float64) for _ in range(2))
    return x, noise, torch.tensor([0, 100, 400, 800, 999])[:count]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_noise_and_velocity_losses_are_the_papers_formulas(kind, gamma):
    x, noise, times = batch()
    scheduler = noise_schedule(prediction_type=kind)
    seen = {}

    def predict(noisy, at):
        seen.update(noisy=noisy, at=at)
        return 0.3 * noisy

    losses = objectives.Diffusion(scheduler, gamma).losses(predict, x, noise, times)
    bars = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[times]
    a, s = bars.sqrt().view(-1, 1, 1, 1), (1 - bars).sqrt().view(-1, 1, 1, 1)
    noisy = a * x + s * noise
    target = noise if kind == "epsilon" else a * noise - s * x
    expected = (0.3 * noisy - target).square().mean((1, 2, 3))
    if gamma is not None:
        snr = bars / (1 - bars)
        expected = expected * snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)
    assert torch.equal(seen["at"], times)
    assert torch.allclose(seen["noisy"], noisy, atol=1e-5)  # diffusers keeps its schedule in float32
    assert torch.allclose(losses.double(), expected, rtol=1e-4)


def test_the_flow_loss_asks_for_the_velocity_from_image_to_noise():
    x, noise, times = batch()
    flow = objectives.Flow(diffusers.FlowMatchEulerDiscreteScheduler())

    def predict(noisy, at):
        sigma = (at / 1000).view(-1, 1, 1, 1)
        assert torch.allclose(noisy, (1 - sigma) * x + sigma * noise, atol=1e-5)
        return noise - x

    assert flow.losses(predict, x, noise, times).abs().max() == 0
    assert torch.allclose(
        flow.losses(lambda noisy, at: torch.zeros_like(noisy), x, noise, times).double(),
        (noise - x).square().mean((1, 2, 3)),
    )


def test_flow_times_follow_the_logit_normal_density():
    flow = objectives.Flow(diffusers.FlowMatchEulerDiscreteScheduler(), mean=0.5, std=0.8)
    share = (flow.draw(20_000, torch.Generator().manual_seed(0)) + 0.5) / flow.steps
    logits = torch.logit(share)
    assert abs(logits.mean() - 0.5) < 0.03
    assert abs(logits.std() - 0.8) < 0.03


def test_a_schedule_that_predicts_the_image_is_refused():
    with pytest.raises(LilyError, match="predicts 'sample'"):
        objectives.Diffusion(noise_schedule(prediction_type="sample"))


def test_flux_latents_are_unpacked_to_where_they_were_packed_from():
    class Identity(torch.nn.Module):
        config = type("Config", (), {"guidance_embeds": False})

        def forward(self, hidden_states, **_):
            return type("Output", (), {"sample": hidden_states})

    x = torch.randn(2, 4, 6, 8)
    text = families.Text(torch.zeros(2, 3, 8), torch.zeros(2, 8))
    assert torch.equal(families.Flux().predict(Identity(), x, torch.ones(2), text, torch.zeros(2, 6)), x)


# --- the method -----------------------------------------------------------------------------------------------------


def test_a_unets_attention_computes_the_papers_formula():
    """Batch routing, no bias, r 4, 4 A and 4 B on to_q, to_k, to_v and to_out, against a transcription of the paper.

    h = x A^T; p = softmax(h R^T); alpha = mean of p over batch and tokens; y = W x + s h (sum_i alpha_i B_i).
    """
    pipe = tiny.sdxl(width=16, size=4, vae=tiny.autoencoder(0, 8))
    unet = pipe.unet.double().requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LilyConfig(r=4, num_A=4, num_B=4, scaling=1.0, routing="batch", target_modules=TARGETS))
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.3)
    bank, plan = unet.lily_bank, unet.lily_bank.plans["default"]
    checked = []

    def compare(name, layer):
        def hook(module, inputs, output):
            x = inputs[0]
            A, B = bank.pair("default", plan.slots[name])
            B = B.view(4, 4, -1)  # (experts, r, out); kept as (experts * r, out)
            h = x @ A.T
            p = torch.softmax(h @ layer.lily_router["default"].weight.T, dim=-1)
            alpha = p.reshape(-1, 4).mean(0)
            combined = sum(alpha[i] * B[i] for i in range(4))
            base = layer.get_base_layer()
            expected = torch.nn.functional.linear(x, base.weight, base.bias) + 1.0 * (h @ combined)
            assert torch.allclose(output, expected, rtol=1e-10, atol=1e-10), name
            checked.append(name)

        return hook

    for name in plan.slots:
        layer = unet.get_submodule(name)
        layer.register_forward_hook(compare(name, layer))
    text = families.Text(torch.randn(2, 5, 2 * tiny.WIDTH).double(), torch.randn(2, tiny.WIDTH).double())
    families.Sdxl().predict(unet, torch.randn(2, 4, 4, 4).double(), torch.tensor([3, 500]), text, torch.zeros(2, 6))
    assert sorted(checked) == sorted(plan.slots)
    assert {name.rpartition("attn")[2][2:] for name in checked} == set(TARGETS)


def sdxl_shapes():
    """(layers, in, out) of each group of SDXL's attention, written out: 10 blocks of 640 and 60 of 1280."""
    for blocks, width in ((10, 640), (60, 1280)):
        yield from [(2 * blocks, width, width)] * 2  # to_q and to_out of self- and cross-attention
        for _ in ("to_k", "to_v"):
            yield blocks, width, width
            yield blocks, 2048, width


def test_the_papers_sdxl_recipe_plans_without_a_download_or_an_image(monkeypatch):
    monkeypatch.delenv("LILY_DATA", raising=False)
    out = CliRunner().invoke(app, ["plan", "paper/dreambooth-sdxl", "--json"])
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    plan, lily = found["plan"], found["recipe"]["lily"]
    assert plan["model_parameters"] == 2_567_463_684  # of SDXL 1.0's UNet
    r, A, B = 4, 4, 4
    assert (lily["r"], lily["num_A"], lily["num_B"], lily["routing"]) == (r, A, B, "batch")
    formula = sum(r * (A * wide + B * out + layers * B) for layers, wide, out in sdxl_shapes())
    assert plan["parameters"]["total"] == formula
    assert plan["lora"] == plan["lora"] | {"r": 1, "parameters": sum(n * (i + o) for n, i, o in sdxl_shapes())}
    assert "first example" not in CliRunner().invoke(app, ["plan", "paper/dreambooth-sdxl"]).stdout


@pytest.mark.parametrize("kind", ["sdxl", "flow"])
def test_an_offline_recipe_plans_without_building_its_pipeline(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "cache"))
    out = CliRunner().invoke(app, ["plan", f"offline/dreambooth-{kind}-tiny", "--json"])
    assert out.exit_code == 0, out.output
    plan = json.loads(out.stdout)["plan"]
    assert 0.9 * plan["parameters"]["total"] < plan["lora"]["parameters"] <= plan["parameters"]["total"]
    assert not (tmp_path / "cache").exists()


# --- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("sdxl", marks=pytest.mark.slow), *(k for k in KINDS if k != "sdxl")])
def test_a_run_learns_its_images_beside_lora_and_reloads_through_diffusers(kind, tmp_path, pipes, subject):
    chosen, result = trained(
        tmp_path, pipes[kind], subject, "train.max_steps=12", "validation.every=6", "train.batch_size=3",
        baselines=["lora"],
    )  # fmt: skip
    output = tmp_path / "run"
    written = json.loads((output / "metrics.json").read_text())
    assert written["before"]["loss"] > written["final"]["loss"] == result.history[-1]["loss"]
    assert [found["step"] for found in written["history"]] == [0, 6, 12]
    lora = written["baselines"]["lora"]
    assert lora["loss"] < written["before"]["loss"]
    assert lora["parameters"] > 0 < written["parameters"]["adapter"]
    for step in (0, 6, 12):
        assert (output / "samples" / f"step-{step:05d}-prompt-0.png").is_file()
    before, after = (pixels(output / written["samples"][0][when]) for when in ("before", "after"))
    assert before.shape == (256, 512, 3)
    assert not torch.equal(before, after)

    again = fresh(pipes[kind], tmp_path)(chosen, lambda pipe, model: adapters.load(model, output / "last"))
    assert (again - after).abs().max() <= 1  # of 255: a frozen adapter takes other kernels than one in training
    lora_after = pixels(output / "lora" / written["samples"][0]["after"])
    again = fresh(pipes[kind], tmp_path)(
        chosen, lambda pipe, model: pipe.load_lora_weights(str(output / "lora" / "diffusers"))
    )
    assert (again - lora_after).abs().max() <= 1
    tally("loads held", 2)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_a_static_adapter_is_written_for_pipelines_too(kind, tmp_path, pipes, subject):
    chosen, _ = trained(tmp_path, pipes[kind], subject, "lily.routing=static", "lily.scaling=0.7")
    expected = pixels(tmp_path / "run" / "samples" / "step-00004-prompt-0.png")
    again = fresh(pipes[kind], tmp_path)(
        chosen, lambda pipe, model: pipe.load_lora_weights(str(tmp_path / "run" / "diffusers"))
    )
    assert (again - expected).abs().max() <= 1
    tally("loads held")


def test_an_adapter_that_looks_at_its_input_is_not_written_as_a_lora(tmp_path, pipes, subject):
    trained(tmp_path, pipes["sdxl"], subject)
    assert not (tmp_path / "run" / "diffusers").exists()


def state(folder):
    return load_file(folder / "last" / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, pipes, subject):
    common = {"lily": {"r": 4, "num_A": 2, "num_B": 2, "dropout": 0.2}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, whole = trained(tmp_path / "a", pipes["sdxl"], subject, **common)
    trained(tmp_path / "b", pipes["sdxl"], subject, "train.max_steps=2", **common)
    given = values(pipes["sdxl"], subject, tmp_path / "b" / "run", **common)
    file = loop.newest_checkpoint(tmp_path / "b" / "run" / "checkpoints") / f"{loop.STATE}.json"
    assert '"optimizer"' in file.read_text()
    file.write_text(file.read_text().replace('"optimizer"', '"optimiser"'))  # as earlier versions spelled it
    resumed = run.train(recipe(tmp_path / "b", given), resume=True, quiet=True)
    assert equal(state(tmp_path / "a" / "run"), state(tmp_path / "b" / "run"))
    assert resumed.history == whole.history
    with pytest.raises(LilyError, match=r"train.learning_rate was 0.01 and is now 0.1"):
        run.train(recipe(tmp_path / "b", given, "train.learning_rate=0.1"), resume=True, quiet=True)
    tally("faults survived")


def test_the_seed_decides_the_adapter_and_nothing_else_does(tmp_path, pipes, subject):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(found))
        trained(tmp_path / name, pipes["sd3"], subject, f"seed={seed}", "train.max_steps=2")
        found.append(state(tmp_path / name / "run"))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_its_last_checkpoint(tmp_path, pipes, subject):
    given = values(pipes["sd3"], subject, tmp_path / "run")
    wild = ["train.learning_rate=1e25", "validation.every=1", "train.gradient_accumulation=1"]
    with pytest.raises(LilyError, match=r"the loss is (nan|inf) at step \d; lower train.learning_rate; the adapter of"):
        run.train(recipe(tmp_path, given, *wild), quiet=True)
    kept = loop.newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (kept / "adapter_model.safetensors").is_file()
    tally("faults survived")


def test_a_checkpoint_that_cannot_be_read_says_so(tmp_path, pipes, subject):
    chosen, _ = trained(tmp_path, pipes["sd3"], subject)
    (loop.newest_checkpoint(tmp_path / "run" / "checkpoints") / f"{loop.STATE}.json").write_bytes(b"torn")
    with pytest.raises(LilyError, match="cannot be read"):
        run.train(chosen, resume=True, quiet=True)
    tally("faults survived")


def test_prior_preservation_draws_images_of_the_class_and_weighs_their_loss(tmp_path, pipes, subject):
    prior = "subject.prior={prompt: a photo of a toy, count: 2, weight: 0.5}"
    chosen, result = trained(tmp_path, pipes["sd3"], subject, prior, "train.max_steps=2")
    drawn = sorted((tmp_path / "run" / run.CLASS_IMAGES).iterdir())
    assert len(drawn) == 2
    assert result.final.keys() == {"loss", "prior_loss"}

    class Recorded:
        prior = latents.Encoded(*(torch.zeros(2, *shape) for shape in ((4, 2, 2), (4, 2, 2), (6,))))
        images = latents.Encoded(*(torch.zeros(3, *shape) for shape in ((4, 2, 2), (4, 2, 2), (6,))))
        objective = objectives.Flow(diffusers.FlowMatchEulerDiscreteScheduler())

        def losses(self, model, images, rows, x, noise, times):
            assert rows == [0, 1]
            return torch.tensor([3.0, 8.0])  # the subject, its class

    assert loop.train_loss(Recorded(), None, chosen, 0) == 3.0 + 0.5 * 8.0


def test_every_image_is_seen_once_each_time_round():
    seen = torch.cat([loop.chosen(5, 2, micro, seed=3) for micro in range(10)]).view(4, 5)
    assert all(sorted(row.tolist()) == list(range(5)) for row in seen)
    assert len({tuple(row.tolist()) for row in seen}) > 1


@pytest.mark.slow
def test_checkpointing_the_forward_changes_no_gradient(tmp_path, pipes, subject):
    found = []
    for name in ("false", "true"):
        (tmp_path / name).mkdir()
        change = f"train.gradient_checkpointing={name}"
        trained(tmp_path / name, pipes["sdxl"], subject, change, "train.max_steps=2")
        found.append(state(tmp_path / name / "run"))
    assert all(torch.allclose(a, found[1][name], atol=1e-6) for name, a in found[0].items())


@pytest.mark.slow
def test_half_precision_weights_train_a_float32_adapter(tmp_path, pipes, subject):
    _, result = trained(
        tmp_path, pipes["sdxl"], subject, "model.dtype=bfloat16", "train.precision=bfloat16", "train.max_steps=2"
    )
    assert all(tensor.dtype == torch.float32 for tensor in state(tmp_path / "run").values())
    assert result.precision == "bfloat16"


def test_an_autoencoder_that_needs_float32_draws_in_it(tmp_path, pipes, subject, monkeypatch):
    load, start, seen = run.load, loop.accelerator_for, []

    def watched(*given):
        pipe = load(*given)
        assert (pipe.vae.config.force_upcast, pipe.vae.dtype) == (True, torch.float16)
        pipe.vae.post_quant_conv = torch.nn.Conv2d(tiny.CHANNELS, tiny.CHANNELS, 1).half()  # which SDXL's has
        pipe.vae.decoder.conv_out.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
        return pipe

    def in_float16(train, precision):  # on a CPU too, where a run would refuse it
        accelerator = start(train, precision)
        accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
        return accelerator

    monkeypatch.setattr(run, "load", watched)
    monkeypatch.setattr(loop, "accelerator_for", in_float16)
    short = {"train": {"max_steps": 1, "gradient_accumulation": 1, "learning_rate": 1e-4, "precision": "float32"}}
    settings = ["model.dtype=float16", "validation.images=1", "validation.steps=1"]
    trained(tmp_path, pipes["sdxl"], subject, *settings, **short)
    assert seen == [torch.float32] * 2  # before and after


def test_sizes_say_how_an_image_was_cut(subject, pipes):
    images, sizes = latents.read(latents.image_files(subject), RESOLUTION)
    assert images.shape == (3, 3, RESOLUTION, RESOLUTION)
    assert images.abs().max() <= 1
    # 24 x 20 pixels, scaled by 16 / 20 to 19 x 16, of which the middle 16 columns stay
    assert sizes[0].tolist() == [20, 24, 0, 1, 16, 16]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model={path: a, hub: b}", "give exactly one of path, hub and standin, got path and hub"),
        ("model.revision=main", "revision goes with hub"),
        ("train.epochs=3", "train.epochs: unknown key"),
        ("train.lr=1", "did you mean learning_rate"),
        ("train.warmup=4", "leave none to train"),
        ("lily.settle={}", "lily.settle: is not supported for dreambooth"),
        ("lily.init_weights=data", "lily.init_weights: data is not supported for dreambooth"),
        ("lily={r: 4, num_A: 2, stride_A: 2}", "says the same as num_A"),
        ("targets=[]", "targets: is empty"),
        ("targets=[to_z]", "targets=.*matches no module|to_z"),
        ("method=none", "method: expected lily or lora, got 'none'"),
        ("subject.prompt=''", "subject.prompt"),
        ("subject.images=/nowhere", "subject.images: .*nowhere does not exist"),
        ("subject.resolution=18", "the pipeline needs a multiple of 8"),
        ("subject.prior={prompt: a toy, images: /nowhere}", "subject.prior.images"),
        ("model.path=/nowhere", "model.path: .*nowhere does not exist"),
        ("model.architecture=sdxl", "the pipeline has other layers"),
        ("output='{nme}'", "unknown placeholder 'nme'"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_and_writes_nothing(change, message, tmp_path, pipes, subject):
    given = values(pipes["sdxl"], subject, tmp_path / "run")
    with pytest.raises(LilyError, match=message):
        run.train(recipe(tmp_path, given, change), quiet=True)
    assert not (tmp_path / "run").exists()
    tally("inputs rejected")


def broken(tmp_path, pipeline, change):
    """A copy of a pipeline's folder, spoiled."""
    import shutil

    copy = tmp_path / "pipeline"
    shutil.copytree(pipeline, copy)
    change(copy)
    return copy


def other_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))


def pickled(folder):
    for file in (folder / "unet").glob("*.safetensors"):
        torch.save(load_file(file), folder / "unet" / "diffusion_pytorch_model.bin")
        file.unlink()


def with_code(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "own.py").write_text("open('ran', 'w').close()\nclass Own:\n    pass\n")
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["own", "Own"]}))


def not_json(folder):
    (folder / "unet" / "config.json").write_text("{")


def no_images(folder):
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, "StableDiffusionPipeline is not a supported pipeline"),
        (pickled, "could not be loaded"),
        (with_code, "could not be loaded"),
        (not_json, "could not be loaded"),
        (no_images, "no model_index.json"),
    ],
)
def test_a_pipeline_that_cannot_be_trusted_or_read_is_refused(change, message, tmp_path, pipes, subject, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = values(broken(tmp_path, pipes["sdxl"], change), subject, tmp_path / "run")
    with pytest.raises(LilyError, match=message):
        run.train(recipe(tmp_path, given), quiet=True)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "ran").exists()
    tally("inputs rejected")


def test_a_file_that_is_no_image_is_named(tmp_path, pipes, subject):
    folder = draw_subject(tmp_path / "spoiled")
    (folder / "9.png").write_bytes(b"no image")
    with pytest.raises(LilyError, match=r"subject.images: .*9\.png: not a readable image"):
        run.train(recipe(tmp_path, values(pipes["sdxl"], folder, tmp_path / "run")), quiet=True)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(LilyError, match="holds no images"):
        run.train(recipe(tmp_path, values(pipes["sdxl"], empty, tmp_path / "run")), quiet=True)
    tally("inputs rejected", 2)


def test_commands_for_text_say_that_a_drawing_recipe_is_none(tmp_path, pipes, subject):
    given = values(pipes["sd3"], subject, tmp_path / "run")
    with pytest.raises(LilyError, match="is a recipe of task dreambooth"):
        loader.load_recipe(str(recipe_file(tmp_path, given)))


def recipe_file(tmp_path, given):
    recipe(tmp_path, given)
    return next(tmp_path.glob("*.yaml"))


def test_the_command_line_plans_trains_and_prints_the_schema(tmp_path, pipes, subject):
    file = str(recipe_file(tmp_path, values(pipes["sd3"], subject, tmp_path / "run")))
    out = CliRunner().invoke(app, ["plan", file, "--json"])
    assert out.exit_code == 0, out.output
    planned = json.loads(out.stdout)["plan"]["parameters"]["total"]
    out = CliRunner().invoke(app, ["train", file, "train.max_steps=2", "--quiet"])
    assert out.exit_code == 0, out.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["parameters"]["adapter"] == planned
    assert "untrained" in out.stdout
    schema = json.loads(CliRunner().invoke(app, ["schema", "dreambooth"]).stdout)
    assert schema["title"] == "DreamBooth"
    card = (tmp_path / "run" / "last" / "README.md").read_text()
    guide = (ROOT / "docs" / "diffusion.md").read_text().replace("pipe.unet", "pipe.transformer")
    for page in (card, guide):
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        pipe = pipelines.load_pipeline(Pipeline(path=str(pipes["sd3"])))
        exec(re.sub(r'"[^"]*"', repr(str(tmp_path / "run" / "last")), code), {"pipe": pipe})
        assert "default" in pipe.transformer.peft_config


def test_a_saved_adapter_that_does_not_fit_is_refused(tmp_path, pipes, subject):
    trained(tmp_path, pipes["sd3"], subject, "train.max_steps=1")
    pipe = pipelines.load_pipeline(Pipeline(path=str(pipes["sdxl"])))
    with pytest.raises(LilyError):
        adapters.load(pipe.unet, tmp_path / "run" / "last")
    with pytest.raises(LilyError, match="holds no adapter"):
        adapters.load(pipe.unet, tmp_path)
    tally("inputs rejected", 2)


def test_the_default_routing_of_a_denoiser_looks_at_each_image_alone(tmp_path, pipes, subject):
    _, meta, config = run.planned(recipe(tmp_path, values(pipes["sdxl"], subject, tmp_path / "run")))
    assert config.routing == "sequence"
    assert methods.lily_config(recipe(tmp_path, values(pipes["sdxl"], subject, tmp_path / "run")), meta).num_B == 2


@pytest.mark.slow
def test_a_trained_adapter_becomes_static_and_exports_to_a_pipeline(tmp_path, pipes, subject):
    chosen, _ = trained(tmp_path, pipes["sdxl"], subject, "train.max_steps=2")
    last, static, exported = (str(tmp_path / name) for name in ("run/last", "static", "exported"))
    refused = CliRunner().invoke(app, ["export", last, "--to", "lora", "--for", "diffusers", "--out", exported])
    assert "collapse" in str(refused.exception)
    out = CliRunner().invoke(app, ["collapse", last, "--out", static, "--json"])
    assert out.exit_code == 0, out.output
    assert 0 < json.loads(out.stdout)["drift"]["relative_error"] < 0.5
    out = CliRunner().invoke(app, ["export", static, "--to", "lora", "--for", "diffusers", "--out", exported])
    assert out.exit_code == 0, out.output

    expected = fresh(pipes["sdxl"], tmp_path)(chosen, lambda pipe, model: adapters.load(model, static))
    for folder in (exported, f"{static}/diffusers"):
        again = fresh(pipes["sdxl"], tmp_path)(chosen, lambda pipe, model, f=folder: pipe.load_lora_weights(f))
        assert (again - expected).abs().max() <= 1
    for kind in ("merged", "gguf"):
        refused = CliRunner().invoke(app, ["export", static, "--to", kind, "--out", str(tmp_path / kind)])
        assert isinstance(refused.exception, LilyError), refused.exception
    tally("loads held", 2)


# --- the trained stand-ins ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "flow"])
def test_a_small_pretrained_pipeline_learns_a_real_subject(kind, tmp_path):
    if not Path(os.environ["LILY_DATA"], "dreambooth").is_dir():
        pytest.skip("LILY_DATA names no folder with the DreamBooth images")
    short = ["train.max_steps=120", "validation.every=60", "validation.steps=10"]
    chosen = loader.load_any(f"offline/dreambooth-{kind}-tiny", [f"output={tmp_path / 'run'}", *short])
    result = run.train(chosen, quiet=True)
    assert result.final["loss"] < 0.95 * result.before["loss"]
    assert result.baselines["lora"]["loss"] < result.before["loss"]
    assert result.baselines["lora"]["parameters"] <= result.parameters["adapter"]
    again = pipelines.load_pipeline(chosen.model)
    family = families.family_of(type(again).__name__)
    adapters.load(getattr(again, family.component), tmp_path / "run" / "last")
    with torch.no_grad():
        text = family.encode(again, [chosen.validation.prompts[0], ""], chosen.model.max_tokens)
    v = chosen.validation
    made = samples.draw(again, family, text.rows([0]), text.rows([1]), 64, v, v.images, v.seed)
    samples.write_grid(made, tmp_path / "again.png")
    after = pixels(tmp_path / "run" / result.samples[0]["after"])
    assert (pixels(tmp_path / "again.png") - after).abs().max() <= 1
