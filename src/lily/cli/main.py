"""The command line: `lily` and `python -m lily`.

Commands import what they need when they run, so `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from safetensors import SafetensorError

# Nothing here phones home; only a hub id named by the user is ever looked up.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lily._version import __version__
from lily.cli import bench, compare, deploy, evaluate, inspect, new, plan, recipes, train, tune
from lily.cli.recipe_command import RecipeCommand
from lily.errors import ElsewhereError, LilyError
from lily.io.atomic import disk_error

app = typer.Typer(
    name="lily",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"lily-peft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune with Lily: low-rank adaptation that shares across layers."""


app.command("new")(new.new_command)
app.command("plan", cls=RecipeCommand)(plan.plan_command)
app.command("train", cls=RecipeCommand)(train.train_command)
app.command("tune", cls=RecipeCommand)(tune.tune_command)
app.command("sweep", cls=RecipeCommand)(tune.sweep_command)
app.command("eval")(evaluate.eval_command)
app.command("predict")(evaluate.predict_command)
app.command("generate")(evaluate.generate_command)
app.command("collapse")(deploy.collapse_command)
app.command("export")(deploy.export_command)
app.command("inspect")(inspect.inspect_command)
app.command("compare", cls=RecipeCommand)(compare.compare_command)
app.command("bench")(bench.bench_command)
app.command("recipes")(recipes.recipes_command)
app.command("schema")(recipes.schema_command)


@app.command("vtab", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def moved() -> None:
    """Name the script that was `lily vtab`."""
    raise LilyError("lily vtab is now a script of the repository: python benchmarks/vtab.py, with the same arguments")


def main() -> None:
    """Run the command line. Bad input ends with one message on standard error and exit code 2."""
    try:
        app()
    except LilyError as error:
        if not isinstance(error, ElsewhereError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns Ctrl-C into exit code 130
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        sys.exit(1)
    except ModuleNotFoundError as error:
        from lily.recipes.packages import EXTRAS, missing

        if error.name not in EXTRAS:
            raise
        print(f"error: {missing(error.name)}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as error:
        said = _about_files(error)
        if said is None:
            raise
        print(f"error: {said}; check the path, its permissions and space", file=sys.stderr)
        sys.exit(2)


def _about_files(error: OSError | SafetensorError) -> str | None:
    """What the user can do something about, or None for a fault of our own."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    number = disk_error(error)
    return None if number is None else f"a file could not be written: {os.strerror(number)}"


if __name__ == "__main__":
    main()
