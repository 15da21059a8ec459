"""`lily plan`: from a model's configuration to a report, its rendering and its errors."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from lily.cli.meta_model import model_from
from lily.cli.plan import names_or_regex, plan_command
from lily.cli.plan_recipe import preview_text, render_recipe
from lily.cli.plan_tables import as_bytes, as_count, render_plan, shorten
from lily.errors import LilyError
from lily.functional import default_scaling
from lily.plan.report import PlanReport, PlanRequest, compress, depth_numbers, plan_for, report_of
from lily.recipes import loader, methods
from lily.recipes.dry_run import RecipeReport, tokens_of
from lily.recipes.spec.schema import Recipe

transformers = pytest.importorskip("transformers")

MLP = ["gate_proj", "up_proj", "down_proj"]
app = typer.Typer()
app.command()(plan_command)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "shipped", lambda: {"quickstart": None, "commonsense": None})
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the configuration of Llama-3.2-3B."""
    folder = tmp_path_factory.mktemp("llama-3b")
    transformers.LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, tie_word_embeddings=True, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def llama_on_meta(llama: Path) -> nn.Module:
    return model_from(str(llama))[0]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=100,
        architectures=["BertForMaskedLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def plan(model: nn.Module, **request: Any) -> PlanReport:
    return plan_for(model, PlanRequest(**request), name="model", dtype="bfloat16")


def printed(report: PlanReport | RecipeReport, **console: Any) -> str:
    out = Console(file=io.StringIO(), width=160, **console)
    if isinstance(report, RecipeReport):
        render_recipe(report, out, everything=True)
    else:
        render_plan(report, out)
    return out.file.getvalue()  # type: ignore[attr-defined]


def brief(report: RecipeReport) -> str:
    out = Console(file=io.StringIO(), width=160)
    render_recipe(report, out)
    return out.file.getvalue()  # type: ignore[attr-defined]


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def failure(*args: object) -> str:
    result = run(*args)
    assert isinstance(result.exception, LilyError), result.output
    assert result.stdout == ""
    return str(result.exception)


# --- the report -----------------------------------------------------------------------------------------------------


def test_a_model_is_built_without_weights(llama: Path) -> None:
    model, dtype = model_from(str(llama))
    assert all(p.is_meta for p in model.parameters())
    assert dtype == "bfloat16"


def test_hugging_faces_runs_have_the_parameters_of_their_table(llama_on_meta: nn.Module) -> None:
    mlp = plan(llama_on_meta, targets=MLP, r=140, stride_A=14, num_B=2, routing="batch")
    assert round(mlp.parameters["total"] / 1e6, 2) == 9.49
    assert (mlp.lora.r, round(mlp.lora.parameters / 1e6, 2)) == (10, 9.46)
    assert mlp.rank_advantage == 14

    qv = plan(llama_on_meta, targets=["q_proj", "v_proj"], r=896, stride_A=14, num_B=2, routing="batch")
    assert round(qv.parameters["total"] / 1e6, 2) == 18.45
    assert (qv.lora.r, round(qv.lora.parameters / 1e6, 2)) == (64, 18.35)


def test_the_report_states_size_share_and_cost(llama_on_meta: nn.Module) -> None:
    report = plan(llama_on_meta, targets=MLP, match_lora=10, batch=2, tokens=100)
    assert report.model_parameters == 3_212_749_824
    assert report.share_of_model == report.parameters["total"] / report.model_parameters
    assert report.parameters["total"] == sum(g.parameters for g in report.groups) <= report.lora.parameters
    assert report.lora.r == 10
    assert report.costs.checkpoint_bytes == 4 * report.parameters["total"]
    assert report.costs.memory.weights == 2 * report.model_parameters
    assert report.groups[0].sharing == ("0-13", "14-27")
    assert report.groups[0].blocks[1][0] == "model.layers.14.mlp.gate_proj"
    assert report.layers == 84


def test_all_linear_leaves_the_head_out(llama_on_meta: nn.Module) -> None:
    names = [g.name for g in plan(llama_on_meta, match_lora=16).groups]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]


