"""The tables of `lily plan`: who shares what, and what it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lily.plan.report import GroupReport, PlanReport

MOST_RUNS = 8  # blocks shown in a table; --json has all of them


def render_plan(report: PlanReport, console: Console) -> None:
    """Print a report as tables."""
    console.print(
        f"[bold]{escape(report.model)}[/bold]: {as_count(report.model_parameters)} parameters ({report.dtype}), "
        f"{report.layers} layers adapted in {len(report.groups)} groups, routing {report.routing}"
    )
    console.print(_sharing_table(report))
    console.print(_cost_table(report))
    console.print(
        f"Training memory, estimated (batch {report.batch} x {report.tokens} tokens, Adam, no checkpointing): "
        f"{_memory(report)}",
        highlight=False,
    )
    options = ", ".join(f"{name}={value}" for name, value in report.options.items())
    console.print(f"\nWhy [bold]{options}[/bold]:")
    for sentence in report.reason:
        console.print(Text(f"- {sentence}"))


def _sharing_table(report: PlanReport) -> Table:
    table = Table(title="Who shares what", title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("shape (out, in)")  # experts: (experts, out, in); embedding: (rows, out)
    table.add_column("layers", justify="right")
    table.add_column("layers that share an A", ratio=1)
    for name in ("experts", "r", "parameters"):
        table.add_column(name, justify="right")
    for name, groups in folded(report.groups).items():
        g, size = groups[0], sum(group.parameters for group in groups)
        layers = f"{len(groups)} x {g.layers}" if len(groups) > 1 else str(g.layers)
        table.add_row(escape(name), str(g.shape), layers, shorten(g.sharing), str(g.num_B), str(g.r), f"{size:,}")
    return table


def folded(groups: Sequence[GroupReport]) -> dict[str, list[GroupReport]]:
    """Groups by name; stacked experts have a group per layer, so these share a row with `*` as the layer's number."""
    from lily.plan.specs import EXPERTS

    rows: dict[str, list[GroupReport]] = {}
    for group in groups:
        name = group.name
        if group.kind == EXPERTS:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        row = rows.setdefault(name, [])
        same = not row or replace(group, name=row[0].name, blocks=row[0].blocks) == row[0]
        if same and (not row or group.kind == EXPERTS):
            row.append(group)
        else:  # a different shape gets a separate row
            rows[f"{group.name} {group.shape}"] = [group]
    return rows


def _cost_table(report: PlanReport) -> Table:
    compute, lora, parts = report.costs.compute, report.lora, report.parameters
    table = Table(title="What it costs", title_justify="left")
    table.add_column("")
    table.add_column("Lily", justify="right")
    table.add_column("LoRA, same budget", justify="right")
    table.add_row("rank", f"{report.options['r']} ({report.rank_advantage:.1f}x LoRA's)", str(lora.r))
    table.add_row("scale of the update", f"{report.scaling:.3g}", f"{lora.scale:.3g}")
    for part, label in (("A", "A, shared by neighbors"), ("B", "B, shared by all"), ("router", "routers")):
        table.add_row(label, f"{parts[part]:,}", "")
    if parts["own"]:
        table.add_row("gains, and A and B of each layer's own", f"{parts['own']:,}", "")
    table.add_row("trainable parameters", f"{parts['total']:,}", f"{lora.parameters:,}")
    in_model = (report.share_of_model, lora.parameters / report.model_parameters)
    table.add_row("share of the model", *(f"{share:.3%}" for share in in_model))
    table.add_row(
        "multiply-adds, share of the adapted layers'",
        f"{compute.share:.1%} ({compute.form})",
        f"{lora.share_of_compute:.1%}",
    )
    sizes = (report.costs.checkpoint_bytes, lora.checkpoint_bytes)
    table.add_row("adapter file (float32)", *(as_bytes(size) for size in sizes))
    return table


def _memory(report: PlanReport) -> str:
    m = report.costs.memory
    return (
        f"about {as_bytes(m.total)} = frozen weights {as_bytes(m.weights)} + adapter with gradients and Adam "
        f"{as_bytes(m.adapter)} + activations {as_bytes(m.activations)}"
    )


def shorten(sharing: Sequence[str]) -> str:
    """Blocks as `0-6 | 7-13`; of many, the first three and the last."""
    if len(sharing) <= MOST_RUNS:
        return " | ".join(sharing)
    return " | ".join([*sharing[:3], "...", sharing[-1]]) + f"  ({len(sharing)} A)"


def as_count(value: int) -> str:
    """`1234567` as `1.23M`."""
    return _scaled(value, ("", "k", "M", "B"), 2)


def as_bytes(value: int) -> str:
    """`1234567` as `1.2 MB`."""
    return _scaled(value, (" B", " KB", " MB", " GB"), 1)


def _scaled(value: int, units: Sequence[str], digits: int) -> str:
    power = min(int(math.log10(max(value, 1))) // 3, len(units) - 1)
    return f"{value / 1000**power:.{digits if power else 0}f}{units[power]}"
