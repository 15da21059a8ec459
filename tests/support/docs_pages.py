"""What each page's blocks need: files, and names in Python. And the options that make commands short."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from adapters import adapted
from docs_world import World
from dreambooth_helpers import draw_subject, save
from helpers import build, inputs, randomise
from peft import get_peft_model
from settling import ROWS, arguments, fresh
from transformers import AutoModelForCausalLM, LlamaConfig

import lily

Prepare = Callable[[World], dict[str, Any]]

# Added to a command of any page, or of one; a repeated option replaces the one that stands there. The
# precision is one for all, since accelerate keeps to that which a process began with.
PRECISION = "train.precision=float32"
FEW_STEPS = "train.max_steps=4"
SMALLER: dict[str | tuple[str, str], tuple[str, ...]] = {
    "train": (PRECISION, FEW_STEPS),
    "tune": (PRECISION, FEW_STEPS, "--trials", "1"),
    "compare": (PRECISION, "--seeds", "1"),
    "sweep": (PRECISION, "lily.r=24", "--points", "2", "--seeds", "1", "--overwrite"),
    "bench": ("--width", "64", "--depth", "2", "--tokens", "16", "--rounds", "1", "--batch", "1", "--params", "30k"),
    ("docs/tutorials/vision.md", "train"): (PRECISION, FEW_STEPS),
    ("docs/tutorials/diffusion.md", "train"): (
        PRECISION,
        "train.max_steps=2",
        "validation.every=2",
        "validation.steps=2",
    ),
}
PREPARED: dict[str, Prepare] = {}


def before(page: str) -> Callable[[Prepare], Prepare]:
    """Register the preparation of a page."""

    def register(prepare: Prepare) -> Prepare:
        PREPARED[page] = prepare
        return prepare

    return register


def headlines(name: str) -> None:
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([["input.1.content"], ["the film was good"], ["a bad plot"]])


def described(folder: str) -> None:
    """A model's configuration, without weights."""
    LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=1000
    ).save_pretrained(folder)


def quickstart(world: World) -> None:
    """Of `quickstart-routed`: the pages that need a run are about routing."""
    folder = "runs/quickstart-routed-lily-0"
    shutil.copytree(world.run("quickstart-routed", "baselines=[lora]", PRECISION, FEW_STEPS), folder)


def with_batches(**names: Any) -> dict[str, Any]:
    batches = [inputs("llama")]
    return {"calibration_batches": batches, "held_out_batches": batches, "lily": lily, **names}


def own_table() -> None:
    """The table that readers have, and rows to predict."""
    classes = (("good", 1), ("bad", 0))
    rows = [(f"a {word} {thing}", star) for word, star in classes for thing in ("film", "plot", "actors") * 3]
    with open("reviews.csv", "w", newline="") as file:
        csv.writer(file).writerows([("review", "stars"), *rows])
    Path("new.csv").write_text("review\nthe film was good\n")


@before("README.md")
def readme(world: World) -> dict[str, Any]:
    own_table()
    return {}


@before("docs/index.md")
def index(world: World) -> dict[str, Any]:
    return {"model": build("llama")}


@before("docs/deploy.md")
def deploy(world: World) -> dict[str, Any]:
    quickstart(world)
    return with_batches(model=fresh(), args=arguments(Path()), rows=ROWS, peft_model=adapted("llama", routing="token"))


@before("docs/files.md")
def files(world: World) -> dict[str, Any]:
    deploy_targets(world)
    return {}


@before("docs/tune.md")
def tune(world: World) -> dict[str, Any]:
    return with_batches(model=fresh(), args=arguments(Path()), rows=ROWS)


@before("docs/method.md")
def method(world: World) -> dict[str, Any]:
    return {"model": fresh(routing="token"), "args": arguments(Path()), "rows": ROWS}


@before("docs/deploy-targets.md")
def deploy_targets(world: World) -> dict[str, Any]:
    from lily.recipes.dreambooth import tiny

    model = AutoModelForCausalLM.from_pretrained(world.chat_model)
    options = {"r": 4, "num_A": 1, "num_B": 2, "routing": "static", "target_modules": "all-linear"}
    peft_model = randomise(get_peft_model(model, lily.LilyConfig(task_type="CAUSAL_LM", **options)))
    peft_model.save_pretrained("path/to/adapter")
    return {"peft_model": peft_model, "unet_config": dict(tiny.sdxl().unet.config)}


@before("docs/diffusion.md")
def diffusion(world: World) -> dict[str, Any]:
    from diffusers import StableDiffusionXLPipeline

    pipeline, photos = save("sdxl", Path("pipeline")), draw_subject(Path("photos"))
    values = {
        "name": "toy",
        "task": "dreambooth",
        "model": {"path": str(pipeline)},
        "subject": {"images": str(photos), "prompt": "a photo of sks toy", "resolution": 16},
        "lily": {"r": 4, "num_A": 1, "num_B": 2},
        "train": {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "precision": "float32"},
    }
    Path("toy.yaml").write_text(json.dumps(values))
    world.invoke("train", "toy.yaml")
    return {"pipe": StableDiffusionXLPipeline.from_pretrained(pipeline)}


@before("docs/insight.md")
def insight(world: World) -> dict[str, Any]:
    quickstart(world)
    shutil.copytree("runs/quickstart-routed-lily-0", "path/to/adapter")
    headlines("rows.csv")
    batches = [inputs("bert", batch=4, seed=seed) for seed in (1, 2)]
    return {"peft_model": adapted("bert", routing="sequence"), "batches": batches, "labels": list("abababab")}


@before("docs/migrate-from-lora.md")
def migrate_from_lora(world: World) -> dict[str, Any]:
    described("path/to/model")
    return {"model": build("llama"), "base": build("llama")}


@before("docs/migrate-from-stock.md")
def migrate_from_stock(world: World) -> dict[str, Any]:
    return with_batches(base=build("llama"), fresh_base=lambda: build("llama"))


@before("docs/performance.md")
def performance(world: World) -> dict[str, Any]:
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    ).save_pretrained("path/to/model")
    return {}


def symptoms(world: World) -> dict[str, Any]:
    """The recipe and the run that the page of symptoms names, and a `PeftModel`."""
    from peft import get_peft_model_state_dict

    shutil.copytree(world.run("quickstart-routed", "baselines=[lora]", PRECISION, FEW_STEPS), "runs/mine")
    recipe = yaml.safe_load(Path("runs/mine/recipe.yaml").read_text())
    Path("mine.yaml").write_text(yaml.safe_dump({**recipe, "output": "runs/mine", "baselines": []}))
    world.invoke("collapse", "runs/mine", "--out", "made-static")
    world.invoke("export", "made-static", "--to", "lora", "--out", "plain-lora")
    return {
        "lily": lily,
        "model": adapted("llama", routing="token"),
        "get_peft_model_state_dict": get_peft_model_state_dict,
    }


@before("docs/recipes.md")
def recipes(world: World) -> dict[str, Any]:
    return {"lily": lily, "model": fresh(), "args": arguments(Path()), "rows": ROWS}
