"""The paper's recipes: each is planned from its own description, and has the parameters of the paper's formula."""

from __future__ import annotations

import pytest
import torch

from lily.commands.plan_report import recipe_report
from lily.errors import LilyError
from lily.recipes import loader

GLUE = {"cola": 4, "mrpc": 2, "qnli": 2, "rte": 3, "sst2": 2, "stsb": 2}


def parameters(r: int, ne: int, layers: int, shapes: list[tuple[int, int]]) -> int:
    """ne A (r, in) and ne B (r, out) for each target's (in, out), and a router (ne, r) per layer and target."""
    return sum(ne * r * (n_in + n_out) + layers * ne * r for n_in, n_out in shapes)


EXPECTED = {
    **{f"paper/glue-{task}": parameters(32, ne, 12, [(768, 768)] * 2) for task, ne in GLUE.items()},
    "paper/commonsense-llama3-8b": parameters(16, 4, 32, [(4096, 4096), (4096, 1024), (4096, 1024)]),
    "paper/commonsense-falcon-mamba-7b": parameters(40, 4, 64, [(4096, 16384)]),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_of_the_paper_has_its_parameters_and_needs_no_download(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("it reached for the network"))
    monkeypatch.delenv("LILY_DATA", raising=False)
    report = recipe_report(name, [])
    assert report.plan.parameters["total"] == EXPECTED[name]
    recipe = loader.load_any(name)
    assert recipe.lily.routing == "batch"
    assert "REFERENCE" in loader.find(name).read_text("utf-8")


def test_every_recipe_of_the_paper_is_checked():
    here = {name for name in loader.shipped() if name.startswith("paper/")}
    assert here == {*EXPECTED, "paper/dreambooth-sdxl"}


def test_a_described_model_has_the_sizes_of_the_real_one():
    sizes = {"paper/commonsense-llama3-8b": 8_030_261_248, "paper/glue-cola": 124_647_170}
    for name, size in sizes.items():
        assert recipe_report(name, []).plan.model_parameters == size
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
        recipe_report("paper/glue-cola", [f"model.architecture={changed}"])
