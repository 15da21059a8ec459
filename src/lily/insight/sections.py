"""The parts of the page, each a function of what is known; None where nothing is."""

from __future__ import annotations

from lily.analysis.sentences import sharing_words, short_names, title_of, weights_by_group
from lily.html import charts
from lily.html.charts import Series
from lily.html.common import curve_figure
from lily.html.markup import Child, Html, details, el, figure, join, table
from lily.insight.gather import Insight
from lily.recipes.results.card import adapter_costs, costs_of, values_of
from lily.recipes.results.run_files import RunFigures
from lily.recipes.scoring.metrics import shown

ONE_SEED = "One seed; shares and correlations in per cent. Another seed gives others: a small difference may be chance."


def result(told: Insight) -> Html | None:
    """The run's metrics beside its baselines."""
    run = told.run
    if run is None or not run.final:
        return None
    names = list(run.final)
    rows: list[list[Child]] = [["untrained", *values_of(names, run.before), "", "", ""]]
    rows += [[_baseline(name), *values_of(names, found), *costs_of(found)] for name, found in run.baselines.items()]
    title = {"lily": "Lily", "lora": "LoRA"}.get(run.method, run.method)
    own = [f"this adapter ({title})", *values_of(names, run.final), *costs_of(adapter_costs(run))]
    rows.append([el("b", cell) for cell in own])
    count = run.rows.get(run.split)
    on = f"{count:,.0f} {run.split} rows" if count else f"the {run.split} rows"
    made = table(f"On {on}, seed {run.seed}", ["method", *names, "trained parameters", "seconds", "on disk"], rows)
    return join(made, el("p", ONE_SEED))


def _baseline(name: str) -> str:
    return {"lora": "LoRA", "tfidf": "TF-IDF", "frozen": "frozen encoder"}.get(name, name)


def sharing(told: Insight) -> Html | None:
    """Group by group: which layers share which A, and how each mixes the experts."""
    plan = told.plan
    if plan is None:
        return None
    known = weights_by_group(told.routing) if told.routing is not None else {}
    figures = []
    for group in plan.groups:
        names = short_names(group.members)
        routed = known.get(title_of(group))
        weights = [layer.mean for layer in routed] if routed else None
        blocks = [(plan.slots[block[0]].A, len(block)) for block in group.blocks]
        words = sharing_words(group)
        picture = charts.sharing(title_of(group), names, blocks, weights, group.num_B, words)
        heads = ["layer", "A", *(f"B{e}" for e in range(group.num_B))]
        numbers = None
        if weights is not None:
            cells = [
                [m, f"A{plan.slots[m].A}", *(f"{w:.3f}" for w in ws)]
                for m, ws in zip(group.members, weights, strict=True)
            ]
            numbers = table(f"Mean expert weights in {title_of(group)}", heads, cells)
        figures.append(figure(title_of(group), picture, words, numbers))
    experts = max(g.num_B for g in plan.groups)
    entries = [(f"e{e % charts.EXPERT_COLOURS}", f"expert B{e}") for e in range(experts)]
    mean = "mean weight of each expert" + (f" over {told.read}" if told.read else "")
    what = mean if known else "no data were read, so the bands are of equal height"
    intro = (
        "Boxes: the layers that share one A, and so read the same input directions. Bands: how each layer mixes the "
        f"experts B that its whole group shares; {what}."
    )
    return join(el("p", intro), charts.legend(entries, "box"), el("div", *figures, cls="grid"))


def training(told: Insight) -> Html | None:
    """Loss and metric over training, beside the LoRA baseline."""
    runs: list[tuple[str, str, RunFigures]] = []
    if told.run is not None:
        lora = told.run.method == "lora"
        runs.append(("this adapter", "lora" if lora else "lily", told.run))
    if told.lora_run is not None:
        runs.append(("LoRA trained beside it", "lora", told.lora_run))
    loss = [Series(name, style, run.losses) for name, style, run in runs if run.losses]
    metric = [Series(name, style, run.evaluations) for name, style, run in runs if run.evaluations]
    figures = []
    if loss:
        said = "Training loss, as the trainer logged it."
        picture = charts.lines(loss, "Training loss", said, "optimiser step", "loss")
        figures.append(curve_figure("Training loss", picture, loss, said, "step"))
    if metric and told.run is not None:
        title = f"{told.run.metric} on the validation rows"
        said = "At each evaluation; the best one was kept."
        picture = charts.lines(metric, title, said, "optimiser step", told.run.metric)
        figures.append(curve_figure(title, picture, metric, said, "step"))
    return el("div", *figures, cls="grid") if figures else None


def sizes(told: Insight) -> Html | None:
    """Parameters by part and bytes."""
    rows: list[list[str]] = []
    if told.plan is not None:
        p = told.plan.parameters
        rows += [
            ["A, shared by neighbours", f"{p.A:,}"],
            ["B, shared by all", f"{p.B:,}"],
            ["routers, one a layer", f"{p.router:,}"],
            ["adapter", f"{p.total:,}"],
        ]
        alone = sum(len(g.members) * g.r * (g.in_features + g.out_features) for g in told.plan.groups)
        rows.append(["LoRA of the same rank", f"{alone:,}"])
    else:
        rows += [[name, f"{found['parameters']:,}"] for name, found in told.facts.get("tensors", {}).items()]
    if told.run is not None and told.run.parameters.get("head"):
        rows.append(["new head", f"{told.run.parameters['head']:,.0f}"])
    return table("Parameters", ["part", "parameters"], rows) if rows else None


def collapse(told: Insight) -> Html | None:
    """The drift of an adapter that was made static."""
    report = told.facts.get("collapse") or told.facts.get("provenance", {}).get("collapse")
    if not report:
        return None
    drift = report["drift"]
    rows = [
        ["KL divergence of an output (nats)", "-" if drift["kl"] is None else f"{drift['kl']:.4g}"],
        ["relative error of the outputs", f"{drift['relative_error']:.4g}"],
        ["outputs compared", f"{drift['positions']:,}"],
    ]
    for name, value in report["metrics"].get("before", {}).items():
        rows.append([f"{name} before, after", f"{shown(name, value)}, {shown(name, report['metrics']['after'][name])}"])
    layers = [
        [v["name"], f"{v['uniformity']:.3f}", f"{v['variance']:.4f}",
         "-" if v["update_error"] is None else f"{v['update_error']:.1%}"]
        for v in report["layers"]
    ]  # fmt: skip
    said = f"{report['routing']} routing became static over {report['tokens']:,} tokens of calibration data."
    heads = ["layer", "distance from equal weights", "variance over tokens", "update moved by"]
    by_layer = details("By layer", table("Routing over the calibration data, and its loss", heads, layers))
    return join(el("p", said), table("Drift on held-out data", ["measure", "value"], rows), by_layer)


def about(told: Insight) -> Html | None:
    """Configuration and origin, as they are in the files."""
    facts = dict(told.facts.get("config", {}))
    origin = told.facts.get("provenance", {})
    facts |= {f"from: {k}": v for k, v in origin.items() if k not in ("collapse", "plan", "energies")}
    if not facts:
        return None
    return el(
        "dl", *(el(tag, str(said)) for pair in facts.items() for tag, said in zip(("dt", "dd"), pair, strict=True))
    )
