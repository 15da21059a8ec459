"""The VTAB-1K protocol as a script, and the paper's recipes on the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from benchmarks import vtab as script
from lily.cli.main import app
from lily.errors import LilyError
from lily.recipes import loader, train
from lily.recipes.data.images import read_images
from lily.recipes.offline.vision_mamba import VisionMambaConfig, VisionMambaForImageClassification, from_vim

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
LISTS = ("train12.txt", "val6.txt", "train12val6.txt", "test.txt")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for label, colour in COLOURS.items():
        (folder / label).mkdir()
        for i in range(10):
            Image.new("RGB", (16, 16), tuple(c + 3 * i for c in colour)).save(folder / label / f"{i}.png")
    return folder


def vtab(*arguments: object) -> None:
    script.main([*map(str, arguments), "--train", "12", "--validation", "6"])


def images(path: Path) -> list[tuple[bytes, str]]:
    return [(Path(row["image"]).read_bytes(), row["label"]) for row in read_images(path)]


def test_the_lists_of_the_public_layout_are_written_and_counted(pictures, tmp_path, capsys):
    folder = tmp_path / "[v2]"
    vtab(pictures, folder)
    out = capsys.readouterr().out
    for name, count in zip(LISTS, (12, 6, 18, 12), strict=True):
        assert len(images(folder / name)) == count
        assert any(name in line and str(count) in line for line in out.splitlines())
    assert str(folder / "train12.txt") in out
    assert "".join(out.split()).startswith(str(folder))
    every = images(folder / "train12val6.txt") + images(folder / "test.txt")
    assert len({content for content, _ in every}) == 30
    assert (folder / "classes.txt").read_text().split() == sorted(COLOURS)


def test_the_same_seed_chooses_the_same_images_and_another_others(pictures, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        vtab(pictures, tmp_path / name, "--seed", seed)
    a, b, c = (images(tmp_path / name / "train12val6.txt") for name in "abc")
    assert a == b != c


def test_images_of_their_own_may_be_the_test(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES", str(pictures))
    vtab("$PICTURES", tmp_path / "out", "--test", "${PICTURES}")
    assert len(images(tmp_path / "out" / "test.txt")) == 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{pictures}", "{out}", "--train", "40"], "30 images are too few for 40 to train and 6"),
        (["{pictures}x", "{out}"], "does not exist"),
        (["{pictures}", "{pictures}"], "{pictures}"),
        (["{pictures}", "{out}", "--test", "{pictures}/red"], "no folders of images"),
    ],
)
def test_what_cannot_be_selected_is_an_error_and_nothing_is_written(pictures, tmp_path, arguments, says):
    def filled(text: str) -> str:
        return text.replace("{pictures}", str(pictures)).replace("{out}", str(tmp_path / "out"))

    with pytest.raises(LilyError) as caught:
        script.main(["--train", "12", "--validation", "6", *map(filled, arguments)])
    assert filled(says) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_of_earlier_versions_names_the_script():
    result = CliRunner().invoke(app, ["vtab", "images", "out", "--train", "12"])
    assert isinstance(result.exception, LilyError)
    assert "python benchmarks/vtab.py" in str(result.exception)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4}
    vit = ViTConfig(**sizes, num_attention_heads=2, intermediate_size=24)
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    VisionMambaForImageClassification(VisionMambaConfig(**sizes, state_size=2)).save_pretrained(folder / "vim")
    return {"vit": folder / "vit", "vim": folder / "vim"}


@pytest.mark.parametrize("name", ["vit", "vim"])
def test_the_papers_recipe_runs_on_such_a_folder(pictures, models, name, tmp_path, monkeypatch):
    monkeypatch.setenv("VTAB_1K", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    vtab(pictures, tmp_path / "cifar")
    changes = [
        f"model.path={models[name]}", "data.image.size=16", "train.epochs=2",
        "data.train.path=$VTAB_1K/cifar/train12val6.txt", "train.evaluate_every=epoch", "train.batch_size=6",
        "train.precision=float32",
    ]  # fmt: skip
    recipe = loader.load_recipe(f"paper/vtab-{name}:cifar", changes)
    said = CliRunner().invoke(app, ["plan", f"paper/vtab-{name}:cifar", *changes, "model.architecture=", "--json"])
    assert said.exit_code == 0, said.output
    result = train.train(recipe, quiet=True)
    assert result.parameters["adapter"] == json.loads(said.stdout)["plan"]["parameters"]["total"]
    assert (result.rows["train"], result.rows["validation"], result.rows["test"]) == (18, 12, 0)
    assert {found["epoch"] for found in result.history} == {1.0, 2.0}
    card = (Path(recipe.output.format(name=recipe.name, method="lily", seed=0)) / "best" / "README.md").read_text()
    assert ("import lily.recipes.offline.vision_mamba" in card) == (name == "vim")
    assert result.best is not None
    assert result.last == {"epoch": 2.0, "value": result.history[-1]["accuracy"]}


def test_weights_of_vims_own_code_are_taken(models):
    ours = VisionMambaForImageClassification.from_pretrained(models["vim"])
    theirs = {name.replace("patch_embed.", "patch_embed.proj."): w for name, w in ours.state_dict().items()}
    again = VisionMambaForImageClassification(ours.config)
    again.load_state_dict(from_vim(theirs))
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(pixels).logits, ours.eval()(pixels).logits)
