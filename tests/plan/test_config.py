"""`LilyConfig`: accepted and refused values, error messages, and files."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields

import peft
import pytest

from lily import LilyConfig, LilyError
from lily.functional import default_scaling
from lily.plan.config import EXTENDED_TYPE

BAD = [
    ({"r": 0}, "r=0 is not valid; give a positive integer"),
    ({"r": 2.5}, "r=2.5 is not valid"),
    ({"r": True}, "r=True is not valid"),
    ({"stride_A": 0}, "stride_A=0 is not valid"),
    ({"num_A": -1}, "num_A=-1 is not valid"),
    ({"num_A": 2, "stride_A": 2}, "say the same thing twice"),
    ({"num_B": 0}, "num_B=0 is not valid; give a positive integer: 1 for one shared B"),
    ({"scaling": "big"}, "scaling='big' is not a finite number"),
    ({"scaling": float("nan")}, "scaling=nan is not a finite number"),
    ({"scaling": 0}, "switches the adapter off"),
    ({"routing": "tokens"}, "routing='tokens' is not known; choose one of batch, sequence, token, static, uniform"),
    ({"activation": "tanh"}, "activation='tanh' is not known; choose one of none, relu, gelu, silu"),
    ({"dropout": 1.0}, "dropout=1.0 is not a probability below 1"),
    ({"dropout": -0.1}, "dropout=-0.1 is not a probability"),
    ({"dropout": None}, "dropout=None is not a finite number"),
    ({"bias": "lora_only"}, "bias='lora_only' is not known; choose one of none, all, lily_only"),
    ({"init_weights": "gaussian"}, "init_weights='gaussian' is not known; give True"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": [1]}, "target_modules=[1] is not valid"),
    ({"target_modules": "q_(proj"}, "is not a regular expression"),
    ({"exclude_modules": 3}, "exclude_modules=3 is not valid"),
    ({"modules_to_save": "classifier"}, "modules_to_save='classifier' is not a list of names"),
    ({"layers_to_transform": [0], "target_modules": "all-linear"}, "layers_to_transform does not work with"),
    ({"layers_to_transform": "0", "target_modules": ["q"]}, "layers_to_transform='0' is not valid"),
    ({"modules_to_save": 3}, "modules_to_save=3 is not a list of names"),
    ({"modules_to_save": [3]}, "modules_to_save=[3] is not a list of names"),
    ({"target_modules": ""}, "target_modules is empty; name modules such as"),
    ({"layers_to_transform": [], "target_modules": ["q"]}, "layers_to_transform=[] is not valid; give layer indices"),
    ({"layers_pattern": 3, "layers_to_transform": 1}, "layers_pattern=3 is not valid; give the name of the layer list"),
    ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    ({"rank_pattern": [4]}, "rank_pattern=[4] is not valid"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0 is not valid"),
    ({"rank_pattern": {"q(": 4}}, "rank_pattern key='q(' is not a regular expression"),
    ({"rank_pattern": {3: 4}}, "rank_pattern has the key 3"),
    ({"scaling_pattern": {"q_proj": 0}}, "scaling_pattern['q_proj']=0 switches the adapter off"),
    ({"scaling_pattern": {"q_proj": "2"}}, "scaling_pattern['q_proj']='2' is not a finite number"),
    ({"scaling_pattern": {"q(": 4}}, "scaling_pattern key='q(' is not a regular expression"),
    ({"trainable_token_indices": []}, "trainable_token_indices=[] is not valid; give the ids of tokens, each once"),
    ({"trainable_token_indices": [3, 3]}, "trainable_token_indices=[3, 3] is not valid"),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices=[-1] is not valid"),
    ({"trainable_token_indices": [True]}, "trainable_token_indices=[True] is not valid"),
    ({"trainable_token_indices": {"wte": 3}}, "trainable_token_indices={'wte': 3} is not valid"),
    ({"trainable_token_indices": "new"}, "trainable_token_indices='new' is not valid"),
    ({"ensure_weight_tying": "yes"}, "ensure_weight_tying='yes' is not a bool"),
    ({"task_type": "CHAT"}, "Invalid task type: 'CHAT'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_a_bad_value_ends_in_one_message_that_names_it(options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        LilyConfig(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "routing"),
    [("CAUSAL_LM", "token"), ("SEQ_2_SEQ_LM", "token"), ("SEQ_CLS", "sequence"), (None, "sequence")],
)
def test_the_default_routing_follows_the_task(task, routing):
    assert LilyConfig(task_type=task).routing == routing


def test_a_stock_config_means_batch_routing():
    assert LilyConfig.from_stock(peft.LilyConfig(r=8, stride_A=2, num_B=3)).routing == "batch"
    stock = {"peft_type": "LILY", "r": 8, "stride_A": 2, "num_B": 3, "task_type": "CAUSAL_LM"}
    assert LilyConfig(**stock).routing == "batch"


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "batch", "stride_A": 2, "scaling": 2.0},
        {"routing": "token", "num_A": 3},
        {"routing": "static", "activation": "gelu", "dropout": 0.1, "rank_pattern": {"q": 4}},
        {"num_B": 1, "bias": "lily_only", "scaling": 0.01, "target_modules": ["b", "a"], "exclude_modules": ["c"]},
    ],
)
def test_a_config_comes_back_from_its_file_unchanged(tmp_path, options):
    config = LilyConfig(**options)
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(back, LilyConfig)
    assert back == config


def test_only_what_stock_can_compute_is_written_under_its_name(tmp_path):
    def written(**options):
        LilyConfig(target_modules=["q"], **options).save_pretrained(tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]

    assert written(routing="batch", stride_A=2) == "LILY"
    assert written(routing="batch", stride_A=2, dropout=0.1) == "LILY"  # dropout does not act in inference
    for options in (
        {"routing": "token"},
        {"num_B": 1},
        {"activation": "relu"},
        {"bias": "all"},
        {"trainable_token_indices": [3]},
        {"ensure_weight_tying": True},
        {"rank_pattern": {"q": 2}},
    ):
        assert written(**{"routing": "batch", **options}) == EXTENDED_TYPE


def test_the_file_does_not_depend_on_the_order_of_a_set(tmp_path):
    names = [f"m{i}" for i in range(10)]
    LilyConfig(target_modules=names[::-1]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == names


def test_the_paper_repositorys_options_are_understood():
    config = LilyConfig.from_peft_type(
        peft_type="LILY", r=16, ne_1=4, ne_2=4, lily_s=0.5, lily_dropout=0.1, monoscale=False, target_modules=["q"]
    )
    assert (config.num_A, config.num_B, config.scaling, config.dropout) == (4, 4, 0.5, 0.1)
    assert config.routing == "batch"
    assert LilyConfig.from_peft_type(peft_type="LILY", ne_1=2, ne_2=2, monoscale=True).routing == "uniform"


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(LilyError, match="it is a file; name a folder"):
        LilyConfig().save_pretrained(str(tmp_path / "x"))


def test_every_option_has_the_help_text_of_the_docstring():
    described = {f.name: f.metadata.get("help") for f in fields(LilyConfig) if f.name in LilyConfig.__annotations__}
    documentation = " ".join((LilyConfig.__doc__ or "").split())
    assert len(described) == 25
    for name, text in described.items():
        assert text, name
        assert f" {name}: {text} " in documentation
    assert described["num_A"].endswith("instead of `stride_A`, which is then `ceil(layers / num_A)`.")
    stock = {f.name: f for f in fields(peft.LilyConfig)}
    assert stock["stride_A"].metadata["help"] != described["stride_A"]  # PEFT's class is unchanged


def of(**ranks):
    """As `SharingPlan.ranks`, with one layer in each group."""
    return [(name, (f"layers.0.{name}",), rank) for name, rank in ranks.items()]


def test_the_default_scale_is_that_of_lora_at_rank_8_and_follows_the_rank():
    assert default_scaling(8) == 2  # lora_alpha / r of LoRA's usual alpha
    assert default_scaling(32) < default_scaling(16) < 2 < default_scaling(4)
    config = LilyConfig(r=32, own_r=4, rank_pattern={"v_proj": 4})
    assert config.scaling is None
    config.resolve_scaling(of(q_proj=36, v_proj=8))
    assert (config.scaling, config.options_of("v_proj").scaling) == (default_scaling(36), 2)
    config.resolve_scaling(of(q_proj=1))
    assert config.scaling == default_scaling(36)  # a number stays


@pytest.mark.parametrize(
    "groups",
    [
        [("fc", ("fc",), 8), ("fc", ("0.fc", "1.fc"), 2), ("fc", ("2.fc",), 32)],  # several shapes
        [("qkv.k", ("0.qkv.k", "1.qkv.k"), 8), ("k", ("2.k", "3.k"), 2)],  # a slice, and a layer
        [("k", ("k",), 8), ("qkv.k", ("0.qkv.k", "1.qkv.k"), 2)],
    ],
)
def test_the_default_scale_is_that_of_each_group_where_names_do_not_tell_them_apart(groups, tmp_path):
    config = LilyConfig(r=8)
    config.resolve_scaling(groups)
    config.save_pretrained(tmp_path)
    for c in (config, LilyConfig.from_pretrained(tmp_path)):
        for name, layers, rank in groups:
            assert [c.scaling_of(name, layer) for layer in layers] == [default_scaling(rank)] * len(layers)


def test_a_file_keeps_the_order_of_patterns_of_which_the_first_that_fits_counts(tmp_path):
    config = LilyConfig(
        r=8, scaling=1.0, scaling_pattern={"v_proj": 3.0, ".*_proj": 0.5}, rank_pattern={"v": 2, "a": 3}
    )
    config.save_pretrained(tmp_path)
    again = LilyConfig.from_pretrained(tmp_path)
    assert list(again.rank_pattern) == ["v", "a"]
    assert [again.scaling_of(name, f"layers.0.{name}") for name in ("v_proj", "q_proj")] == [3.0, 0.5]


def test_a_given_scale_is_kept_for_every_rank():
    config = LilyConfig(r=32, scaling=1.0, group_options={"v_proj": {"scaling": 0.5}})
    config.resolve_scaling(of(q_proj=32, v_proj=8))
    assert (config.scaling, config.group_options) == (1.0, {"v_proj": {"scaling": 0.5}})
    config = LilyConfig(r=32, group_options={"v_proj": {"scaling": 0.5}})
    config.resolve_scaling(of(q_proj=32, v_proj=32))
    assert (config.options_of("q_proj").scaling, config.options_of("v_proj").scaling) == (default_scaling(32), 0.5)


def test_files_hold_numbers_and_those_without_the_key_mean_1(tmp_path):
    LilyConfig(r=32, routing="batch").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["scaling"] == default_scaling(32)
    assert LilyConfig.from_pretrained(tmp_path).scaling == default_scaling(32)
    values = {k: v for k, v in json.loads((tmp_path / "adapter_config.json").read_text()).items() if k != "scaling"}
    assert LilyConfig(**values).scaling == 1
    mixed = LilyConfig(r=32, rank_pattern={"v_proj": 4})
    mixed.save_pretrained(tmp_path)
    assert LilyConfig.from_pretrained(tmp_path).scaling is None  # the model's ranks decide


def test_the_published_method_is_one_call():
    config = LilyConfig.paper(num_A=2, num_B=4, scaling=0.01)
    assert (config.routing, config.scaling, config.distinct, config.own_r) == ("batch", 0.01, "none", 0)
    assert LilyConfig.paper().scaling == 1


def test_layers_are_distinct_by_default_and_in_files_and_the_published_method_only_if_they_say_so(tmp_path):
    assert LilyConfig(routing="token").distinct == LilyConfig().distinct == "permute"
    assert LilyConfig(routing="batch").distinct == LilyConfig.paper(routing="static").distinct == "none"
    assert LilyConfig.from_stock(peft.LilyConfig()).distinct == "none"
    LilyConfig(routing="token").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert LilyConfig.from_pretrained(tmp_path).distinct == values.pop("distinct") == "permute"
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert LilyConfig.from_pretrained(tmp_path).distinct == "none"


@pytest.mark.parametrize(
    "name", sorted({f.name for f in fields(peft.LoraConfig)} - {f.name for f in fields(LilyConfig)})
)
def test_an_option_of_loras_alone_is_answered(name):
    with pytest.raises(LilyError, match=rf"^LilyConfig has no {name}[:,] "):
        LilyConfig(r=4, **{name: 1})
    assert not hasattr(LilyConfig(r=4), name)


def test_settings_of_a_running_program_in_a_file_are_passed_over_as_peft_does(tmp_path):
    LilyConfig(r=3, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    assert LilyConfig.from_pretrained(str(tmp_path)).r == 3
    assert "runtime_config" not in LilyConfig.from_json_file(str(file))
