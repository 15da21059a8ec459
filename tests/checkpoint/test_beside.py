"""Everything that PEFT stores beside an adapter, for every operation on it; LoRA is the judge."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import lily
from lily import LilyConfig, export
from lily.errors import LilyError
from lily.recipes.deploy import load_for_export
from lily.tuner import peft_saving

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VOCAB, RESIZED = 40, 43
pytestmark = [
    pytest.mark.sample(every=10),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:The new embeddings will be initialized"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


class Odd(nn.Module):
    """Modules with the names that PEFT's wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(3))
        self.weight = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"original_module": nn.Linear(8, 8), "bias": nn.LayerNorm(8)})
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](x))
        x = self.heads["bias"](self.heads["original_module"](self.weight(x)))
        return self.block(x)


@dataclass
class Kind:
    """One thing beside an adapter: the configuration's options, the base model, and how it is saved."""

    options: dict[str, Any]
    model: str = "llama"
    tied: bool = False
    resized: bool = False
    save: dict[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        return self.model == "llama"


def embeddings(name: str, options: dict[str, Any]) -> dict[str, Kind]:
    """The kind on tied and untied models, with a vocabulary as it was, resized, or saved on request."""
    out = {}
    for tied in (False, True):
        for how in ("", "resized", "saved"):
            save = {"save_embedding_layers": True} if how == "saved" else {}
            key = " ".join(part for part in (name, "tied" if tied else "", how) if part)
            out[key] = Kind(options, tied=tied, resized=how == "resized", save=save)
    return out


EMBED, HEAD = {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}
BOTH, ROWS = {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [5, 39]}
TIE, SOME = {"ensure_weight_tying": True}, {"layers_to_transform": [1, 2], "layers_pattern": "layers"}
KINDS = {
    **embeddings("nothing", {}),
    **embeddings("embed_tokens", EMBED),
    **embeddings("lm_head", HEAD),
    **embeddings("embed_tokens and lm_head", BOTH),
    **embeddings("rows", ROWS),
    **embeddings("adapted embed_tokens and lm_head", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "never saved": Kind(EMBED, save={"save_embedding_layers": False}),
    "both, kept tied": Kind({**BOTH, **TIE}, tied=True, resized=True),
    "lm_head, kept tied": Kind({**HEAD, **TIE}, tied=True),
    "rows, kept tied": Kind({**ROWS, **TIE}, tied=True, resized=True),
    "rows by layer": Kind({"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [7]}}),
    "rows by layer, tied": Kind({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}}, tied=True),
    "other rows by layer, tied": Kind({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [7]}}, tied=True),
    "rows and lm_head": Kind({**ROWS, **HEAD}, resized=True),
    "some layers, both": Kind({**BOTH, **SOME}, resized=True),
    "some layers, rows": Kind({**ROWS, **SOME}, tied=True),
    "some layers, biases": Kind({"bias": "all", **SOME, "layers_pattern": "h"}, "gpt2"),
    "container": Kind({"modules_to_save": ["layers.1.mlp"]}),
    "several": Kind({"modules_to_save": ["layers.0.self_attn", "layers.2.mlp.up_proj", "model.norm"]}, resized=True),
    "classes": Kind({"task_type": "SEQ_CLS"}, "bert classes"),
    "classes and biases": Kind({"task_type": "SEQ_CLS", "bias": "all"}, "bert classes"),
    "classes and own biases": Kind({"task_type": "SEQ_CLS", "bias": "only"}, "bert classes"),
    "classes and a container with biases": Kind(
        {"task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["pooler"]}, "bert classes"
    ),
    "classes of a causal model": Kind({"task_type": "SEQ_CLS"}, "llama classes"),
    "tokens": Kind({"task_type": "TOKEN_CLS"}, "bert tokens"),
    "answers": Kind({"task_type": "QUESTION_ANS", "bias": "only"}, "bert answers"),
    "all biases": Kind({"bias": "all"}, "gpt2"),
    "own biases": Kind({"bias": "only"}, "gpt2"),
    "odd names": Kind({"modules_to_save": ["weight", "heads.original_module", "heads.bias"]}, "odd"),
    "odd names and biases": Kind({"modules_to_save": ["weight", "block"], "bias": "all"}, "odd"),
}
# The rest of the kinds is slow by number alone.
FAST = {
    "nothing tied resized", "embed_tokens tied resized", "embed_tokens saved", "embed_tokens and lm_head resized",
    "rows tied resized", "adapted embed_tokens and lm_head tied", "both, kept tied", "other rows by layer, tied",
    "several", "classes and a container with biases", "odd names and biases", "some layers, biases",
}  # fmt: skip


def marks_of(name):
    return () if name in FAST else pytest.mark.slow


EVERY = pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in KINDS])
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "odd": ["up"], "llama": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch):
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # a third of the time


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of the causal base models, from which PEFT reads whether the vocabulary was resized."""
    root = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, tie_word_embeddings=tied, **SIZES)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / str(tied))
    return root


def base(kind: Kind, bases, seed: int = 0) -> nn.Module:
    """The base model; `seed`: of the rows that a resized vocabulary adds."""
    model = copy.deepcopy(_built(kind.model, bases / str(kind.tied)))
    if kind.resized:
        torch.manual_seed(seed)
        model.resize_token_embeddings(RESIZED, mean_resizing=False)
    return model


@cache
def _built(name: str, folder) -> nn.Module:
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=VOCAB, num_labels=3, **SIZES)
    builders = {
        "llama": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "llama classes": lambda: AutoModelForSequenceClassification.from_config(
            LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, num_labels=3, pad_token_id=0, **SIZES)
        ),
        "bert classes": lambda: AutoModelForSequenceClassification.from_config(bert),
        "bert tokens": lambda: AutoModelForTokenClassification.from_config(bert),
        "bert answers": lambda: AutoModelForQuestionAnswering.from_config(BertConfig(vocab_size=VOCAB, **SIZES)),
        "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=VOCAB)),
        "odd": Odd,
    }
    return builders[name]().eval()


def config(method: str, kind: Kind) -> Any:
    options = {"target_modules": TARGETS[kind.model.split()[0]], **copy.deepcopy(kind.options)}
    if kind.model != "odd":
        options.setdefault("task_type", "CAUSAL_LM")
    if options.get("bias") == "only":
        options["bias"] = f"{method}_only"
    if method == "lora":
        return LoraConfig(r=4, **options)
    return LilyConfig(r=4, num_A=2, num_B=2, routing="static", **options)


def trained(method: str, kind: Kind, bases) -> PeftModel:
    """The base model with an adapter, and everything that trains changed."""
    model = get_peft_model(base(kind, bases), config(method, kind))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters(), key=lambda item: (_is_own(item[0]), item[0])):
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def _is_own(name: str) -> bool:
    return "lora_" in name or "lily_" in name


def outputs(model: nn.Module, kind: Kind) -> torch.Tensor:
    if kind.model == "odd":
        x: Any = {"x": torch.linspace(-1, 1, 40).view(5, 8)}
    else:
        ids = torch.arange(1, RESIZED if kind.resized else VOCAB).repeat(2)[:48].view(3, 16)
        x = {"input_ids": ids}
    with torch.no_grad():
        out = model.eval()(**x)
    return out if isinstance(out, torch.Tensor) else out.logits if "logits" in out else out.start_logits


def difference(model: nn.Module, kind: Kind, expected: torch.Tensor) -> float:
    return float((outputs(model, kind) - expected).abs().max())


def saved(model: PeftModel, kind: Kind, folder) -> dict[str, torch.Tensor]:
    """Save; the file's tensors beside the adapter's own."""
    model.save_pretrained(folder, **kind.save)
    state = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): t for name, t in state.items() if not _is_own(name)}


def from_pretrained(method, kind, bases, folder):
    model = trained(method, kind, bases)
    saved(model, kind, folder)
    return difference(PeftModel.from_pretrained(base(kind, bases, 1), folder), kind, outputs(model, kind))


def with_less_memory(method, kind, bases, folder):
    model = trained(method, kind, bases)
    saved(model, kind, folder)
    back = PeftModel.from_pretrained(base(kind, bases, 1), folder, low_cpu_mem_usage=True)
    if method == "lily":  # LoRA's are tied no longer
        assert _tied(back) == _tied(model)
    return difference(back, kind, outputs(model, kind))


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def load_adapter(method, kind, bases, folder):
    model = trained(method, kind, bases)
    saved(model, kind, folder)
    back = get_peft_model(base(kind, bases, 1), config(method, kind))
    back.load_adapter(folder, "default")
    return difference(back, kind, outputs(model, kind))


def second_adapter(method, kind, bases, folder):
    model = trained(method, kind, bases)
    saved(model, kind, folder)
    back = PeftModel.from_pretrained(base(kind, bases, 1), folder)
    back.load_adapter(folder, "other")
    back.set_adapter("other")
    expected = outputs(model, kind)
    return max(difference(back, kind, expected), _resaved(back, kind, bases, folder / "again", expected))


def _resaved(back, kind, bases, folder, expected):
    back.save_pretrained(folder, selected_adapters=["other"], **kind.save)
    return difference(PeftModel.from_pretrained(base(kind, bases, 2), folder / "other"), kind, expected)


def gathered(method, kind, bases, folder):
    """As several processes save."""
    model = trained(method, kind, bases)
    model.save_pretrained(folder, state_dict=lily.gathered_state(model))
    return difference(PeftModel.from_pretrained(base(kind, bases, 1), folder), kind, outputs(model, kind))


def auto_model(method, kind, bases, folder):
    model = trained(method, kind, bases)
    saved(model, kind, folder)
    return difference(AutoPeftModelForCausalLM.from_pretrained(folder), kind, outputs(model, kind))


def merge(method, kind, bases, folder):
    model = trained(method, kind, bases)
    expected = outputs(model, kind)
    return difference(model.merge_and_unload(), kind, expected)


def merged_folder(method, kind, bases, folder):
    model = trained(method, kind, bases)
    expected = outputs(model, kind)
    if method == "lily":
        export.write_merged(model, folder / "merged")
    else:
        model.merge_and_unload().save_pretrained(folder / "merged")
    return difference(AutoModelForCausalLM.from_pretrained(folder / "merged"), kind, expected)


def as_lora(method, kind, bases, folder):
    model = trained(method, kind, bases)
    if method == "lily":
        export.write_lora(export.as_lora(model), folder / "lora")
    else:
        saved(model, kind, folder / "lora")
    return difference(PeftModel.from_pretrained(base(kind, bases, 1), folder / "lora"), kind, outputs(model, kind))


OPERATIONS = [
    from_pretrained, with_less_memory, load_adapter, second_adapter, gathered, auto_model, merge, merged_folder,
    as_lora,
]  # fmt: skip
ONLY_FOR = {
    auto_model: lambda kind: kind.causal and not kind.resized,  # it loads the base model from its folder, as it was
    merged_folder: lambda kind: kind.causal,  # one kind of base model is enough
}


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        pytest.param(name, operation, id=f"{name}-{operation.__name__}", marks=marks_of(name))
        for operation in OPERATIONS
        for name in KINDS
        if operation not in ONLY_FOR or ONLY_FOR[operation](KINDS[name])
    ],
)
def test_what_lora_can_do_with_it_lily_can(name, operation, bases, tmp_path):
    kind = KINDS[name]
    tolerance = 1e-5 if operation in (merge, merged_folder, as_lora) else 0.0
    found: dict[str, Any] = {}
    for method in ("lora", "lily"):
        (tmp_path / method).mkdir()
        try:
            found[method] = operation(method, kind, bases, tmp_path / method)
        except (LilyError, ValueError, KeyError) as error:
            found[method] = error
    if isinstance(found["lily"], Exception):
        assert isinstance(found["lily"], LilyError)
        assert isinstance(found["lora"], Exception) or found["lora"] > tolerance, found["lily"]
    else:
        assert found["lily"] <= tolerance


@EVERY
def test_the_same_trains_as_with_lora(name, bases):
    names = {}
    for method in ("lora", "lily"):
        model = get_peft_model(base(KINDS[name], bases), config(method, KINDS[name]))
        names[method] = {n for n, p in model.named_parameters() if p.requires_grad and not _is_own(n)}
    assert {n.replace("tokens_delta.default.weight", "tokens_delta.default") for n in names["lily"]} == names["lora"]


@EVERY
def test_a_file_has_what_loras_has_each_once(name, bases, tmp_path):
    kind, files = KINDS[name], {}
    for method in ("lora", "lily"):
        files[method] = saved(trained(method, kind, bases), kind, tmp_path / method)
    wrapped = (".original_module.", ".modules_to_save.")
    mine = base(kind, bases).state_dict()
    lora = {n: t for n, t in files["lora"].items() if n in mine or not any(w in f".{n}" for w in wrapped)}
    distinct: dict[str, torch.Tensor] = {}
    for key, tensor in sorted(lora.items(), key=lambda item: "embed_tokens" not in item[0]):
        if kind.tied is False or not any(torch.equal(tensor, t) for t in distinct.values()):
            distinct[key] = tensor
    assert files["lily"].keys() == distinct.keys()
    assert all(torch.equal(files["lily"][key], tensor) for key, tensor in distinct.items())


@EVERY
def test_a_file_with_pefts_own_names_loads(name, bases, tmp_path, monkeypatch):
    """As earlier versions wrote it: an embedding up to three times, each tied tensor under both names."""
    kind = KINDS[name]
    with monkeypatch.context() as earlier:
        earlier.setattr("lily.tuner.model.name_rows", lambda model: None)
        model = trained("lily", kind, bases)
    monkeypatch.setattr("peft.peft_model.get_peft_model_state_dict", peft_saving._stock_get_state)
    before = len(saved(model, kind, tmp_path))
    monkeypatch.undo()
    assert before >= len(saved(model, kind, tmp_path / "now"))
    assert difference(PeftModel.from_pretrained(base(kind, bases, 1), tmp_path), kind, outputs(model, kind)) == 0
    model.load_adapter(tmp_path, "default")


@EVERY
@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_a_reader_of_a_and_b_alone_is_told_what_it_would_lose(name, target, bases):
    kind = KINDS[name]
    model = trained("lily", kind, bases)
    beside = {"modules_to_save", "bias", "trainable_token_indices", "task_type"} & kind.options.keys() or kind.resized
    if beside:
        with pytest.raises(LilyError, match=f"{target} reads "):
            export.as_lora(model, target=target)
    elif "target_modules" not in kind.options:
        assert export.as_lora(model, target=target).other == {}


@pytest.mark.parametrize("resized", [False, True])
def test_a_lora_of_tied_embeddings_holds_frozen_weights_only_of_a_changed_vocabulary(resized, bases, tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    kind = Kind(options, tied=True, resized=resized)
    model = trained("lily", kind, bases)
    lora = export.as_lora(model)
    export.write_lora(lora, tmp_path / "lora")
    frozen = [n for n in load_file(tmp_path / "lora" / "adapter_model.safetensors") if "lora_" not in n]
    assert frozen == ["base_model.model.model.embed_tokens.base_layer.weight"] * resized
    back = PeftModel.from_pretrained(base(kind, bases, 1), tmp_path / "lora")
    assert difference(back, kind, outputs(model, kind)) < 1e-5
    if resized:
        with pytest.raises(LilyError, match="reads LoRAs of linear layers"):
            export.as_lora(model, target="llama.cpp")


TWICE = {
    "token 40": ({"trainable_token_indices": [40]}, r"has 40, but model.embed_tokens has 40 rows, from 0 to 39"),
    "no such layer": ({"trainable_token_indices": {"wte": [4]}}, "names wte, which this model does not have"),
    "rows of a norm": ({"trainable_token_indices": {"model.norm": [4]}}, "model.norm, which is no embedding"),
    "rows and whole": ({**ROWS, **EMBED}, "model.embed_tokens would also be trained whole"),
    "rows, and the tied head whole": ({**ROWS, **HEAD}, "lm_head has, and lm_head would also be trained whole"),
    "rows and adapted": ({**ROWS, "target_modules": ["embed_tokens"]}, "would also be adapted"),
    "rows, and the tied head adapted": ({**ROWS, "target_modules": ["lm_head"]}, "lm_head would also be adapted"),
    "whole in whole": ({"modules_to_save": ["mlp", "up_proj"]}, "names model.layers.0.mlp and, inside it, "),
    "a list of modules": ({"modules_to_save": ["layers"], "target_modules": ["lm_head"]}, "a ModuleList, which is"),
    "adapted and whole": ({"modules_to_save": ["proj"]}, "would be adapted, and .* trained whole"),
    "adapters kept tied": (
        {"target_modules": ["embed_tokens"], **TIE},
        "cannot tie adapters on the input embedding and",
    ),
    "base layers": ({"modules_to_save": ["base_layer"]}, "would also match the layer inside every adapted layer"),
}


@pytest.mark.parametrize("case", TWICE)
def test_what_cannot_be_trained_so_is_refused_before_a_layer_is_replaced(case, bases):
    options, message = TWICE[case]
    kind = Kind(options, tied=True)
    model = base(kind, bases)
    before = [type(m) for m in model.modules()]
    with pytest.raises(LilyError, match=message):
        get_peft_model(model, config("lily", kind))
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(("first", "second"), [(EMBED, ROWS), (ROWS, EMBED), ({"target_modules": ["lm_head"]}, HEAD)])
def test_a_module_that_another_adapter_trains_in_another_way_is_refused(first, second, bases):
    model = get_peft_model(base(Kind({}), bases), config("lily", Kind(first)))
    with pytest.raises(LilyError, match="which another adapter of this model trains in another way"):
        model.add_adapter("other", config("lily", Kind(second)))


@pytest.mark.parametrize("name", ["embed_tokens and lm_head resized", "rows resized"])
def test_a_vocabulary_that_was_not_resized_again_is_told(name, bases, tmp_path):
    kind = KINDS[name]
    saved(trained("lily", kind, bases), kind, tmp_path)
    with pytest.raises(LilyError, match=rf"vocabulary resized \(resize_token_embeddings\({RESIZED}\)\)"):
        PeftModel.from_pretrained(base(replace(kind, resized=False), bases), tmp_path)


def test_a_module_to_save_that_does_not_exist_is_told(bases):
    with pytest.warns(UserWarning, match="modules_to_save has 'lm_haed', but this model has no module of that name"):
        get_peft_model(base(Kind({}), bases), config("lily", Kind({"modules_to_save": ["lm_haed"]})))


def test_merging_rows_of_one_of_two_tied_layers_is_refused(bases):
    kind = KINDS["other rows by layer, tied"]
    model = trained("lily", kind, bases)
    expected = outputs(model, kind)
    for operation in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(LilyError, match="are one tensor, so merging the trained rows of one would change"):
            operation()
    assert difference(model, kind, expected) == 0


@pytest.mark.parametrize("method", ["lora", "lily"])
@pytest.mark.parametrize("options", [BOTH, HEAD], ids=["both", "lm_head"])
def test_what_is_kept_tied_is_one_parameter(method, options, bases):
    model = get_peft_model(base(Kind({}, tied=True), bases), config(method, Kind({**options, **TIE})))
    copies = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert copies[0].weight is copies[1].weight
    assert copies[0].weight.requires_grad


def test_a_second_adapter_is_kept_tied_too(bases):
    kind = KINDS["both, kept tied"]
    model = get_peft_model(base(kind, bases), config("lily", kind))
    model.add_adapter("other", config("lily", kind))
    model.set_adapter("other")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight is not model.get_input_embeddings().modules_to_save["default"].weight


ADAPTED = {"target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize(
    ("first", "second"), [(ROWS, {}), (EMBED, {}), (ADAPTED, {}), ({}, ADAPTED), ({}, ROWS), ({}, BOTH)]
)
def test_an_adapter_is_loaded_beside_one_of_another_kind(first, second, bases, tmp_path):
    """The frozen embedding of the second one's file belongs to another place than in a model of its own."""
    for name, options in (("first", first), ("second", second)):
        kind = Kind(options, tied=True, resized=True)
        model = trained("lily", kind, bases)
        saved(model, kind, tmp_path / name)
    both = PeftModel.from_pretrained(base(kind, bases, 1), tmp_path / "first")
    both.load_adapter(tmp_path / "second", "other")
    both.set_adapter("other")
    expected = outputs(model, kind)
    assert difference(both, kind, expected) == 0
    assert _resaved(both, kind, bases, tmp_path / "again", expected) == 0


