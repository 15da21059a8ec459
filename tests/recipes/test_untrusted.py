"""Recipes, models and data from strangers: no code of theirs runs, and nothing is written where nobody asked for it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_helpers import classification, write_recipe
from typer.testing import CliRunner

from lily import LilyError
from lily.cli.main import app
from lily.recipes import data, loader, models, preflight, train
from lily.recipes.data import tables
from lily.recipes.results.adapter import Adapter
from lily.recipes.results.adapter_folder import AdapterFolder
from lily.recipes.spec.schema import Model

MARK = "import os; os.mkdir({marker!r})\n"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with something beside it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def written(place: Path, encoder: Path, table: Path, output: str | None, **changes: Any) -> str:
    values = {**classification(encoder, table, place), "output": output, **changes}
    return write_recipe(place, {key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize(
    "output",
    ["/{tmp}/beside/run", "../beside/run", "runs/../../beside/run", "link/run", "link", "~/lily-run", "/", ".."],
)
def test_a_recipes_file_cannot_write_outside_the_working_directory(place, encoder, table, output, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)  # told before any weight is read
    (place / "work" / "link").symlink_to(place / "beside")
    recipe = written(place, encoder, table, output.replace("/{tmp}", str(place)))
    for attempt in (
        lambda: train.train(loader.load_recipe(recipe), quiet=True),
        lambda: train.train(loader.load_recipe(recipe), quiet=True, overwrite=True),
        lambda: train.train(loader.load_recipe(recipe), quiet=True, resume=True),
    ):
        with pytest.raises(LilyError, match=r"recipe.yaml:\d+: output .* is outside the working directory"):
            attempt()
    out = CliRunner().invoke(app, ["plan", recipe])
    assert isinstance(out.exception, LilyError)
    assert list((place / "beside").iterdir()) == []


@pytest.mark.parametrize("output", ["run", "deep/er/run", "./run", "runs/../run", "{name}/{seed}", None])
def test_a_recipes_file_writes_below_the_working_directory(place, encoder, table, output):
    recipe = loader.load_recipe(written(place, encoder, table, output))
    preflight.check_folder(recipe, train.output_folder(recipe), resume=False, overwrite=False)


def test_the_command_line_names_any_folder(place, encoder, table):
    recipe = loader.load_recipe(written(place, encoder, table, "../no"), [f"output={place}/beside/run"])
    preflight.check_folder(recipe, train.output_folder(recipe), resume=False, overwrite=False)


def test_runs_may_be_a_link_of_the_users_own(place, encoder, table):
    (place / "work" / "runs").symlink_to(place / "beside")
    recipe = loader.load_recipe(written(place, encoder, table, None))
    preflight.check_folder(recipe, train.output_folder(recipe), resume=False, overwrite=False)


@pytest.mark.parametrize(
    "output", ["{name.__class__}", "{name!r}", "{name:>1000000000}", "{seed:{seed}}", "a\0b", "a\nb", "{0}", "{}"]
)
def test_an_output_is_a_plain_path(place, encoder, table, output):
    with pytest.raises(LilyError, match="output: "):
        loader.load_recipe(written(place, encoder, table, output))


@pytest.mark.parametrize("name", ["../x", "a/b", "a\n", "a\0", "{seed}", "-x", ".x", "a b", "A"])
def test_a_name_cannot_become_a_path(place, encoder, table, name):
    with pytest.raises(LilyError, match="name: "):
        loader.load_recipe(written(place, encoder, table, None, name=name))


@pytest.fixture
def hostile(tmp_path, encoder) -> tuple[Path, Path]:
    """A model folder whose files name code of its own for everything, and the folder that this code would make."""
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(encoder, folder)
    code = MARK.format(marker=str(marker)) + "class Evil:\n    pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
    mapping = {kind: "evil.Evil" for kind in kinds}
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {**mapping, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(values))
    return folder, marker


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_models_folder_runs_unless_it_is_trusted(hostile, table, tmp_path, known):
    folder, marker = hostile
    if not known:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "model_type": "evil"}))
    recipe = write_recipe(tmp_path, {**classification(folder, table, tmp_path), "train": {"max_steps": 1}})
    for command in (["plan", str(folder)], ["plan", recipe], ["train", recipe, "--quiet"]):
        out = CliRunner().invoke(app, command, input="y\n" * 20)  # nor is anyone asked
        assert known or isinstance(out.exception, LilyError), command
    for task in ("sft", "text-classification"):
        for attempt in (models.load_model, models.meta_model):
            if not known:
                with pytest.raises(LilyError):
                    attempt(Model(path=str(folder)), task)
    assert not marker.exists()


def test_code_runs_once_it_is_trusted(hostile):
    folder, marker = hostile
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "evil"}))
    with pytest.raises(LilyError):  # the class is no model, but its module was run
        models.load_model(Model(path=str(folder), trust_remote_code=True), "text-classification")
    assert marker.exists()


def test_an_adapters_own_recipe_cannot_say_that_it_is_trusted(hostile, table, tmp_path):
    folder, marker = hostile
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    values = classification(folder, table, tmp_path)
    values["model"]["trust_remote_code"] = True
    write_recipe(adapter, values)
    with pytest.raises(LilyError, match="if you trust it, say so with --recipe"):
        Adapter(str(adapter))
    assert not marker.exists()


class Marker:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickled_weights_of_a_model_are_never_read(tmp_path, encoder):
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    with pytest.raises(LilyError):
        models.load_model(Model(path=str(folder)), "text-classification")
    assert not (tmp_path / "marker").exists()


def test_no_code_of_a_data_set_runs(tmp_path, encoder, table):
    pytest.importorskip("datasets")
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(MARK.format(marker=str(tmp_path / "marker")))
    values = classification(encoder, table, tmp_path)
    values["data"]["train"] = {"hub": str(folder)}
    with pytest.raises(LilyError):
        data.load_splits(loader.load_recipe(write_recipe(tmp_path, values)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("filling", [b"0", b"\n", b'a,b\n"'])
def test_a_file_that_expands_without_bound_is_stopped(tmp_path, monkeypatch, kind, filling):
    monkeypatch.setattr(tables, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / f"x.{kind}.gz"
    path.write_bytes(gzip.compress(filling * (8_000_000 // len(filling))))
    with pytest.raises(LilyError, match=r"expands to over 1 MiB|expected|not valid"):
        list(tables.stream_rows(path))


def test_a_file_that_shrinks_well_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_UNPACKED", 1 << 10)
    path = tmp_path / "x.jsonl.gz"
    rows = [{"text": f"row {i}", "label": i % 3} for i in range(5000)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert list(tables.stream_rows(path)) == rows


@pytest.mark.parametrize("text", ["{", "1", '["a", 1]', '{"a": 1}', "[" * 100_000, '"a"', "NaN"])
def test_labels_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(LilyError, match=r"labels.json: "):
        AdapterFolder(tmp_path, None).labels()


def test_a_recipe_is_read_as_plain_yaml(tmp_path):
    marker = tmp_path / "marker"
    for text in (
        f"name: !!python/object/apply:os.mkdir [{marker}]\n",
        f"!!python/object/new:os.mkdir [{marker}]\n",
        f"name: !!python/name:os.mkdir\ntask: !!python/object/apply:os.system ['mkdir {marker}']\n",
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(LilyError):
            loader.load_recipe(str(tmp_path / "recipe.yaml"))
        with pytest.raises(LilyError):
            loader.load_recipe("quickstart", [text.splitlines()[0].replace(": ", "=", 1)])
    assert not marker.exists()
    assert yaml.safe_load("a: 1") == {"a": 1}
