"""`lily collapse` and `lily export`: make an adapter static and write it in the formats that a LoRA has."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from typer import Option

from lily.cli.evaluate import Folder, RecipeOption
from lily.cli.progress import Verbose, progress
from lily.errors import LilyError
from lily.io.tables import terminal

Out = Annotated[str, Option("--out", help="Folder or file to write; it appears when complete.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")]
# Relative error of the outputs up to which each word holds.
MOVED = ((0.01, "hardly"), (0.1, "a little"))
KINDS = ("lora", "merged", "stock", "gguf")
READERS = ("peft", "vllm", "diffusers")  # GGUF is a separate kind
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Options of each kind.
OPTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("--for", "--rank", "--tolerance", "--force", "--dtype", "--reduce-intruders", "--experts"),
    "merged": ("--dtype",),
    "stock": (),
    "gguf": ("--reduce-intruders", "--with-base"),
}


def collapse_command(
    adapter: Folder,
    out: Out,
    recipe: RecipeOption = None,
    data: Annotated[
        str | None, Option(help="File with calibration rows; labels are not needed. Default: the training rows.")
    ] = None,
    held_out: Annotated[
        str | None,
        Option("--held-out", help="File with labeled rows for drift and metrics. Default: the held-out rows."),
    ] = None,
    rows: Annotated[int, Option(min=1, help="Largest number of rows for calibration, and for the drift.")] = 256,
    refit_steps: Annotated[int, Option(min=0, help="Distillation steps against the dynamic adapter.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Turn a data-dependent adapter into a static one, and report how far its outputs move."""
    from lily.recipes.results.adapter_folder import AdapterFolder

    location = AdapterFolder.of(adapter, recipe)  # before anything that takes seconds to import
    with progress(verbose=verbose):
        from lily.recipes.deploy import collapse_adapter

        report = collapse_adapter(
            location,
            out,
            calibration=data,
            held_out=held_out,
            rows=rows,
            refit_steps=refit_steps,
            overwrite=overwrite,
        )
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print_collapse(report.to_dict(), Console(), every=True)
        print(f"static adapter: {out}\n\n{collapse_verdict(report.to_dict())}\n")
        print(f"next:\n  {shlex.join(['lily', 'export', out, '--to', 'lora', '--out', f'{Path(out)}-lora'])}")


def collapse_verdict(report: Mapping[str, Any]) -> str:
    """What a collapse changed, in a sentence."""
    from lily.recipes.scoring.metrics import shown

    moved = report["drift"]["relative_error"]
    size = next((word for limit, word in MOVED if moved < limit), "much")
    said = f"Without its routers the adapter's outputs move {size} (by {moved:.1%} of their size)"
    metrics = report["metrics"]
    for name, before in list(metrics.get("before", {}).items())[:1]:
        said += f", and {name} goes from {shown(name, before)} to {shown(name, metrics['after'][name])}"
    refit = "" if moved < MOVED[-1][0] or report["refit_steps"] else "; --refit-steps 200 may bring them closer"
    return f"{said}{refit}."


def print_collapse(report: Mapping[str, Any], console: Console, every: bool = False) -> None:
    """Print a collapse report: of `every` layer, or of the five whose weights varied most with the data."""
    layers = report["layers"]
    common = _common([layer["name"] for layer in layers])
    rows = [
        [
            layer["name"].removeprefix(f"{common}."),
            " ".join(f"{w:.2f}" for w in layer["weights"]),
            f"{layer['uniformity']:.3f}",
            f"{layer['variance']:.4f}",
            "-" if layer["update_error"] is None else f"{layer['update_error']:.1%}",
        ]
        for layer in (layers if every else sorted(layers, key=lambda v: -v["variance"])[:5])
    ]
    heads = ("layer", "weights", "from uniform", "variance", "update moved")
    console.print(terminal(heads, rows, no_wrap=True, title=escape(f"layers of {common}") if common else None))
    drift, before = report["drift"], report["drift_before_refit"]
    console.print(f"{escape(report['routing'])} routing collapsed over {report['tokens']:,} tokens; {_drift(drift)}")
    if before is not None:
        kept = f"kept {report['refit_steps']} steps" if report["refit_steps"] else "did not help and was dropped"
        console.print(f"the re-fit {kept}; before it {_drift(before)}")
    for name, value in report["metrics"].get("before", {}).items():
        console.print(f"{escape(name)}: {value:.4f} before, {report['metrics']['after'][name]:.4f} after")


