"""Where an adapter's folder, its recipe and its base model are found, without reading a weight."""

from __future__ import annotations

import pytest
from recipes_helpers import classification, write_jsonl, write_recipe

from lily import LilyConfig
from lily.errors import LilyError
from lily.recipes.results.adapter_folder import AdapterFolder


@pytest.fixture
def run(tmp_path):
    """A run's folder with an adapter in `best`, which names its base model."""
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    LilyConfig(
        r=2, num_B=2, target_modules=["query"], task_type="SEQ_CLS", base_model_name_or_path=str(tmp_path / "elsewhere")
    ).save_pretrained(folder)
    return tmp_path / "run"


def keep_recipe(tmp_path, run, encoder, **changes):
    values = classification(encoder, write_jsonl(tmp_path / "t.jsonl", []), tmp_path, **changes)
    return write_recipe(run, values)


def test_a_run_is_entered_at_its_best_and_else_at_its_last_adapter(run):
    assert AdapterFolder.of(str(run)).path == run / "best"
    (run / "best").rename(run / "last")
    assert AdapterFolder.of(str(run)).path == run / "last"
    with pytest.raises(LilyError, match="holds no adapter"):
        AdapterFolder.of(str(run.parent / "elsewhere"))


@pytest.mark.parametrize(
    ("made", "named", "said"),
    [
        (["cut/recipe.yaml", "cut/checkpoints/x"], "cut", "run without an adapter yet; the command that began it"),
        (["mine.yaml"], "mine.yaml", "is a recipe, not an adapter; name the folder of its run"),
        ([], ".", "holds runs, and is none; name one of them: run"),
    ],
)
def test_what_is_named_in_the_place_of_a_run_is_told(run, monkeypatch, made, named, said):
    monkeypatch.chdir(run.parent)
    for name in made:
        (run.parent / name).parent.mkdir(exist_ok=True, parents=True)
        (run.parent / name).write_text("")
    with pytest.raises(LilyError) as caught:
        AdapterFolder.of(named)
    assert said in str(caught.value)


def test_the_recipe_says_which_base_model_unless_another_is_named(run, tmp_path, encoder):
    keep_recipe(tmp_path, run, encoder, task="text-regression")
    model, task = AdapterFolder.of(str(run)).base_model()
    assert (model.path, task) == (str(encoder), "text-regression")
    model, task = AdapterFolder.of(str(run), base=str(tmp_path)).base_model()
    assert (model.path, task) == (str(tmp_path), "text-regression")


def test_without_a_recipe_the_adapter_says_which(run, tmp_path):
    found = AdapterFolder.of(str(run))
    model, task = found.base_model()
    assert (model.path, task) == (str(tmp_path / "elsewhere"), "text-classification")
    with pytest.raises(LilyError, match=r"holds no recipe\.yaml; name the recipe with --recipe"):
        found.text_recipe()
    (tmp_path / "elsewhere").rmdir()
    with pytest.raises(LilyError, match="name it with --base"):
        found.base_model()
    model, _ = AdapterFolder.of(str(run), base=str(tmp_path)).base_model()
    assert model.path == str(tmp_path)


def test_a_recipe_that_cannot_be_read_is_an_error_unless_the_base_is_named(run, tmp_path):
    (run / "recipe.yaml").write_text("task: of an earlier version\n")
    with pytest.raises(LilyError, match=r"recipe\.yaml"):
        AdapterFolder.of(str(run))
    assert AdapterFolder.of(str(run), base=str(tmp_path)).recipe is None


def test_a_kept_recipe_never_runs_code_from_a_repository(run, tmp_path, encoder):
    path = keep_recipe(tmp_path, run, encoder, model={"path": str(encoder), "trust_remote_code": True})
    with pytest.raises(LilyError, match="trust_remote_code"):
        AdapterFolder.of(str(run))
    assert AdapterFolder.of(str(run), recipe=path).base_model()[0].trust_remote_code
    assert not AdapterFolder.of(str(run), base=str(tmp_path)).base_model()[0].trust_remote_code