def test_excluded_modules_are_left_out(llama_on_meta: nn.Module) -> None:
    names = {g.name for g in plan(llama_on_meta, match_lora=16, exclude=MLP).groups}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_routing_defaults_by_the_kind_of_model(llama_on_meta: nn.Module, bert: Path) -> None:
    assert plan(llama_on_meta, r=4).routing == "token"
    assert plan(model_from(str(bert))[0], r=4).routing == "sequence"
    assert plan(llama_on_meta, r=4, routing="static").routing == "static"


def test_the_options_reproduce_the_plan(llama_on_meta: nn.Module) -> None:
    first = plan(llama_on_meta, targets=MLP, parameters=3_000_000)
    again = plan(llama_on_meta, targets=MLP, **first.options)
    assert again.groups == first.groups


def test_a_task_chooses_the_head(bert: Path) -> None:
    model, _ = model_from(str(bert), "SEQ_CLS")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert type(model_from(str(bert))[0]).__name__ == "BertForMaskedLM"


def test_a_plain_module_can_be_planned_too() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    report = plan_for(model, PlanRequest(targets=r"\d", r=4), name="mlp")
    assert report.dtype == "float32"
    assert report.layers == 4


def test_conv1d_counts_as_a_linear_layer() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    small, large = (plan(model, targets=["c_attn"], r=4, batch=1, tokens=t).costs.memory.activations for t in (1, 2))
    linear = 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)) + (32 + 50)
    assert large - small == 2 * linear + 4 * 2 * (4 + 1)


# --- rendering ------------------------------------------------------------------------------------------------------


def test_the_tables_say_who_shares_what_and_what_it_costs(llama_on_meta: nn.Module) -> None:
    text = printed(plan(llama_on_meta, targets=MLP, parameters=9_490_000))
    for expected in (
        "3.21B parameters (bfloat16), 84 layers adapted in 3 groups, routing token",
        "(8192, 3072)", "0-13 | 14-27", "9,485,280", "9,461,760", "140 (14.0x LoRA's)", "0.295%", "37.9 MB",
        "expand-first", "Training memory, estimated (batch 8 x 512 tokens", "Why r=140, num_A=2, num_B=2:",
    ):  # fmt: skip
        assert expected in text


