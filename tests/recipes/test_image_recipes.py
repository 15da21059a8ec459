"""Recipes of task image-classification, on a tiny vision transformer and images of three plain colours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_helpers import write_recipe
from runs import paste
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel
from typer.testing import CliRunner

from lily.cli.main import app
from lily.errors import LilyError
from lily.insight import gather
from lily.recipes import loader, models, preflight
from lily.recipes.data.images import Preprocess
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import baselines
from lily.recipes.train import train

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 30), "red": (210, 30, 20)}


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed)
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + noise.normal(0, 25, (20, 18, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ViTModel(ViTConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("colours") / "all", 16)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def values(vit: Path, colours: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "colours",
        "task": "image-classification",
        "model": {"path": str(vit)},
        "data": {"train": {"path": str(colours)}, "split": {"validation": 0.25, "test": 0.25}},
        "targets": ["q_proj", "v_proj"],
        "lily": {"r": 4, "num_A": 1, "num_B": 2, "scaling": 4.0},
        "train": {"epochs": 6, "batch_size": 8, "learning_rate": 0.01, "precision": "float32"},
        "output": str(tmp_path / "run"),
        **changes,
    }


def recipe(vit: Path, colours: Path, tmp_path: Path, **changes: Any) -> Any:
    return loader.load_recipe(write_recipe(tmp_path, values(vit, colours, tmp_path, **changes)))


@pytest.fixture(scope="module")
def run(vit: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("trained")
    chosen = recipe(vit, colours, folder, baselines=["majority", "frozen", "lora"])
    return folder / "run", train(chosen, quiet=True)


def test_an_adapter_and_a_new_head_learn_colours(run):
    folder, result = run
    assert result.labels == ["blue", "green", "red"]
    assert result.rows == {"train": 24, "validation": 12, "test": 12}
    assert result.final["accuracy"] == 1.0 > result.before["accuracy"]
    assert result.parameters["adapter"] == 2 * (4 * 32 + 2 * 32 * 4 + 2 * 4 * 2)
    assert result.parameters["head"] == 3 * 32 + 3
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept["task"] == "image-classification"
    assert paste(folder / "best")["model"].config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_baselines_are_measured_on_the_same_images(run):
    _, result = run
    assert result.baselines["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert result.baselines["frozen"]["accuracy"] > 0.9
    assert 0 < result.baselines["lora"]["parameters"] <= result.parameters["adapter"]


def test_the_model_card_loads_the_adapter(run, vit):
    from peft import PeftModel

    base = AutoModelForImageClassification.from_pretrained(str(vit), num_labels=3)
    model = PeftModel.from_pretrained(base, str(run[0] / "best")).eval()
    used = Adapter(str(run[0]))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, used.model(pixel_values=pixels).logits)


@pytest.mark.parametrize("form", ["folder", "table"])
def test_every_image_gets_a_prediction(run, tmp_path, form):
    pictures = write_images(tmp_path / "new", 2, seed=1)
    source = pictures
    if form == "table":
        lines = [{"id": i, "image": f"{c}/{i:02}.png"} for c in COLOURS for i in range(2)]
        source = pictures / "rows.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    invoke("predict", run[0], "--input", source, "--output", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [Path(row["image"]).parent.name for row in found]
    assert [row["prediction"] for row in found] == expected == sorted([*COLOURS] * 2)
    assert len(found) == 6
    assert all(1 / 3 < row["score"] <= 1 for row in found)


def test_a_list_of_files_can_be_evaluated(run, colours):
    path = colours.parent / "test.txt"
    path.write_text("".join(f"all/{c}/{i:02}.png {c}\n" for c in COLOURS for i in range(3)))
    assert Adapter(str(run[0])).evaluate(file=str(path)) == {"accuracy": 1.0}


def test_routing_is_told_by_class(run):
    told = gather.insight(str(run[0]), rows=12)
    assert told.routing is not None
    assert set(told.routing.labels) == set(COLOURS)


def test_collapse_and_export_calibrate_on_the_images(run, tmp_path):
    out, merged = tmp_path / "static", tmp_path / "lora"
    invoke("collapse", run[0], "--out", out)
    assert Adapter(str(out)).evaluate() == {"accuracy": 1.0}
    invoke("export", out, "--to", "lora", "--out", merged)
    assert (merged / "adapter_model.safetensors").is_file()


def test_an_adapter_starts_from_the_images(vit, colours, tmp_path):
    lily = {"r": 4, "num_A": 1, "num_B": 2, "init_weights": "data"}
    short = {"epochs": 1, "max_steps": 1, "batch_size": 8, "learning_rate": 1e-9, "precision": "float32"}
    train(recipe(vit, colours, tmp_path, lily=lily, train=short), quiet=True)
    file = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    tensors = [A for name, A in file.items() if "lily_A" in name]
    assert tensors
    for A in tensors:
        assert torch.allclose(A @ A.T, A[0].square().sum() * torch.eye(4), atol=1e-5)


def test_the_head_alone_can_be_trained(vit, colours, tmp_path):
    chosen = recipe(vit, colours, tmp_path, method="none")
    result = train(chosen, quiet=True)
    assert result.parameters["adapter"] == 0
    assert result.parameters["head"] == 3 * 32 + 3


def test_the_classifier_is_no_target_of_all_linear(vit, colours, tmp_path):
    chosen = recipe(vit, colours, tmp_path, targets="all-linear")
    config = preflight.prepare(chosen).config
    assert config.modules_to_save == ["classifier"]
    assert "classifier" not in str(config.target_modules)


def test_the_size_of_the_images_is_the_models_unless_given(vit, colours, tmp_path):
    prepared = preflight.prepare(recipe(vit, colours, tmp_path))
    assert prepared.processor == Preprocess(16, "imagenet", False)
    chosen = recipe(vit, colours, tmp_path, data={**values(vit, colours, tmp_path)["data"], "image": {"size": 24}})
    with pytest.raises(LilyError, match=r"recipe.yaml:\d+: .*images of 16 x 16 pixels, not 24"):
        preflight.prepare(chosen)


def test_a_model_that_stretches_its_positions_takes_another_size(colours, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dino")
    data = {"train": {"path": str(colours)}, "image": {"size": 42, "norm": "half"}}
    prepared = preflight.prepare(recipe(tmp_path / "dino", colours, tmp_path, data=data))
    assert prepared.processor == Preprocess(42, "half", False)


def test_copies_of_an_image_are_dropped_before_the_split(vit, colours, tmp_path):
    twice = tmp_path / "twice"
    shutil.copytree(colours, twice)
    for label in COLOURS:
        shutil.copyfile(twice / label / "00.png", twice / label / "99.png")
    data = {"train": {"path": str(twice)}, "deduplicate": True}
    splits = preflight.prepare(recipe(vit, twice, tmp_path, data=data)).splits
    assert len(splits.train) + len(splits.validation) == 48


def test_only_the_named_classes_are_used(vit, colours, tmp_path):
    data = {"train": {"path": str(colours)}, "classes": ["red", "blue"]}
    splits = preflight.prepare(recipe(vit, colours, tmp_path, data=data)).splits
    assert splits.labels == ("blue", "red")
    assert len(splits.train) + len(splits.validation) == 32
    with pytest.raises(LilyError, match=r"recipe.yaml:\d+: .*no rows of 'pink'; it has blue, green, red"):
        preflight.prepare(recipe(vit, colours, tmp_path, data={**data, "classes": ["red", "pink"]}))


def test_a_class_of_the_test_images_alone_is_a_class_and_is_said(vit, colours, tmp_path, capfd):
    for part, classes in {"train": ("red", "blue"), "val": ("red", "blue"), "test": ("red", "green")}.items():
        lines = [f"all/{c}/{i:02}.png {[*COLOURS].index(c)}\n" for c in classes for i in range(4)]
        (colours.parent / f"{part}.txt").write_text("".join(lines))
    data = {
        name: {"path": str(colours.parent / f"{file}.txt")}
        for name, file in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    chosen = recipe(vit, colours, tmp_path, data=data, baselines=["majority", "frozen"])
    prepared = preflight.prepare(chosen)
    assert prepared.splits.labels == ("0", "1", "2")
    assert prepared.meta.config.num_labels == 3
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning: no training image is of 1 of the 3 classes (1)")]
    assert baselines.run("frozen", chosen, prepared.splits)["accuracy"] <= 0.5  # nothing can find the green ones


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baselines": ["tfidf"]}, "tfidf is for texts"),
        ({"metrics": ["pearson"]}, "pearson is not a metric of image-classification"),
        ({"classes": ["red"]}, "names fewer than two classes"),
        ({"columns": {"text": "text"}}, "is for texts; image-classification has image and label"),
        ({"columns": {"prompt": "text"}}, "is for sft; image-classification has image and label"),
    ],
)
def test_what_does_not_go_with_images_is_refused(vit, colours, tmp_path, changes, says):
    given = values(vit, colours, tmp_path)
    for name, value in changes.items():
        (given["data"] if name in ("columns", "classes") else given)[name] = value
    with pytest.raises(LilyError, match=says):
        loader.load_recipe(write_recipe(tmp_path, given))


def test_a_table_that_names_a_missing_image_is_refused_with_its_row(vit, colours, tmp_path):
    file = colours.parent / "rows.jsonl"
    file.write_text('{"image": "all/red/00.png", "label": "red"}\n{"image": "all/red/77.png", "label": "red"}\n')
    chosen = recipe(vit, colours, tmp_path, data={"train": {"path": str(file)}})
    with pytest.raises(LilyError, match=r"row 2: there is no image .*all/red/77.png"):
        preflight.prepare(chosen)


def test_the_dry_run_shows_an_image_and_counts_patches(vit, colours, tmp_path):
    said = json.loads(invoke("plan", write_recipe(tmp_path, values(vit, colours, tmp_path)), "--json"))
    assert said["plan"]["tokens"] == 5
    assert said["preview"][0]["text"].endswith(".png, 16 x 16")


TIMM_ADAPTERS: dict[str, dict[str, Any]] = {
    "whole": {"targets": ["qkv"]},
    "paper": {"targets": [], "lily": {"r": 4, "num_A": 1, "num_B": 2, "scaling": 4.0, "slices": {"qkv": ["k", "v"]},
                                      "parallel": ["mlp"], "groups": {"mlp": {"r": 8, "activation": "relu"}}}},
}  # fmt: skip


@pytest.mark.parametrize("adapter", sorted(TIMM_ADAPTERS))
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_a_timm_backbone_is_adapted_at_its_fused_projection(colours, tmp_path, architecture, adapter):
    pytest.importorskip("timm", reason="needs timm, which the vision environment has: make test-vision")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    args = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    config = TimmWrapperConfig(architecture=architecture, model_args=args, num_labels=3)
    config.pretrained_cfg = {"input_size": [3, 16, 16]}
    torch.manual_seed(0)
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "timm")
    chosen = recipe(tmp_path / "timm", colours, tmp_path, **TIMM_ADAPTERS[adapter], baselines=["frozen", "lora"])
    result = train(chosen, quiet=True)
    assert result.parameters["head"] == 3 * 32 + 3
    assert result.final["accuracy"] > 0.9
    assert 0 < result.baselines["lora"]["parameters"] <= result.parameters["adapter"]
    assert models.heads_of(models.meta_model(chosen.model, chosen.task, 3)) == ["timm_model.head"]
    tensors = load_file(tmp_path / "run" / "best" / "adapter_model.safetensors")
    parts = {"whole": ["qkv"], "paper": ["qkv.k", "qkv.v", "mlp"]}[adapter]
    assert all(any(f"{part}." in name for name in tensors) for part in parts)
    learned = [t for name, t in tensors.items() if "lily_B" in name]
    assert len(learned) == len(parts)
    assert all(t.any() for t in learned)  # B starts at zero