def _common(names: Sequence[str]) -> str:
    """The common prefix of all names, in whole modules."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False))
    return ".".join(parts[0] for parts in shared)


def _drift(drift: Mapping[str, Any]) -> str:
    kl = "" if drift["kl"] is None else f"KL {drift['kl']:.3g} nats per output, "
    return f"drift {kl}relative error {drift['relative_error']:.3g} on {drift['positions']:,} held-out outputs"


def export_command(
    adapter: Folder,
    to: Annotated[str, Option("--to", help="Format to write: lora, merged, stock or gguf.")],
    out: Out,
    target: Annotated[str, Option("--for", help="With lora: its reader, peft, vllm or diffusers.")] = "peft",
    rank: Annotated[int | None, Option(min=1, help="With lora: a smaller rank, by truncated SVD.")] = None,
    tolerance: Annotated[
        float | None, Option(help="Share of a layer's energy that --rank may drop. Default: 0.01.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Reduce the rank even if --tolerance is exceeded.")] = False,
    reduce_intruders: Annotated[
        bool, Option("--reduce-intruders", help="With lora or gguf: reduce intruder dimensions, as in PEFT.")
    ] = False,
    top_k: Annotated[
        int | None, Option("--top-k", min=1, help="Leading singular vectors to look for intruders in. Default: 10.")
    ] = None,
    threshold_epsilon: Annotated[
        float | None, Option("--threshold-epsilon", help="Cosine similarity that an intruder is below. Default: 0.5.")
    ] = None,
    mitigation_lambda: Annotated[
        float | None,
        Option("--mitigation-lambda", help="Factor on intruders: 1 keeps, 0 removes them. Default: 0.75."),
    ] = None,
    dtype: Annotated[str, Option(help="Data type: auto, float32, bfloat16 or float16.")] = "auto",
    experts: Annotated[
        str, Option(help="With lora: stacked experts as peft, or shared, as SGLang and vLLM read them.")
    ] = "peft",
    with_base: Annotated[
        bool, Option("--with-base", help="With gguf: copy the base model's GGUF file beside the LoRA.")
    ] = False,
    base: Annotated[str | None, Option(help="Folder of the base model, if it has moved.")] = None,
    recipe: RecipeOption = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Write a static adapter as a LoRA, a merged model, a stock Lily adapter or a GGUF LoRA."""
    if to not in KINDS:
        raise LilyError(f"--to {to}: choose one of {', '.join(KINDS)}")
    options = {"--for": target != "peft", "--rank": rank is not None, "--tolerance": tolerance is not None,
             "--force": force, "--dtype": dtype != "auto", "--reduce-intruders": reduce_intruders,
             "--experts": experts != "peft", "--with-base": with_base}  # fmt: skip
    values = {"top_k": top_k, "threshold_epsilon": threshold_epsilon, "mitigation_lambda": mitigation_lambda}
    mitigation: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if mitigation and not reduce_intruders:
        unused = "--" + next(iter(mitigation)).replace("_", "-")
        raise LilyError(f"{unused} has no effect without --reduce-intruders; add that, or drop {unused}")
    _check_options(to, [name for name, is_used in options.items() if is_used])
    if target not in READERS:
        raise LilyError(f"--for {target}: choose one of {', '.join(READERS)}")
    if dtype not in DTYPES:
        raise LilyError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if Path(out).expanduser().exists() and not overwrite:
        raise LilyError(f"--out {out} exists; name another one, or give --overwrite")
    from lily.recipes.results.adapter_folder import AdapterFolder

    location = AdapterFolder.of(adapter, recipe, base)  # before anything that takes seconds to import
    with progress(verbose=verbose) as told, told.stage("", "loading"):
        import torch

        from lily import export
        from lily.recipes import exports
        from lily.recipes.deploy import load_for_export

        if to == "gguf":
            exports.check_free(out, overwrite)
        weights = to == "merged" or reduce_intruders
        model, tokenizer, facts = load_for_export(location, weights=weights, dtype=dtype if to == "merged" else "auto")
    if to == "gguf" and not hasattr(model, "get_base_model"):
        raise LilyError(f"{adapter} is for a pipeline, which llama.cpp does not run; export --to lora --for diffusers")
    console = Console()
    files = exports.files_beside(location, "diffusers" if target == "diffusers" else to, facts) if to != "gguf" else {}
    if to == "merged":
        export.write_merged(model, out, tokenizer=tokenizer, overwrite=overwrite, provenance=facts, files=files)
    elif to == "stock":
        export.write_stock(model, out, overwrite=overwrite, provenance=facts, files=files)
    else:
        lora = export.as_lora(
            model,
            target="llama.cpp" if to == "gguf" else target,
            rank=rank,
            tolerance=export.TOLERANCE if tolerance is None else tolerance,
            force=force,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            experts=experts,
            provenance=facts,
        )
        _print_lora(lora, model, rank, console)
        if reduce_intruders:
            lora = export.reduce_intruder_dimension(lora, model, **mitigation, logging_sink=print)
        if to == "gguf":
            said = exports.write_for_llama_cpp(
                lora, model, location, out, tokenizer=tokenizer, overwrite=overwrite, with_base=with_base
            )
            for line in said:
                console.print(escape(line), soft_wrap=True)
        else:
            layout = "diffusers" if target == "diffusers" else "peft"
            export.write_lora(lora, out, overwrite=overwrite, layout=layout, files=files)
    console.print(escape(f"written: {out}"), soft_wrap=True)


def _check_options(to: str, options: Sequence[str]) -> None:
    """Refuse options that would have no effect."""
    unused = [name for name in options if name not in OPTIONS[to]]
    if unused:
        kinds = [kind for kind in KINDS if unused[0] in OPTIONS[kind]]
        raise LilyError(f"{unused[0]} goes with --to {' or '.join(kinds)}, not with --to {to}; drop it")
    if "--rank" not in options and (unused := [name for name in ("--tolerance", "--force") if name in options]):
        raise LilyError(f"{unused[0]} limits what --rank may discard; add --rank or drop {unused[0]}")


def _print_lora(lora: Any, model: Any, rank: int | None, console: Console) -> None:
    from lily.tuner.adapter import find

    own = 4 * find(model).plan.parameters.total
    console.print(
        f"LoRA of rank {lora.rank} on {len(lora.layers)} layers: {lora.size / 1e6:.2f} MB "
        f"(the Lily adapter: {own / 1e6:.2f} MB{'; a LoRA repeats what layers share' if lora.size > own else ''})"
    )
    if rank is not None:
        print_energies(lora.energies, console)


def print_energies(energies: Mapping[str, float], console: Console) -> None:
    """Print the share of energy that each layer kept when its rank was reduced."""
    console.print(terminal(["layer", "energy kept"], [[name, f"{energy:.2%}"] for name, energy in energies.items()]))
