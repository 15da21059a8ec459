"""`lily bench`: time, memory and size of Lily and LoRA on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from lily.errors import LilyError
from lily.io.tables import terminal

DTYPES = ("float32", "bfloat16", "float16")


def bench_command(
    model: Annotated[
        str, Argument(help="Base model: llama or vit (built in), or a folder, config.json or hub id, for its sizes.")
    ] = "llama",
    measure: Annotated[
        str, Option(help="Comma-separated measurements: step, memory, prefill, decode, files, mixed.")
    ] = "step,memory,prefill,decode,files",
    contestants: Annotated[str | None, Option(help="Contestants, separated by semicolons. Default: all.")] = None,
    targets: Annotated[str, Option(help="Modules to adapt: names with commas, a regex, or all-linear.")] = "all-linear",
    r: Annotated[int | None, Option(min=1, help="Rank of Lily. Default: 32, or the largest within --params.")] = None,
    num_a: Annotated[int | None, Option("--num-a", min=1, help="Number of A per group.")] = None,
    num_b: Annotated[int | None, Option("--num-b", min=1, help="Number of experts (B) per group.")] = None,
    params: Annotated[str | None, Option(help="Parameter budget of the adapter, such as 1.2M.")] = None,
    width: Annotated[int, Option(min=64, help="Width of a built-in model; a multiple of 64.")] = 768,
    depth: Annotated[int, Option(min=1, help="Number of layers of a built-in model.")] = 12,
    batch: Annotated[int, Option(min=1, help="Number of samples per step.")] = 4,
    tokens: Annotated[int, Option(min=1, help="Number of tokens per sample.")] = 128,
    rounds: Annotated[int, Option(min=1, help="Number of measured rounds.")] = 7,
    device: Annotated[str | None, Option(help="Device: cpu, cuda or cuda:1. Default: a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, Option(help="Dtype of the model. Default: bfloat16 on a GPU, otherwise float32.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder to write results.json (and ratios.svg) to.")] = None,
) -> None:
    """Measure time, memory and size of Lily and LoRA on a model with random weights; nothing is trained."""
    import importlib.util

    import torch

    from lily.bench import report as reports
    from lily.bench.contestants import NAMES

    console = Console()
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.startswith("cuda") and not torch.cuda.is_available():
        raise LilyError(f"--device {where}: PyTorch finds no GPU; use --device cpu")
    kind = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
    if kind not in DTYPES:
        raise LilyError(f"--dtype {kind} is not known; choose one of {', '.join(DTYPES)}")
    if width % 64:
        raise LilyError(f"--width {width} is not a multiple of 64, the width of an attention head")
    kinds = [name.strip() for name in measure.split(",") if name.strip()]
    if model == "vit":
        kinds = [name for name in kinds if name != "decode"]
    if out is not None and out.is_file():
        raise LilyError(f"--out {out} is a file; name a folder")
    subject, options = _subject(model, targets, where, getattr(torch, kind), (width, depth, batch, tokens), {
        "r": r, "num_A": num_a, "num_B": num_b, "params": params,
    })  # fmt: skip
    names = NAMES if contestants is None else [n.strip() for n in contestants.split(";") if n.strip()]
    with console.status("") as status:
        found = reports.run(subject, options, kinds, rounds, names, lambda what: status.update(f"measuring {what}"))
    machine = f"{found.machine['device']}, {found.machine['threads']} threads"
    console.print(escape(f"{found.subject}, {machine}, {found.setting}"))
    table = partial(terminal, numbers=True, title_justify="left")
    for name in found.results:
        header = ["", "rank", "trained", *reports.MEASURES[name].title.split(", ")[-1:], *reports.HEADER[4:]]
        console.print(table(header, reports.rows(found, name), title=reports.MEASURES[name].title))
    if found.files:
        console.print(table(["", "MB", "seconds to load"], reports.file_rows(found), title="adapter files"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.write(out / "results.json")
        if importlib.util.find_spec("matplotlib") and found.results:
            reports.plot(found, out / "ratios.svg")
        console.print(escape(f"written to {out}"), soft_wrap=True)


def _subject(
    model: str, targets: str, device: str, dtype: Any, sizes: tuple[int, int, int, int], asked: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The base model, and Lily's options: those given on the command line, and those that follow from them."""
    from dataclasses import replace

    from lily.bench import subjects
    from lily.cli.meta_model import model_from
    from lily.cli.plan import names_or_regex
    from lily.plan.budget import parse_count
    from lily.plan.decide import decide

    shape = subjects.Shape(*sizes)
    built_in = {"llama": subjects.llama, "vit": subjects.vit}
    wanted: Any = names_or_regex(targets)  # contestants resolve all-linear themselves, each time alike
    if model in built_in:
        subject = replace(built_in[model](shape, device, dtype), targets=wanted)
    else:
        subject = subjects.own(model, model_from(model, "CAUSAL_LM")[0], shape, wanted, device, dtype)
    budget = asked.pop("params")
    shape_options = {**asked, "parameters": None if budget is None else parse_count(budget)}
    decided = decide(subject.base, {"target_modules": wanted, "routing": "token"}, shape_options)
    return subject, decided.choice.options
