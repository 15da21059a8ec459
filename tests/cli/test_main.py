"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

from lily.cli import evaluate
from lily.cli import main as cli
from lily.errors import LilyError
from lily.recipes.data.tables import stream_rows
from lily.recipes.spec.schema import Recipe

COMMANDS = ("new", "plan", "train", "eval", "predict", "generate", "recipes", "schema")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_names_every_command_and_python_m_lily_works():
    run = subprocess.run([sys.executable, "-m", "lily", "--help"], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f" {name} " in run.stdout
        assert invoke(name, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train", "quickstart", "--epochs", "3"], "train.epochs=..."),
        (["train", "quickstart", "--train.epochs=3"], "train.epochs=..."),
        (["plan", "quickstart", "--lr", "3"], "train.learning_rate=..."),
        (["train", "quickstart", "--max-steps", "3"], "train.max_steps=..."),
        (["compare", "quickstart", "--method", "lora"], "--methods"),
    ],
)
def test_a_key_that_is_written_as_an_option_is_named(typed, said):
    result = invoke(*typed)
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert said in words
    assert ("A recipe's keys have no dashes" in words) == ("=" in said)


def test_short_help_is_help():
    assert invoke("train", "-h").stdout == invoke("train", "--help").stdout


def test_standard_input_that_is_no_jsonl_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("text\nhi\n"))
    with pytest.raises(
        LilyError, match=r"standard input:1: not valid JSON: .* it is read as jsonl: one object in each"
    ):
        list(stream_rows("-"))


def test_a_file_with_brackets_in_its_name_is_called_by_its_name(monkeypatch):
    adapter = SimpleNamespace(rows=lambda split, file: [{}], judge=lambda rows: ({"accuracy": 0.5}, None))
    monkeypatch.setattr(evaluate, "located", lambda *_: None)
    monkeypatch.setattr(evaluate, "_adapter", lambda *_: adapter)
    assert "[v2].csv" in invoke("eval", "run", "--file", "[v2].csv").stdout


def test_every_shipped_recipe_is_listed_and_prints_as_a_complete_recipe(tmp_path):
    from lily.recipes import loader

    listed = invoke("recipes").stdout
    names = [name for file in loader.shipped() for name in loader.names_of(file)]
    assert all(file in listed for file in loader.shipped())
    for name in names:
        printed = invoke("recipes", name).stdout
        assert "extends" not in yaml.safe_load(printed)
        (tmp_path / "printed.yaml").write_text(printed)
        assert loader.load_any(str(tmp_path / "printed.yaml")) == loader.load_any(name)


@pytest.mark.parametrize(
    ("typed", "there", "absent"),
    [
        (["--task", "sft"], ["chat-nf4", "offline/gsm8k"], ["quickstart", "cola", "paper/vtab-vit"]),
        (["headline"], ["quickstart", "offline/mamba-headlines"], ["cola", "paper/glue-cola"]),
        (["Headline", "--task", "sft"], ["offline/mamba-headlines"], ["quickstart"]),
        (["--task", "dreambooth"], ["paper/dreambooth-sdxl"], ["quickstart"]),
        (["vtab images"], ["paper/vtab-vit", "19 recipes: paper/vtab-vit:NAME"], ["offline/cifar10"]),
        ([], ["text-classification", "dreambooth", "quickstart"], []),
    ],
)
def test_the_list_of_recipes_is_filtered_by_words_and_by_task_in_80_columns(typed, there, absent):
    listed = CliRunner().invoke(cli.app, ["recipes", *typed], env={"COLUMNS": "80"}).stdout
    lines = listed.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(listed.split())
    assert all(text in words for text in there)
    assert not [text for text in absent if any(line.split()[:1] == [text] for line in lines)]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--task", "sfd"], "--task sfd: did you mean sft?"),
        (["nothing", "--task", "sft"], "no recipe of task sft has 'nothing' in its name or description"),
        (["quickstrat"], "no recipe 'quickstrat': neither a file nor a shipped recipe; did you mean quickstart"),
    ],
)
def test_a_filter_that_finds_nothing_says_so(typed, message):
    assert message in str(invoke("recipes", *typed).exception)


def test_a_copied_recipe_is_the_printed_one_and_never_replaces_a_file(tmp_path):
    target = tmp_path / "mine.yaml"
    assert invoke("recipes", "quickstart", "--copy", str(target)).exit_code == 0
    assert target.read_text() == invoke("recipes", "quickstart").stdout
    target.write_text("mine")
    assert "exists" in str(invoke("recipes", "quickstart", "--copy", str(target)).exception)
    assert target.read_text() == "mine"
    nowhere = invoke("recipes", "quickstart", "--copy", str(tmp_path / "no" / "x.yaml"))
    assert "there is no folder" in str(nowhere.exception)


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    assert invoke("recipes", "quickstart", "--copy=~/mine.yaml").exit_code == 0
    assert (tmp_path / "mine.yaml").is_file()
    assert "exists" in str(invoke("export", "no-such-run", "--to", "lora", "--out=~/there").exception)


def test_the_schema_is_the_recipes_own():
    assert json.loads(invoke("schema").stdout) == Recipe.model_json_schema()


def ends(monkeypatch, error):
    """What `main` prints and exits with when a command raises `error`."""

    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(130), 130, "interrupted"),
        (SystemExit(2), 2, ""),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/best"), 2, "error: /x/best: No space left on device"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            2,
            "error: a file could not be written: No",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: a file could not be written: No space left"),
        (ModuleNotFoundError("", name="sklearn"), 2, 'error: sklearn is not installed; pip install "lily-peft[demo]"'),
    ],
)
def test_what_a_command_cannot_help_ends_in_one_message(monkeypatch, capsys, error, code, said):
    assert ends(monkeypatch, error) == code
    assert capsys.readouterr().err.strip().startswith(said)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("", name="nonsense"), SafetensorError("invalid header"), OSError(errno.EBADF, "")]
)
def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        ends(monkeypatch, error)


def test_an_interrupted_process_says_so_and_exits_with_130():
    script = "import os, signal, lily.cli.main as c, lily.cli.recipes as r\n"
    # A job in the background of a shell ignores the signal, and so would its children.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "import lily.recipes.loader as l; l.load_any = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
    script += "import sys; sys.argv = ['lily', 'recipes', 'quickstart']; c.main()"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 130
    assert run.stderr.strip().endswith("interrupted")
    assert "Traceback" not in run.stderr