@pytest.mark.parametrize("name", ["embed_tokens tied resized", "both, kept tied", "rows tied resized"])
def test_transformers_loads_and_saves_it(name, bases, tmp_path):
    kind = KINDS[name]
    model = trained("lily", kind, bases)
    saved(model, kind, tmp_path)
    injected = base(kind, bases, 1)
    injected.load_adapter(str(tmp_path))
    assert difference(injected, kind, outputs(model, kind)) == 0
    injected.save_pretrained(tmp_path / "again")
    back = PeftModel.from_pretrained(base(kind, bases, 2), tmp_path / "again")
    assert difference(back, kind, outputs(model, kind)) == 0


@pytest.mark.parametrize("name", ["both, kept tied", "embed_tokens tied resized"])
def test_stock_peft_reads_what_it_can_express(name, bases, tmp_path):
    kind = KINDS[name]
    model = trained("lily", kind, bases)
    export.write_stock(model, tmp_path / "stock")
    lily.unregister()
    try:
        back = PeftModel.from_pretrained(base(kind, bases, 1), tmp_path / "stock")
    finally:
        lily.register()
    assert difference(back, kind, outputs(model, kind)) < 1e-5


@pytest.mark.parametrize("name", ["both, kept tied", "rows tied resized", "embed_tokens tied resized", "several"])
def test_the_command_line_exports_it(name, bases, tmp_path):
    """The base model is loaded from its folder, as it was before its vocabulary was changed."""
    kind = KINDS[name]
    model = trained("lily", kind, bases)
    saved(model, kind, tmp_path / "adapter")
    loaded, _, _ = load_for_export(str(tmp_path / "adapter"))
    export.write_lora(export.as_lora(loaded), tmp_path / "lora")
    back = PeftModel.from_pretrained(base(kind, bases, 1), tmp_path / "lora")
    assert difference(back, kind, outputs(model, kind)) < 1e-5
    whole, _, _ = load_for_export(str(tmp_path / "adapter"), weights=True)
    assert difference(whole, kind, outputs(model, kind)) == 0


RESUMED = ["embed_tokens tied resized", "rows tied resized", "both, kept tied", "some layers, biases"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_trainer_resumes_to_the_same_end(name, bases, tmp_path):
    kind = KINDS[name]
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(1, 9)]
    ends = []
    for resume in (None, tmp_path / "checkpoint-2"):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        torch.manual_seed(3)
        model = get_peft_model(base(kind, bases), config("lily", kind))
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        ends.append(outputs(model, kind))
        assert difference(base(kind, bases), kind, ends[-1]) > 1e-3
    assert torch.equal(*ends)