def test_runs_of_layers_are_compressed() -> None:
    assert compress([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert compress([]) == ""


def test_layer_numbers_come_from_names_where_those_tell_layers_apart() -> None:
    assert depth_numbers(["model.layers.3.q", "model.layers.7.q"]) == [3, 7]
    assert depth_numbers(["layers.0.experts.0.w", "layers.0.experts.1.w"]) == [0, 1]
    assert depth_numbers(["encoder.q", "decoder.q"]) == [0, 1]
    assert depth_numbers(["7.q", "head"]) == [0, 1]


def test_many_blocks_are_shortened_in_the_table_only() -> None:
    assert shorten([str(i) for i in range(28)]) == "0 | 1 | 2 | ... | 27  (28 A)"
    assert shorten(["0-6", "7-13"]) == "0-6 | 7-13"


@pytest.mark.parametrize(
    ("value", "count", "size"),
    [(0, "0", "0 B"), (999, "999", "999 B"), (1000, "1.00k", "1.0 KB"), (1_234_567, "1.23M", "1.2 MB"),
     (10**9, "1.00B", "1.0 GB"), (5 * 10**12, "5000.00B", "5000.0 GB")],
)  # fmt: skip
def test_numbers_are_short_for_people(value: int, count: str, size: str) -> None:
    assert (as_count(value), as_bytes(value)) == (count, size)


# --- the command ----------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(llama: Path) -> None:
    result = run(llama / "config.json", "--targets", "q_proj,v_proj", "--match-lora", 64, "--json")
    assert result.exception is None, result.output
    report = json.loads(result.stdout)
    assert report["lora"]["r"] == 64
    assert report["options"].keys() == {"r", "num_A", "num_B"}
    assert [g["name"] for g in report["groups"]] == ["q_proj", "v_proj"]
    assert report["groups"][0]["blocks"][0][0] == "model.layers.0.self_attn.q_proj"
    assert report["costs"]["compute"]["form"] == "expand-first"
    assert report["reason"]


def test_every_option_reaches_the_plan(bert: Path) -> None:
    result = run(
        bert, "--targets", "query,value", "--exclude", r".*\.3\..*", "--r", 6, "--stride-a", 2, "--num-b", 3,
        "--routing", "static", "--task", "seq-cls", "--tokens", 7, "--batch", 5, "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["options"] == {"r": 6, "stride_A": 2, "num_B": 3}
    assert [g["sharing"] for g in report["groups"]] == [["0-1", "2"]] * 2
    assert (report["routing"], report["tokens"], report["batch"]) == ("static", 7, 5)
    assert report["parameters"]["router"] == 6 * 3
    assert json.loads(run(bert, "--num-a", 4, "--r", 2, "--json").stdout)["options"]["num_A"] == 4
    assert json.loads(run(bert, "--params", "9k", "--json").stdout)["parameters"]["total"] <= 9000


def test_without_json_tables_are_printed(bert: Path) -> None:
    result = run(bert)
    assert result.exception is None
    assert "Who shares what" in result.stdout
    assert "LoRA, same budget" in result.stdout


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("attn.q_proj", ["attn.q_proj"]),
        ("all-linear", "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (None, None),
    ],
)
def test_targets_are_names_or_an_expression(value: str | None, targets: object) -> None:
    assert names_or_regex(value) == targets


def test_each_mistake_has_its_own_message(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise OSError("no connection\nmore lines")

    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "text.json").write_text("not json")
    (tmp_path / "unknown.json").write_text('{"model_type": "nobody-knows"}')
    messages = [
        failure(tmp_path / "missing"),
        failure(tmp_path / "empty"),
        failure(tmp_path / "adapter"),
        failure(tmp_path / "text.json"),
        failure(tmp_path / "unknown.json"),
        failure(bert, "--targets", "qery"),
        failure(bert, "--params", "many"),
        failure(bert, "--params", "10"),
        failure(bert, "--params", "10k", "--match-lora", 4),
        failure(bert, "--num-a", 2, "--stride-a", 2),
        failure(bert, "--r", 0),
        failure(bert, "--routing", "mean"),
        failure(bert, "--task", "dance"),
        failure(bert, "lily.r=3"),
        failure("quickstart", "--r", 4),
        failure("some.yaml", "--num-a", 4),
        failure("quickstart", "--num-a", 4),
        failure(bert, "--recipe", "quickstart"),
        failure("--recipe", "quickstart", "--task", "dance"),
        failure(),
    ]
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", nowhere)
    (tmp_path / "rows.csv").write_text("a,b\n")
    messages += [failure(tmp_path / "rows.csv"), failure("quickstrt"), failure("someone/some-model")]
    expected = [
        "does not exist", "has no config.json", "lily inspect", "cannot read the model configuration.*JSON",
        "cannot read the model configuration.*nobody-knows", "did you mean query", "'many' is not a number",
        "too few", "say the same thing twice", "say the same thing twice", "r=0", "routing='mean'", "task 'DANCE'",
        "options such as --r 64", "lily.r=64", "no recipe 'some.yaml'", "--num-a is for models",
        "--recipe quickstart and .* both name what to plan; use one", "--task is for models", "no TARGET",
        "rows.csv is data, not a model or a recipe; `lily new ", "did you mean the recipe quickstart",
        "someone/some-model .*no connection",
    ]  # fmt: skip
    for message, pattern in zip(messages, expected, strict=True):
        assert re.search(pattern, message), message
        assert "\n" not in message
    assert len(set(messages)) == len(messages)


def test_a_model_that_cannot_be_built_is_a_clear_error(bert: Path) -> None:
    message = failure(bert, "--task", "SEQ_2_SEQ_LM")
    assert "cannot build" in message
    assert "\n" not in message


# --- recipes --------------------------------------------------------------------------------------------------------


PREVIEW = (("Question: [why]? ", False), ("Because.", True), ("\n", False))


@pytest.fixture
def dry_run(llama_on_meta: nn.Module) -> RecipeReport:
    recipe = "name: demo\nlily:\n  params: 1M\n"
    return RecipeReport("demo", "lily", recipe, plan(llama_on_meta, targets=["q_proj"], parameters=10**6), PREVIEW)


def test_a_dry_run_shows_recipe_plan_and_first_example(dry_run: RecipeReport) -> None:
    text = printed(dry_run)
    for expected in ("params: 1M", "Who shares what", "Question: [why]? >>>Because.<<<", "between >>> and <<<"):
        assert expected in text
    for expected in ("params: 1M", "Who shares what"):
        assert expected not in brief(dry_run)
    for expected in ("--all", "Question: [why]? >>>Because.<<<"):
        assert expected in brief(dry_run)


def test_on_a_terminal_trained_text_is_green_and_the_rest_dim() -> None:
    text = preview_text(PREVIEW, terminal=True)
    assert text.plain == "Question: [why]? Because.\n"
    assert [str(span.style) for span in text.spans] == ["dim", "bold green", "dim"]


def test_a_dry_run_of_a_baseline_says_whose_plan_it_shows(dry_run: RecipeReport) -> None:
    baseline = RecipeReport(dry_run.name, "lora", dry_run.recipe, dry_run.plan, dry_run.preview)
    assert "method lora" in printed(baseline)


def test_a_dry_run_is_json_too(dry_run: RecipeReport) -> None:
    values = json.loads(json.dumps(dry_run.to_dict()))
    assert values["recipe"] == {"name": "demo", "lily": {"params": "1M"}}
    assert values["plan"]["groups"][0]["name"] == "q_proj"
    assert values["preview"][1] == {"text": "Because.", "trained": True}


def recipe(**changes: Any) -> Recipe:
    data = {"train": {"path": "rows.csv"}, "columns": {"text": "a", "label": "b"}, "max_length": 48}
    values = {"name": "demo", "task": "text-classification", "model": {"path": "m"}, "data": data}
    return Recipe.model_validate({**values, **changes})


def test_a_recipe_and_options_of_the_same_meaning_give_the_same_plan(llama_on_meta: nn.Module, bert: Path) -> None:
    bert_on_meta, _ = model_from(str(bert), "SEQ_CLS")
    lily = {"params": "4k", "routing": "static"}
    first = recipe(targets=["query"], exclude=["0.attention.self.query"], lily=lily)
    request: dict[str, Any] = {"targets": ["query"], "exclude": ["0.attention.self.query"], "parameters": 4_000}
    expected = plan(bert_on_meta, **request, routing="static", task="SEQ_CLS", tokens=48)
    assert expected.layers == 3
    assert recipe_plan(first, bert_on_meta, batch=8) == expected
    second = recipe(task="sft", lily={"r": 4, "stride_A": 2, "num_B": 3})
    assert recipe_plan(second, llama_on_meta, batch=2) == plan(
        llama_on_meta, r=4, stride_A=2, num_B=3, task="CAUSAL_LM", batch=2, tokens=48
    )


def recipe_plan(of: Recipe, model: nn.Module, batch: int) -> PlanReport:
    decided, tokens = methods.decide(of, model), tokens_of(of, model)
    return report_of(model, decided, name="model", dtype="bfloat16", batch=batch, tokens=tokens)


def test_the_scales_of_lily_and_lora_are_printed_in_one_unit(llama_on_meta: nn.Module) -> None:
    report = plan(llama_on_meta, r=32)
    assert (report.scaling, report.lora.scale) == (default_scaling(32), 2)
    row = next(line for line in printed(report).splitlines() if "scale of the update" in line)
    assert row.split("│")[2:4] == [f"{1:>{len(row.split('│')[2]) - 1}} ", f"{2:>{len(row.split('│')[3]) - 1}} "]
