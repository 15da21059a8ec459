"""`lily collapse`, `lily export` and `lily inspect`: taking an adapter where a LoRA goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.commands.evaluate import Folder, RecipeOption
from lily.commands.train import quieten
from lily.errors import LilyError

Out = Annotated[str, typer.Option("--out", help="What to write; it appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
KINDS = ("lora", "merged", "stock", "gguf")
# A diffusers pipeline is no model that the command line loads, and GGUF is a kind of its own.
READERS = ("peft", "vllm")


def collapse_command(
    adapter: Folder,
    out: Out,
    recipe: RecipeOption = None,
    data: Annotated[
        str | None,
        typer.Option(help="Calibration rows, labels not needed: a file. Default: training rows."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", help="Labelled rows for drift and metrics: a file. Default: the run's."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows for calibration, and for the drift.")] = 256,
    refit_steps: Annotated[int, typer.Option(min=0, help="Steps of distillation against the dynamic adapter.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn a data-dependent adapter into a static one, and say what that costs."""
    quieten()
    from lily.recipes.deploy import collapse_adapter

    report = collapse_adapter(
        adapter,
        out,
        recipe=recipe,
        calibration=data,
        held_out=held_out,
        rows=rows,
        refit_steps=refit_steps,
        overwrite=overwrite,
    )
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _print_collapse(report.to_dict(), Console(), every=True)
        print(f"static adapter: {out}")


def _print_collapse(report: Mapping[str, Any], console: Console, every: bool = False) -> None:
    layers = report["layers"]
    common = _common([layer["name"] for layer in layers])
    table = Table(title=f"layers of {common}" if common else None)
    table.add_column("layer", no_wrap=True)
    for head in ("weights", "from uniform", "variance", "update moved"):
        table.add_column(head)
    shown = layers if every else sorted(layers, key=lambda v: -v["variance"])[:5]
    for layer in shown:
        error = layer["update_error"]
        table.add_row(
            layer["name"].removeprefix(f"{common}."),
            " ".join(f"{w:.2f}" for w in layer["weights"]),
            f"{layer['uniformity']:.3f}",
            f"{layer['variance']:.4f}",
            "-" if error is None else f"{error:.1%}",
        )
    console.print(table)
    drift, before = report["drift"], report["drift_before_refit"]
    console.print(f"{report['routing']} routing collapsed over {report['tokens']:,} tokens; {_drift(drift)}")
    if before is not None:
        kept = f"kept {report['refit_steps']} steps" if report["refit_steps"] else "did not help and was dropped"
        console.print(f"the re-fit {kept}; before it {_drift(before)}")
    for name, value in report["metrics"].get("before", {}).items():
        console.print(f"{name}: {value:.4f} before, {report['metrics']['after'][name]:.4f} after")


def _common(names: Sequence[str]) -> str:
    """The modules that all names begin with."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False))
    return ".".join(parts[0] for parts in shared)


def _drift(drift: Mapping[str, Any]) -> str:
    kl = "" if drift["kl"] is None else f"KL {drift['kl']:.3g} nats per output, "
    return f"drift {kl}relative error {drift['relative_error']:.3g} on {drift['positions']:,} held-out outputs"


def export_command(
    adapter: Folder,
    to: Annotated[str, typer.Option("--to", help="lora, merged, stock or gguf.")],
    out: Out,
    target: Annotated[
        str,
        typer.Option("--for", help="lora: what will read it: peft or vllm."),
    ] = "peft",
    rank: Annotated[int | None, typer.Option(min=1, help="lora: a smaller rank, by truncated SVD.")] = None,
    tolerance: Annotated[float, typer.Option(help="Energy that each layer may lose by --rank.")] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Cut although more is lost.")] = False,
    dtype: Annotated[str, typer.Option(help="merged: auto, float32, bfloat16 or float16.")] = "auto",
    base: Annotated[str | None, typer.Option(help="The base model's folder, where there is no recipe.")] = None,
    recipe: RecipeOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a static adapter as a LoRA, a merged model, a stock Lily adapter or a GGUF LoRA."""
    if to not in KINDS:
        raise LilyError(f"--to {to}: choose one of {', '.join(KINDS)}")
    if to != "lora" and (rank is not None or target != "peft"):
        raise LilyError(f"--rank and --for go with --to lora, not with --to {to}; leave them away")
    if target not in READERS:
        raise LilyError(f"--for {target}: choose one of {', '.join(READERS)}")
    if Path(out).exists() and not overwrite:
        raise LilyError(f"--out {out} exists; name another one, or give --overwrite")
    quieten()
    from lily import export
    from lily.recipes.deploy import load_for_export

    model, tokenizer, facts = load_for_export(adapter, recipe=recipe, base=base, weights=to == "merged", dtype=dtype)
    console = Console()
    if to == "merged":
        export.write_merged(model, out, tokenizer=tokenizer, overwrite=overwrite, provenance=facts)
    elif to == "stock":
        export.write_stock(model, out, overwrite=overwrite)
    else:
        lora = export.as_lora(
            model,
            target="llama.cpp" if to == "gguf" else target,
            rank=rank,
            tolerance=tolerance,
            force=force,
            provenance=facts,
        )
        _print_lora(lora, model, rank, console)
        if to == "gguf":
            from lily.gguf_lora import write_gguf

            write_gguf(lora, model.get_base_model().config, out, overwrite=overwrite)
        else:
            export.write_lora(lora, out, overwrite=overwrite)
    console.print(f"written: {out}", soft_wrap=True)


def _print_lora(lora: Any, model: Any, rank: int | None, console: Console) -> None:
    from lily.adapted import find

    own = 4 * find(model).plan.parameters.total
    console.print(
        f"LoRA of rank {lora.rank} on {len(lora.layers)} layers: {lora.size / 1e6:.2f} MB "
        f"(the Lily adapter: {own / 1e6:.2f} MB; a LoRA repeats what layers share)"
    )
    if rank is not None:
        table = Table("layer", "energy kept")
        for name, energy in lora.energies.items():
            table.add_row(name, f"{energy:.2%}")
        console.print(table)


def inspect_command(folder: Folder, as_json: Json = False) -> None:
    """Say what a folder holds and where it came from: an adapter, an exported LoRA, a merged model."""
    quieten()
    from lily.recipes.deploy import describe

    facts = describe(folder)
    if as_json:
        print(json.dumps(facts))
        return
    console = Console()
    console.print(f"[bold]{escape(facts['folder'])}[/]: {facts['kind']}, {facts['bytes'] / 1e6:.2f} MB", soft_wrap=True)
    for name, value in facts.get("config", {}).items():
        console.print(f"  {name}: {escape(str(value))}", soft_wrap=True)
    for name, tensors in facts.get("tensors", {}).items():
        console.print(f"  {name}: {tensors['count']} tensors, {tensors['parameters']:,} parameters")
    if "static" in facts:
        ways = (
            "merges and exports exactly" if facts["static"] else "depends on the data; `lily collapse` makes it static"
        )
        console.print(f"  {ways}")
    origin = facts.get("provenance", {})
    if origin:
        console.print("came from:")
        for name, value in origin.items():
            if name not in ("collapse", "plan"):
                console.print(f"  {name}: {escape(str(value))}", soft_wrap=True)
        for line in origin.get("plan", [])[:1]:
            console.print(f"  plan: {escape(line)}", soft_wrap=True)
    report = facts.get("collapse") or origin.get("collapse")
    if report:
        _print_collapse(report, console)
