"""Stand-in base models: made from a definition and data alone, kept whole or not at all, and worth adapting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from recipes_helpers import sft, write_recipe
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from typer.testing import CliRunner

from lily import LilyError
from lily.cli.main import app
from lily.recipes import deploy, loader, train
from lily.recipes.offline import standins
from lily.recipes.offline.standins import STANDINS, Standin

TEXT = Standin(
    data="rhymes",
    sizes={"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 2},
    steps=30,
    batch=4,
    learning_rate=1e-2,
    tokens=8,
)
IMAGE = Standin(
    data="squares",
    sizes={"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 2},
    steps=3,
    batch=4,
    learning_rate=1e-2,
    classes=("black", "white"),
)
RHYMES = [f"the {size} cat sat on the {size} mat, number {i}" for size in ("big", "small", "old") for i in range(40)]


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shade, name in ((0, "black"), (128, "grey"), (255, "white")):
        (tmp_path / "squares" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), shade).save(tmp_path / "squares" / name / f"{i}.png")
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(standins.TEXTS, "rhymes", lambda: RHYMES)
    monkeypatch.setitem(standins.IMAGES, "squares", lambda: tmp_path / "squares")


def test_a_language_model_learns_and_loads_with_its_tokenizer():
    folder = standins.build("tiny", TEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Any text at all: é, 漢!")["input_ids"]) == "Any text at all: é, 漢!"
    _, kept = standins.held_out(RHYMES)
    ids = standins.windows(tokenizer, kept, TEXT.tokens)
    trained = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(TEXT.seed)
    untrained = standins.language_model(TEXT, tokenizer).eval()
    with torch.no_grad():
        after, before = (m(input_ids=ids, labels=ids, use_cache=False).loss for m in (trained, untrained))
    assert after < before - 1


@pytest.mark.slow
def test_an_image_model_loads_in_a_process_that_only_asks_for_it(tmp_path):
    folder = standins.build("tiny", IMAGE)
    code = (
        "import sys, torch; from lily.recipes import standins\n"
        "import lily.recipes.offline.vision_mamba; from transformers import AutoModelForImageClassification as A\n"
        "print(A.from_pretrained(sys.argv[1]).config.id2label)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "{0: 'black', 1: 'white'}"


def test_classes_that_a_definition_leaves_out_are_left_for_adaptation():
    assert {row["label"] for row in standins.image_rows(IMAGE)} == {"black", "white"}
    assert {row["label"] for row in standins.image_rows(IMAGE, trained=False)} == {"grey"}


@pytest.mark.parametrize("definition", [TEXT, IMAGE], ids=["text", "image"])
def test_the_same_definition_gives_the_same_bits_whatever_else_the_process_does(definition, tmp_path, monkeypatch):
    first = standins.build("tiny", definition)
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "another"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = standins.build("tiny", definition)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert first.name == second.name
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_what_is_made_once_is_found_again_and_a_changed_definition_or_changed_data_is_made_anew(tmp_path, monkeypatch):
    first = standins.build("tiny", TEXT)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert standins.build("tiny", TEXT) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    others = [standins.build("tiny", replace(TEXT, seed=1, steps=1))]
    monkeypatch.setitem(standins.TEXTS, "rhymes", lambda: RHYMES[:-1])
    others.append(standins.build("tiny", TEXT))
    assert len({first, *others}) == 3


def test_a_training_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def breaks(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(standins, "_train", breaks)
    with pytest.raises(KeyboardInterrupt):
        standins.build("tiny", TEXT)
    assert not any((tmp_path / "cache" / "standins").iterdir())


def test_an_unknown_name_is_refused_with_the_near_one():
    with pytest.raises(LilyError, match=r"no stand-in 'mamba_lm'; did you mean mamba-lm\?"):
        standins.standin("mamba_lm")


@pytest.mark.slow
@pytest.mark.network
def test_the_digits_stand_in_knows_its_classes(monkeypatch):
    monkeypatch.delenv("LILY_CACHE")
    model = AutoModelForImageClassification.from_pretrained(standins.standin("vim-digits")).eval()
    pixels, labels, _ = standins.load_images(STANDINS["vim-digits"], standins.image_rows(STANDINS["vim-digits"]))
    with torch.no_grad():
        guesses = torch.cat([model(batch).logits.argmax(-1) for batch in torch.split(pixels, 128)])
    assert (guesses == labels).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.network
def test_the_language_stand_in_knows_more_than_how_frequent_tokens_are(monkeypatch):
    monkeypatch.delenv("LILY_CACHE")
    folder = standins.standin("mamba-lm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    train, kept = standins.held_out(standins.headlines())
    tokens = STANDINS["mamba-lm"].tokens
    counts = torch.bincount(standins.windows(tokenizer, train, tokens).flatten(), minlength=len(tokenizer)) + 1
    ids = standins.windows(tokenizer, kept, tokens)
    with torch.no_grad():
        loss = model(input_ids=ids[:200], labels=ids[:200], use_cache=False).loss
    assert loss < -(counts / counts.sum()).log()[ids[:200, 1:]].mean() - 1


@pytest.mark.slow
@pytest.mark.skipif(not Path(os.environ["LILY_DATA"], "cifar10").is_dir(), reason="LILY_DATA has no cifar10")
def test_the_image_stand_in_separates_classes_that_it_never_saw_better_than_an_untrained_one(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.delenv("LILY_CACHE")
    definition = STANDINS["vim-small"]
    folder = standins.standin("vim-small")
    pixels, labels, names = standins.load_images(definition, standins.image_rows(definition, trained=False)[::4])
    torch.manual_seed(definition.seed)
    scores = []
    for model in (AutoModelForImageClassification.from_pretrained(folder), standins.classifier(definition, names)):
        with torch.no_grad():
            x = torch.cat([model.eval().features(batch) for batch in torch.split(pixels, 128)]).numpy()
        x = (x - x.mean(0)) / x.std(0)
        probe = LogisticRegression(max_iter=300).fit(x[::2], labels[::2])
        scores.append(probe.score(x[1::2], labels[1::2]))
    assert scores[0] > scores[1]


def test_a_recipe_names_a_stand_in_and_its_adapter_says_how_to_load_it(tmp_path, chat_table, monkeypatch):
    monkeypatch.setitem(STANDINS, "tiny", TEXT)
    values = sft(tmp_path, chat_table, tmp_path, model={"standin": "tiny"}, metrics=["loss"])
    values["data"]["max_length"] = 64
    recipe = loader.load_recipe(write_recipe(tmp_path, values), ["train.max_steps=2", "generation.samples=0"])
    assert "the stand-in tiny" in CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml")]).stdout
    train.train(recipe, quiet=True)
    adapter = tmp_path / "run" / "best"
    model, words, _ = deploy.load_for_export(str(adapter))
    assert (type(model.get_base_model()).__name__, words.eos_token) == ("MambaForCausalLM", standins.END)
    card = (adapter / "README.md").read_text("utf-8")
    assert "the stand-in `tiny`" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, object] = {}
    monkeypatch.chdir(adapter)
    exec(code, found)
    assert isinstance(found["model"], PeftModel)


def test_a_stand_in_takes_the_place_of_an_inherited_model_and_the_other_way_round(tmp_path):
    assert loader.load_recipe("quickstart", ["model.standin=mamba-lm"]).model.package is None
    path = write_recipe(tmp_path, {"extends": "chat", "model": {"standin": "mamba-lm"}})
    assert loader.load_recipe(path).model.kind == "standin"
    assert loader.load_recipe(path, ["model.hub=some/model"]).model.standin is None
