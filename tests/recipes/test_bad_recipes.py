"""Everything that can be wrong with a recipe ends in its own message, exit code 2, and nothing written."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_helpers import classification, rows, sft, write_jsonl, write_recipe
from typer.testing import CliRunner

from lily.cli.main import app, main
from lily.errors import LilyError
from lily.recipes import loader, preflight, train


def put(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        values = values.setdefault(part, {})
    if value is KeyError:
        values.pop(last, None)
    else:
        values[last] = value


PACKAGE = {"name": "a", "version": "1", "member": "m", "sha256": "0" * 64}

# (changes to a good recipe, fragment of the message)
SCHEMA: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 3}, "epochs: unknown key; did you mean train.epochs?"),
    ({"train.epoch": 3}, "train.epoch: unknown key; did you mean epochs"),
    ({"lily.rank": 8}, "lily.rank: unknown key; did you mean r?"),
    ({"lily.r": "big"}, "lily.r: expected a whole number, got 'big'"),
    ({"lily.r": 0}, "lily.r: expected more than 0, got 0"),
    (
        {"lily.routing": "tokens"},
        "lily.routing: expected batch, sequence, token, static or uniform, got 'tokens'; did you mean token?",
    ),
    ({"lily.dropout": 1.5}, "lily.dropout: expected less than 1, got 1.5"),
    ({"lily.scaling": -1}, "lily.scaling: expected more than 0, got -1"),
    ({"lily.stride_A": 2}, "lily.stride_A: says the same as num_A; remove one of them"),
    ({"lora.r": "same"}, "lora.r: expected a whole number or equal, got 'same'"),
    ({"targets": 3}, "targets: expected a list such as [a, b] or text, got 3"),
    ({"metrics": "accuracy"}, "metrics: expected a list such as [a, b], got 'accuracy'; write [accuracy]"),
    ({"train": 3}, "train: expected keys below it, such as epochs, max_steps, batch_size, got 3"),
    ({"train.packing": 3}, "train.packing: expected true or false, got 3"),
    ({"train.evaluate_every": "daily"}, "train.evaluate_every: expected a whole number or epoch, got 'daily'"),
    ({"description": 3}, "description: expected text, got 3; put text that looks like a number or a boolean in quotes"),
    ({"generation.answer": {"patern": "x"}}, "generation.answer.patern: unknown key; did you mean pattern?"),
    ({"lily.slices": {"qkv": [1]}}, "lily.slices.qkv: expected text, got 1"),
    ({"learning_rate": 3}, "did you mean train.learning_rate or lily.learning_rate or lora.learning_rate?"),
    ({"epoch": 3}, "epoch: unknown key; did you mean train.epochs?"),
    ({"trian": {"epochs": 3}}, "trian: unknown key; did you mean train or"),
    ({"lily.epochs": 3}, "lily.epochs: unknown key; did you mean train.epochs?"),
    ({"label": "stars"}, "label: unknown key; did you mean data.columns.label?"),
    (
        {"lily.match_lora": 8},
        "lily.match_lora: unknown key; `lily plan MODEL --match-lora RANK` prints a shape of LoRA's",
    ),
    ({"model": "none/such"}, "got 'none/such'; write {hub: none/such} or {path: none/such}"),
    ({"lily.params": "1M"}, "lily: params chooses r, num_A and num_B; give either params or those"),
    ({"name": KeyError}, "name: is required, but missing"),
    ({"name": "My Run"}, "name: expected lower-case letters, digits, '.', '_' and '-', such as my-run, got 'My Run'"),
    (
        {"task": "classify"},
        "task: expected text-classification, text-regression, sft or image-classification, got 'classify'",
    ),
    ({"model": KeyError}, "model: is required, but missing"),
    ({"model": {}}, "model: give exactly one of path, package, hub and standin, got none"),
    ({"model.hub": "a/b"}, "model: give exactly one of path, package, hub and standin, got path and hub"),
    ({"model.revision": "main"}, "model: revision goes with hub"),
    ({"model.dtype": "int8"}, "model.dtype: expected auto, float32, bfloat16 or float16, got 'int8'"),
    (
        {"data.train": "rows.csv"},
        "data.train: expected keys below it, such as path, package, hub, got 'rows.csv'; write {path: rows.csv}",
    ),
    ({"data.train.split": "train"}, "data.train.split: goes with hub"),
    ({"data.train.format": "xlsx"}, "data.train.format: expected auto, csv"),
    ({"data.columns.label": KeyError}, "data.columns: text-classification needs label"),
    ({"data.columns.prompt": "text"}, "data.columns.prompt: is for sft"),
    ({"data.split": {"validation": 0.6, "test": 0.5}}, "data.split: validation and test take 1.10 of the rows"),
    ({"data.split": {"validation": 0}}, "data.split: no validation rows"),
    ({"data.split": {"validation": 1.0}}, "data.split.validation: expected less than 1, got 1.0"),
    ({"data.columns.label": "text"}, "data.columns.label: 'text' is text too; name the column that holds the label"),
    ({"metrics": ["pearson"]}, "metrics: pearson is not a metric of text-classification; choose from accuracy"),
    ({"metrics": ["acc"]}, "got 'acc'; did you mean accuracy?"),
    ({"baselines": ["bert"]}, "baselines: expected majority, tfidf, frozen or lora, got 'bert'"),
    ({"method": "vera"}, "method: expected lily, stock-lily, lora, rslora, dora, peft or none, got 'vera'"),
    ({"targets": []}, "targets: is empty; name modules such as"),
    ({"train.packing": True}, "train.packing: is for sft only"),
    ({"train.warmup": -1}, "train.warmup: expected at least 0, got -1"),
    ({"train.schedule": "step"}, "train.schedule: expected linear, cosine or constant, got 'step'"),
    ({"output": "runs/{date}"}, "output: unknown placeholder 'date'; use {name}, {method} and {seed}"),
    ({"output": "runs/{name"}, "output: is not a name with placeholders"),
    ({"train.learning_rate": float("inf")}, "train.learning_rate: expected a finite number, got inf"),
    ({"seed": -1}, "seed: expected at least 0, got -1"),
    ({"seed": 2**40}, "seed: expected less than 4294967296"),
    ({"data.test": {"hub": "a/b"}}, "data.test: needs split: which split of a/b to use"),
    ({"model": {"hub": "a/b", "format": "gguf"}}, "model.format: gguf goes with path or package"),
    ({"model": {"standin": "mamba-lm", "format": "gguf"}}, "model.format: gguf goes with path or package"),
    (
        {"model": {"standin": "vim-smal"}},
        "model.standin: there is no stand-in 'vim-smal'; did you mean vim-small? there are",
    ),
    ({"model.standin": "mamba-lm"}, "model: give exactly one of path, package, hub and standin, got path and standin"),
    ({"data.train": {"standin": "mamba-lm"}}, "data.train.standin: unknown key"),
    ({"train.B_lr_ratio": 0}, "train.B_lr_ratio: expected more than 0, got 0"),
    ({"train.router_lr_ratio": float("inf")}, "train.router_lr_ratio: expected a finite number, got inf"),
    ({"train.min_learning_rate": 1e-5}, "train.min_learning_rate: is the end of a cosine, but schedule is linear"),
    (
        {"train.min_learning_rate": 1.0, "train.schedule": "cosine"},
        "train.min_learning_rate: 1 is not below train.learning_rate, 0.01",
    ),
    (
        {"train.min_learning_rate": 1e-3, "train.schedule": "cosine", "lily.learning_rate": 1e-3},
        "train.min_learning_rate: 0.001 is not below lily.learning_rate",
    ),
    (
        {"model": {"package": {**PACKAGE, "name": "--requirement=/x"}}},
        "model.package.name: expected a package's name",
    ),
    ({"model": {"package": {**PACKAGE, "name": "../../x"}}}, "model.package.name: expected a package's name"),
    (
        {"model": {"package": {**PACKAGE, "version": "1 --pre"}}},
        "model.package.version: expected an exact version, such as 1.2.0, got '1 --pre'",
    ),
    ({"extends": "nothing"}, "no recipe 'nothing': neither a file nor a shipped recipe"),
    ({"extends": 3}, "extends: expected a recipe's name or path, got 3"),
]

# wrong only with this data or this model
WORLD: list[tuple[dict[str, Any], str]] = [
    ({"data.train.path": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl does not exist"),
    ({"data.train.path": "nowhere/rows.jsonl"}, ", where relative paths start"),
    ({"data.train.path": "FOLDER/row.jsonl"}, "does not exist; did you mean rows.jsonl"),
    (
        {"data.columns.text": "texts"},
        "row 1: no column 'texts' (data.columns.text); did you mean 'text'? columns: text, label",
    ),
    ({"data.columns.text": "score"}, "row 1: column 'score' holds 0.5, expected text"),
    ({"data.columns.text_pair": "other"}, "no column 'other' (data.columns.text_pair)"),
    ({"data.train.format": "json"}, "not valid JSON"),
    ({"data.train.format": "parquet"}, "not a readable parquet file"),
    (
        {"data.validation": {"path": "FOLDER/other.jsonl"}},
        "data.validation has the label '7', which no training row has",
    ),
    ({"data.train.path": "FOLDER/one.jsonl"}, "holds one class only ('0')"),
    ({"data.train.path": "FOLDER/none.jsonl"}, "has no rows"),
    ({"data.train.path": "FOLDER/broken.jsonl"}, "broken.jsonl:2: not valid JSON"),
    ({"data.train.path": "FOLDER/short.csv"}, "short.csv:3: 1 fields, expected 2 (text, label)"),
    ({"data.train.path": "FOLDER/rows.txt"}, "unknown ending"),
    ({"task": "text-regression", "data.columns": {"text": "label", "label": "text"}}, "expected a finite number"),
    ({"model.path": "FOLDER"}, "no config.json; name a transformers folder"),
    ({"targets": ["q_proj"]}, "targets='q_proj' matches no module"),
    ({"targets": ["quer"]}, "did you mean query"),
    ({"targets": "(query"}, "is not a regular expression"),
    ({"lily": {"params": "3"}}, "3 parameters are too few"),
    ({"lily": {"params": "lots"}}, "'lots'"),
    ({"method": "lora", "targets": ["embeddings.LayerNorm"]}, "not a linear layer"),
]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", rows())
    write_jsonl(tmp_path / "other.jsonl", [{"text": "good", "label": "7"}])
    write_jsonl(tmp_path / "one.jsonl", [{"text": f"good {i}", "label": "0"} for i in range(20)])
    write_jsonl(tmp_path / "none.jsonl", [])
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "0"}\n{"text": \n')
    (tmp_path / "short.csv").write_text("text,label\na,0\nb\n")
    (tmp_path / "rows.txt").write_text("a 0\n")
    return tmp_path


def changed(world: Path, encoder: Path, changes: dict[str, Any]) -> str:
    values = copy.deepcopy(classification(encoder, world / "rows.jsonl", world))
    for path, value in changes.items():
        put(values, path, value)
    text = yaml.safe_dump(values, sort_keys=False).replace("FOLDER", str(world))
    return write_recipe(world, yaml.safe_load(text))


def tree(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize(("changes", "message"), SCHEMA, ids=[str(c) for c, _ in SCHEMA])
def test_a_bad_key_or_value_is_named_with_its_line(world, encoder, changes, message):
    path = changed(world, encoder, changes)
    before = tree(world)
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(path)
    assert message in str(caught.value)
    assert "recipe.yaml:" in str(caught.value) or "extends" in changes or KeyError in changes.values()
    assert tree(world) == before


def test_the_line_is_the_one_of_the_key(world, encoder):
    path = changed(world, encoder, {"data.columns.txt": "text"})
    line = 1 + next(i for i, text in enumerate(Path(path).read_text().splitlines()) if "txt:" in text)
    with pytest.raises(LilyError, match=rf"recipe\.yaml:{line}: data\.columns\.txt: unknown key"):
        loader.load_recipe(path)


@pytest.mark.parametrize(("changes", "message"), SCHEMA, ids=[str(c) for c, _ in SCHEMA])
def test_no_message_is_pydantics(world, encoder, changes, message):
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(changed(world, encoder, changes))
    assert not re.search(r"should (be|match|have)|unable to parse|valid (integer|number|string)", str(caught.value))


@pytest.mark.parametrize(("changes", "message"), WORLD, ids=[str(c) for c, _ in WORLD])
def test_what_only_data_or_model_show_is_found_before_weights_are_read(world, encoder, changes, message, monkeypatch):
    recipe = loader.load_recipe(changed(world, encoder, changes))
    monkeypatch.setattr("lily.recipes.models.load_model", lambda *a, **k: pytest.fail("weights were read"))
    before = tree(world)
    with pytest.raises(LilyError) as caught:
        train.train(recipe)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{world}/recipe.yaml:")
    assert "target_modules" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(world) == before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data.train.path": "/nowhere"}, "path: /nowhere"),
        ({"data.split": {}, "data.validation": {"path": "FOLDER/other.jsonl"}}, "validation:"),
        ({"data.columns.text": "texts"}, "text: texts"),
        ({"data.columns.label": "labels"}, "label: labels"),
        ({"model.path": "/nowhere"}, "path: /nowhere"),
        ({"targets": ["q_proj"]}, "targets:"),
        ({"lily": {"params": "3"}}, "params:"),
        ({"data.max_length": 65}, "max_length:"),
    ],
    ids=str,
)
def test_what_only_data_or_model_show_is_told_with_the_line_of_its_key(world, encoder, changes, key):
    path = changed(world, encoder, changes)
    line = 1 + next(i for i, text in enumerate(Path(path).read_text().splitlines()) if text.strip().startswith(key))
    with pytest.raises(LilyError) as caught:
        preflight.prepare(loader.load_recipe(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_an_override_is_named_where_it_is_the_mistake(world, encoder):
    recipe = loader.load_recipe(changed(world, encoder, {}), ["data.columns.text=texts"])
    with pytest.raises(LilyError, match=r"^override 'data\.columns\.text=texts': .* no column 'texts'"):
        preflight.prepare(recipe)


def test_a_recipe_built_in_code_has_no_lines_to_name(world, encoder):
    recipe = loader.load_recipe(changed(world, encoder, {"targets": ["q_proj"]}))
    with pytest.raises(LilyError, match=r"^targets='q_proj' matches no module"):
        preflight.prepare(type(recipe).model_validate(recipe.model_dump()))


# 10 to the ninth values in a few hundred bytes
LAUGHS = b"metrics:\n - &a [x]\n" + b"".join(
    b" - &%c [%s]\n" % (c, b", ".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdefghij"
)

TEXTS = [
    (b"name: [unclosed", "recipe.yaml:1: not valid YAML"),
    (b"- a\n- b\n", "expected a mapping of keys"),
    (b"", "expected a mapping of keys"),
    (b"name: a\nname: b\n", "recipe.yaml:2: name: duplicate key"),
    (b"name: \xff\xfe\n", "not UTF-8 text"),
    (
        b"name: !!python/object/apply:os.system [echo]\n",
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    ),
    (b"{a: " * 30 + b"1" + b"}" * 30, "nested too deeply"),
    (b"#" * (2 << 20), "2097152 bytes; a recipe has at most"),
    (b"? [a, b]\n: c\n", "a key must be plain text"),
    (b"name: a\ndescription: 2020-13-45\n", "recipe.yaml:2: description: not a value of its YAML type (month must be"),
    (LAUGHS, "aliases expand to over 100000 values"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=[m for _, m in TEXTS])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_bytes(text)
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(str(tmp_path / "recipe.yaml"))
    assert message in str(caught.value)


OVERRIDES = [
    ("train.epochs", "expected key=value"),
    ("=3", "expected key=value"),
    ("train.epochs=many", "override 'train.epochs=many': train.epochs: expected a number, got 'many'"),
    ("epochs=3", "override 'epochs=3': epochs: unknown key; did you mean train.epochs?"),
    ("trian.epochs=3", "override 'trian.epochs=3': trian: unknown key; did you mean train"),
    ("name.inner=1", "name is a value, not a section with keys"),
    ("train.lr=1", "did you mean learning_rate"),
    ("description=2020-13-45", "override 'description=2020-13-45': description: not a value of its YAML type"),
    ("lily={r: 1, r: 2}", "lily.r: duplicate key"),
    ("lily={r: 0}", "override 'lily={r: 0}': lily.r: expected more than 0"),
    ("metrics=" + "[" * 500 + "]" * 500, "nested too deeply"),
    ("lily.r=[1", "the value is not valid YAML"),
    ("model=..", "got '..'; write model.path=.."),
    ("data.train=rows.csv", "got 'rows.csv'; write data.train.path=rows.csv"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_a_bad_override_is_quoted(world, encoder, override, message):
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(changed(world, encoder, {}), [override])
    assert message in str(caught.value)


def test_several_mistakes_are_told_at_once(world, encoder):
    with pytest.raises(LilyError) as caught:
        loader.load_recipe(changed(world, encoder, {"lily.r": 0, "task": "x", "train.epoch": 1}))
    assert len(str(caught.value).splitlines()) == 3


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    write_recipe(tmp_path, {"extends": "b"}, "a.yaml")
    write_recipe(tmp_path, {"extends": "a"}, "b.yaml")
    with pytest.raises(LilyError, match="extends itself"):
        loader.load_recipe(str(tmp_path / "a.yaml"))


def test_chat_recipes_check_their_own_columns(world, chat_model):
    table = write_jsonl(world / "chat.jsonl", [{"question": "a", "answer": "b"}])
    for columns, message in (
        ({"prompt": "question"}, "sft needs prompt and completion, or messages"),
        ({"messages": "m", "prompt": "question", "completion": "answer"}, "either messages, or prompt and completion"),
        ({"prompt": "question", "completion": "answer", "label": "x"}, "is for classification and regression"),
    ):
        values = sft(chat_model, table, world)
        values["data"]["columns"] = columns
        with pytest.raises(LilyError, match=message):
            loader.load_recipe(write_recipe(world, values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstar"], "did you mean quickstart or "),
        (["train", "quickstart", "lily.rr=1"], "lily.rr: unknown key"),
        (["train", "quickstart", "--resume", "--overwrite"], "exclude each other"),
        (["eval", "/nowhere"], "holds no adapter"),
        (["predict", "/nowhere", "--input", "/no.csv"], "/no.csv does not exist"),
        (["generate", "/nowhere", "--prompt", "hi"], "holds no adapter"),
        (["recipes", "nothing"], "no recipe 'nothing'"),
        (["recipes", "--copy", "x.yaml"], "needs the name of a recipe"),
        (["plan", "/nowhere"], "/nowhere"),
    ],
)
def test_the_command_line_ends_with_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lily", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_the_process_exits_with_2_too():
    command = [sys.executable, "-m", "lily", "recipes", "nothing"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.startswith("error: no recipe 'nothing'")) == (2, True)


def test_wrong_usage_exits_with_2():
    assert CliRunner().invoke(app, ["train"]).exit_code == 2
    assert CliRunner().invoke(app, ["fly"]).exit_code == 2
