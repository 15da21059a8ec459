"""The paper's recipes: each is planned from its own description, and has the parameters of the paper's formula."""

from __future__ import annotations

import pytest
import torch

from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.dry_run import recipe_report

GLUE = {"cola": 4, "mrpc": 2, "qnli": 2, "rte": 3, "sst2": 2, "stsb": 2}


def parameters(r: int, ne: int, layers: int, shapes: list[tuple[int, int]]) -> int:
    """ne A (r, in) and ne B (r, out) for each target's (in, out), and a router (ne, r) per layer and target."""
    return sum(ne * r * (n_in + n_out) + layers * ne * r for n_in, n_out in shapes)


# The paper's VTAB-1K: key and value (or their slices), and an adapter of twice the rank beside each of 12 MLPs.
VIT = parameters(32, 4, 12, [(768, 768)] * 2) + parameters(64, 4, 12, [(768, 768)])
# Vim-S: 24 A for each target, 5 experts for in_proj with one router, and for dt_proj one B.
VIM = 8 * (24 * 384 + 5 * 1536 + 5) + 8 * (24 * 24 + 768)

VTAB = [
    "caltech101",
    "cifar",
    "clevr_count",
    "clevr_dist",
    "diabetic_retinopathy",
    "dmlab",
    "dsprites_loc",
    "dsprites_ori",
    "dtd",
    "eurosat",
    "kitti",
    "oxford_flowers102",
    "oxford_iiit_pet",
    "patch_camelyon",
    "resisc45",
    "smallnorb_azi",
    "smallnorb_ele",
    "sun397",
    "svhn",
]

EXPECTED = {
    **{f"paper/vtab-{name}:{task}": count for name, count in (("vit", VIT), ("vim", VIM)) for task in VTAB},
    **{f"paper/glue-{task}": parameters(32, ne, 12, [(768, 768)] * 2) for task, ne in GLUE.items()},
    "paper/commonsense-llama3-8b": parameters(16, 4, 32, [(4096, 4096), (4096, 1024), (4096, 1024)]),
    "paper/commonsense-falcon-mamba-7b": parameters(40, 4, 64, [(4096, 16384)]),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_of_the_paper_has_its_parameters_and_needs_no_download(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("it reached for the network"))
    monkeypatch.delenv("LILY_DATA", raising=False)
    report = recipe_report(loader.load_any(name))
    assert report.plan.parameters["total"] == EXPECTED[name]
    recipe = loader.load_any(name)
    assert recipe.lily.routing == ("token" if "vim" in name else "batch")


PAPER = [file for file in loader.shipped() if file.startswith("paper/")]


def test_every_recipe_of_the_paper_is_checked():
    here = {name for file in PAPER for name in loader.names_of(file)}
    assert here == {*EXPECTED, "paper/dreambooth-sdxl"}  # which test_dreambooth.py plans, since it needs diffusers


@pytest.mark.parametrize("file", PAPER)
def test_every_recipe_of_the_paper_names_its_line_of_the_reference(file):
    assert '# REFERENCE: "' in loader.find(next(iter(loader.names_of(file)))).read_text("utf-8")


def test_a_described_model_has_the_sizes_of_the_real_one():
    sizes = {
        "paper/commonsense-llama3-8b": 8_030_261_248,
        "paper/glue-cola": 124_647_170,
        "paper/vtab-vit:cifar": 85_798_656 + 2 * 769,  # timm's ViT-B/16 without its head, and a head of two classes
    }
    for name, size in sizes.items():
        assert recipe_report(loader.load_any(name)).plan.model_parameters == size
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("{hidden_size: 3}", "model_type"),
        ("{model_type: nothing}", "nothing"),
        ("{model_type: bert, hidden_size: x}", "x"),
    ],
)
def test_a_description_that_cannot_be_is_refused(changed, says):
    with pytest.raises(LilyError, match=says):
        recipe_report(loader.load_any("paper/glue-cola", [f"model.architecture={changed}"]))


def test_the_nineteen_tasks_differ_in_nothing_but_their_images():
    for name in ("paper/vtab-vit", "paper/vtab-vim"):
        recipes = {task: loader.load_recipe(f"{name}:{task}") for task in VTAB}
        for task, recipe in recipes.items():
            assert recipe.name == f"{name.rpartition('/')[2]}-{task}"
            assert recipe.data.train.path == f"${{VTAB_1K}}/{task}/train800val200.txt"
            assert recipe.model_copy(update={"name": "", "data": None}) == recipes["cifar"].model_copy(
                update={"name": "", "data": None}
            )


def test_ten_epochs_of_a_thousand_images_are_what_the_vtab_recipes_count_in_steps():
    train = loader.load_recipe("paper/vtab-vit:cifar").train
    steps = -(-1000 // train.batch_size)
    assert (train.evaluate_every, train.warmup * train.epochs) == (10 * steps, 10)


def test_another_place_of_a_described_model_is_read_and_not_described(tmp_path):
    assert loader.load_recipe("paper/glue-cola", [f"model.path={tmp_path}"]).model.architecture is None
    assert loader.load_recipe("paper/vtab-vim:cifar", ["model.standin=vim-small"]).model.architecture is None
