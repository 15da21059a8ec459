"""From a trained adapter to what a server takes, by the command line: collapse, settle, export, inspect."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import build
from peft import PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from recipes_helpers import WORDS, classification, rows, write_jsonl
from runs import files, invoke, make
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lily import LilyConfig
from lily.errors import LilyError
from lily.recipes import train
from lily.recipes.deploy import describe
from lily.recipes.results.adapter import Adapter
from lily.recipes.scoring import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:routing=.* on a causal model")

TEXTS = [" ".join(("the film was", WORDS[i], WORDS[-i])) for i in range(8)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder, classifier_run, chat_run):
    """Runs by name: a classifier and a chat model, dynamic; and a classifier that settled."""
    folder = tmp_path_factory.mktemp("settled")
    train.train(make(classification, folder, encoder, ["lily.settle={start: 0.4, end: 0.6}"]), quiet=True)
    return {"classifier": classifier_run.run, "chat": chat_run.run, "settled": folder / "run"}


def outputs(model, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        return model.eval()(**batch).logits


def classifier(encoder):
    return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)


def test_a_collapsed_adapter_goes_everywhere_a_lora_goes(trained, tmp_path, encoder):
    said = invoke("collapse", trained["classifier"], "--out", tmp_path / "static")
    assert "sequence routing collapsed over" in said
    assert "accuracy: " in said
    report = json.loads((tmp_path / "static" / "collapse.json").read_text())
    assert {"recipe.yaml", "labels.json", "README.md", "adapter_model.safetensors"} <= set(files(tmp_path / "static"))
    used = Adapter(str(tmp_path / "static"))
    assert used.evaluate()["accuracy"] == pytest.approx(report["metrics"]["after"]["accuracy"])
    expected = outputs(used.model, encoder)

    said = invoke("export", tmp_path / "static", "--to", "lora", "--out", tmp_path / "lora")
    assert "LoRA of rank 4 on" in said
    size = sum(t.nbytes for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values())
    assert f"{size / 1e6:.2f} MB" in said
    lora = PeftModel.from_pretrained(classifier(encoder), tmp_path / "lora")
    assert torch.allclose(outputs(lora, encoder), expected, atol=1e-5)

    invoke("export", tmp_path / "static", "--to", "merged", "--out", tmp_path / "merged")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files(tmp_path / "merged"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs(merged, tmp_path / "merged"), expected, atol=1e-5)
    assert merged.config.id2label == {0: "0", 1: "1"}

    said = invoke("export", tmp_path / "static", "--to", "stock", "--out", tmp_path / "[stock]")
    assert f"written: {tmp_path}/[stock]\n" in said
    stock = PeftModel.from_pretrained(classifier(encoder), tmp_path / "[stock]")
    assert torch.allclose(outputs(stock, encoder), expected, atol=1e-5)

    kinds = {"lora": "LORA adapter", "merged": "model", "static": "LILY adapter", "[stock]": "LILY adapter"}
    for folder, kind in kinds.items():
        facts = describe(str(tmp_path / folder))
        assert facts["kind"] == kind
        kept = facts.get("collapse") or facts["provenance"]["collapse"]
        assert kept["drift"] == report["drift"]
        assert f"routing collapsed over {report['tokens']:,} tokens" in invoke("inspect", tmp_path / folder)
    assert "does not depend on the data: its routers are zero" in invoke("inspect", tmp_path / "[stock]")
    assert "merges and exports exactly" in invoke("inspect", tmp_path / "static")


def test_the_reported_drift_is_what_an_independent_evaluation_measures(trained, tmp_path, encoder):
    said = invoke("collapse", trained["classifier"], "--out", f"{tmp_path / 'static'}/", "--rows", "1000")
    assert f"--out {tmp_path / 'static'}-lora" in " ".join(said.split())
    invoke("export", tmp_path / "static", "--to", "lora", "--out", tmp_path / "lora")
    report = json.loads((tmp_path / "static" / "collapse.json").read_text())
    dynamic = Adapter(str(trained["classifier"]))
    held_out = dynamic.splits.held_out
    lora = PeftModel.from_pretrained(classifier(encoder), tmp_path / "lora").eval()
    old, new = (
        evaluate.head_outputs(m, held_out, dynamic.recipe, dynamic.tokenizer).astype(np.float64)
        for m in (dynamic.model, lora)
    )
    p, q = (torch.from_numpy(x).log_softmax(-1) for x in (old, new))
    assert report["drift"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
    assert report["drift"]["relative_error"] == pytest.approx(np.linalg.norm(old - new) / np.linalg.norm(old), abs=1e-4)
    assert report["drift"]["positions"] == len(held_out)


def test_a_settled_adapter_needs_no_collapse(trained, tmp_path, encoder):
    run = trained["settled"]
    result = json.loads((run / "metrics.json").read_text())
    assert result["adapter"]["routing"] == "static, settled"
    finals = [h["final"] for h in result["history"]]
    assert finals == [0, 0, 0, 1, 1, 1]
    best = max(h["accuracy"] for h in result["history"] if h["final"])
    assert result["best"]["value"] == best
    assert json.loads((run / "best" / "adapter_config.json").read_text())["routing"] == "static"
    assert not any("lily_router" in name for name in load_file(run / "best" / "adapter_model.safetensors"))
    expected = outputs(Adapter(str(run)).model, encoder)
    invoke("export", run, "--to", "lora", "--out", tmp_path / "lora")
    lora = PeftModel.from_pretrained(classifier(encoder), tmp_path / "lora")
    assert torch.allclose(outputs(lora, encoder), expected, atol=1e-5)
    with pytest.raises(LilyError, match="is static already"):
        invoke("collapse", run, "--out", tmp_path / "static")
    assert files(tmp_path) == ["lora"]


def test_a_settling_run_resumes(tmp_path, encoder):
    changes = ["lily.settle={start: 0.4, end: 0.6}", "train.max_steps=12", "train.evaluate_every=5"]
    recipe = make(classification, tmp_path, encoder, changes)
    train.train(recipe, quiet=True)
    whole = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    for name in ("best", "last"):
        shutil.rmtree(tmp_path / "run" / name)
    train.train(recipe, resume=True, quiet=True)
    again = load_file(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.allclose(whole[k], again[k], atol=1e-5) for k in whole)


def test_a_chat_adapter_is_refitted_exported_for_vllm_and_merged(trained, tmp_path, chat_model):
    said = invoke("collapse", trained["chat"], "--out", tmp_path / "static", "--refit-steps", "5")
    assert "re-fit" in said
    report = json.loads((tmp_path / "static" / "collapse.json").read_text())
    assert report["routing"] == "token"
    assert report["drift_before_refit"] is not None
    invoke("export", tmp_path / "static", "--to", "lora", "--for", "vllm", "--out", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    expected = outputs(Adapter(str(tmp_path / "static")).model, chat_model)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_model), tmp_path / "lora")
    assert torch.allclose(outputs(lora, chat_model), expected, atol=1e-5)
    invoke("export", tmp_path / "static", "--to", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs(merged, tmp_path / "merged"), expected, atol=1e-5)
    assert "generation_config.json" in files(tmp_path / "merged")


def test_a_chat_adapter_becomes_a_gguf_lora(trained, tmp_path):
    gguf = pytest.importorskip("gguf")
    invoke("collapse", trained["chat"], "--out", tmp_path / "static")
    invoke("export", tmp_path / "static", "--to", "gguf", "--out", tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    names = {t.name for t in reader.tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"} <= names
    report = json.loads((tmp_path / "static" / "collapse.json").read_text())
    facts = json.loads(invoke("inspect", tmp_path / "lora.gguf", "--json"))
    assert facts["kind"] == "GGUF LoRA"
    assert facts["provenance"]["collapse"] == report
    assert facts["tensors"]["lora_a"]["count"] == len(names) / 2
    assert f"routing collapsed over {report['tokens']:,} tokens" in invoke("inspect", tmp_path / "lora.gguf")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(LilyError, match="not a readable GGUF file"):
        invoke("inspect", tmp_path / "lora.gguf")


def test_calibration_data_of_ones_own(trained, tmp_path):
    table = write_jsonl(tmp_path / "mine.jsonl", rows(20))
    said = invoke("collapse", trained["classifier"], "--out", tmp_path / "static", "--data", table, "--held-out", table,
                  "--json")  # fmt: skip
    assert json.loads(said)["drift"]["positions"] == 20


def test_calibration_needs_no_labels(trained, tmp_path):
    table = write_jsonl(tmp_path / "mine.jsonl", rows(20))
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows(20)])
    for name, data in (("labelled", table), ("bare", bare)):
        invoke("collapse", trained["classifier"], "--out", tmp_path / name, "--data", data, "--held-out", table)
    first, second = (json.loads((tmp_path / n / "collapse.json").read_text()) for n in ("labelled", "bare"))
    assert first == second


def test_a_held_out_label_that_the_adapter_does_not_know_is_named(trained, tmp_path):
    table = write_jsonl(tmp_path / "mine.jsonl", [{**row, "label": "maybe"} for row in rows(4)])
    with pytest.raises(LilyError, match=r"mine.jsonl has the label 'maybe'; the model was trained on 0, 1"):
        invoke("collapse", trained["classifier"], "--out", tmp_path / "static", "--held-out", table)
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows(4)])
    with pytest.raises(LilyError, match="no column 'label'"):
        invoke("collapse", trained["classifier"], "--out", tmp_path / "static", "--held-out", bare)
    assert files(tmp_path) == ["bare.jsonl", "mine.jsonl"]


def test_an_adapter_without_a_recipe_is_exported_with_its_base_named(trained, tmp_path, encoder):
    invoke("collapse", trained["classifier"], "--out", tmp_path / "static")
    for name in ("recipe.yaml", "labels.json"):
        (tmp_path / "static" / name).unlink()
    invoke("export", tmp_path / "static", "--to", "lora", "--out", tmp_path / "lora", "--base", encoder)
    lora = PeftModel.from_pretrained(classifier(encoder), tmp_path / "lora")
    assert lora.peft_config["default"].r == 4


def test_a_smaller_rank_prints_what_each_layer_keeps(trained, tmp_path):
    run = trained["settled"]
    with pytest.raises(LilyError, match=r"rank 1 keeps too little of .* give a larger rank or tolerance, or .*--force"):
        invoke("export", run, "--to", "lora", "--rank", 1, "--out", tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    assert "energy kept" in invoke("export", run, "--to", "lora", "--rank", 1, "--force", "--out", tmp_path / "lora")
    assert "energy kept" in invoke("inspect", tmp_path / "lora")


def test_intruders_are_reduced_as_PEFT_reduces_those_of_the_exported_lora(trained, tmp_path, encoder):
    options = ["--reduce-intruders", "--top-k", 6, "--threshold-epsilon", 0.9, "--mitigation-lambda", 0.25]
    invoke("export", trained["settled"], "--to", "lora", "--out", tmp_path / "plain")
    said = invoke("export", trained["settled"], "--to", "lora", "--out", tmp_path / "reduced", *options)
    judge = PeftModel.from_pretrained(classifier(encoder), tmp_path / "plain")
    lines = []
    values = {"top_k": 6, "threshold_epsilon": 0.9, "mitigation_lambda": 0.25}
    reduce_intruder_dimension(judge, **values, logging_sink=lines.append)
    assert all(line.removeprefix("base_model.model.") in said for line in lines[:-1])
    assert any("Intruders: " in line for line in lines)
    ours = PeftModel.from_pretrained(classifier(encoder), tmp_path / "reduced")
    # PEFT's function does not copy the classifier, which is saved whole
    judge.base_model.model.load_state_dict(
        {n: p for n, p in ours.base_model.model.state_dict().items() if "modules_to_save" in n}, strict=False
    )
    heads = [m for m in judge.modules() if "intruder_reduced" in getattr(m, "modules_to_save", {})]
    for head in heads:
        head.modules_to_save["intruder_reduced"].load_state_dict(head.modules_to_save["default"].state_dict())
    assert torch.allclose(outputs(ours, encoder), outputs(judge, encoder), atol=1e-4)
    assert describe(str(tmp_path / "reduced"))["provenance"]["intruders"] == values


def test_a_lora_is_written_in_the_dtype_asked_for(trained, tmp_path):
    invoke("export", trained["settled"], "--to", "lora", "--dtype", "bfloat16", "--out", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for k, t in tensors.items() if "lora_" in k} == {torch.bfloat16}
    assert describe(str(tmp_path / "lora"))["provenance"]["exact"] is False


def test_a_base_folder_without_a_tokenizer_is_merged_into(trained, tmp_path, chat_model):
    invoke("collapse", trained["chat"], "--out", tmp_path / "static")
    (tmp_path / "static" / "recipe.yaml").unlink()
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    base.config.pad_token_id = None
    base.save_pretrained(tmp_path / "base")
    invoke("export", tmp_path / "static", "--to", "merged", "--base", tmp_path / "base", "--out", tmp_path / "merged")
    expected = outputs(PeftModel.from_pretrained(base, tmp_path / "static"), chat_model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs(merged, chat_model), expected, atol=1e-5)
    assert not list((tmp_path / "merged").glob("tokenizer*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{dynamic}", "--to", "lora"], "depends on the data; make it static first"),
        (["export", "{dynamic}", "--to", "merged"], "depends on the data; make it static first"),
        (["export", "{static}", "--to", "onnx"], "--to onnx: choose one of lora, merged, stock"),
        (["export", "{static}", "--to", "merged", "--rank", "2"], "--rank goes with --to lora, not with --to merged"),
        (["export", "{static}", "--to", "stock", "--for", "vllm"], "--for goes with --to lora, not with --to stock"),
        (
            ["export", "{static}", "--to", "merged", "--reduce-intruders"],
            "--reduce-intruders goes with --to lora or gguf",
        ),
        (["export", "{static}", "--to", "lora", "--top-k", "5"], "--top-k has no effect without --reduce-intruders"),
        (["export", "{static}", "--to", "merged", "--force"], "--force goes with --to lora"),
        (["export", "{static}", "--to", "merged", "--tolerance", "0.5"], "--tolerance goes with --to lora"),
        (["export", "{static}", "--to", "stock", "--dtype", "float16"], "--dtype goes with --to lora or merged"),
        (["export", "{static}", "--to", "lora", "--dtype", "int4"], "--dtype int4: choose one of auto, float32"),
        (
            ["export", "{static}", "--to", "lora", "--force"],
            "--force limits what --rank may discard; add --rank or drop --force",
        ),
        (["export", "{static}", "--to", "lora", "--rank", "64"], "rank=64 is not valid: the adapter has 4"),
        (["export", "{static}", "--to", "lora", "--for", "tgi"], "--for tgi: choose one of peft, vllm"),
        (["export", "{static}", "--to", "gguf"], "llama.cpp reads no modules saved whole"),
        (["export", "{static}", "--to", "lora", "--for", "vllm"], "vllm reads no modules saved whole"),
        (["export", "{static}", "--to", "lora", "--base", "{other}"], "has shape .* expected .* base model"),
        (["export", "{empty}", "--to", "lora"], "holds no adapter"),
        (["collapse", "{dynamic}", "--data", "{empty}/none.jsonl"], "none.jsonl"),
        (["collapse", "{dynamic}", "--data", "{none}"], "none.jsonl"),
        (["collapse", "{lora}"], "is a lora adapter; only Lily adapters are collapsed"),
    ],
)
def test_bad_input_ends_in_one_message_and_nothing_is_written(
    trained, tmp_path, tmp_path_factory, encoder, arguments, message
):
    other = tmp_path_factory.mktemp("other")
    (other / "none.jsonl").write_text("")
    if "{other}" in arguments:
        from transformers import BertConfig, BertModel

        BertModel(
            BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
        ).save_pretrained(other)
    if "{lora}" in arguments:
        folder = tmp_path_factory.mktemp("lora")
        train.train(make(classification, folder, encoder, ["method=lora", "train.epochs=1"]), quiet=True)
        other = folder / "run"
    names = {"dynamic": trained["classifier"], "static": trained["settled"], "other": other, "lora": other,
             "empty": tmp_path, "none": other / "none.jsonl"}  # fmt: skip
    with pytest.raises(LilyError, match=message):
        invoke(*(a.format(**names) for a in arguments), "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["collapse", "classifier"], ["export", "settled", "--to", "lora"]])
def test_an_existing_folder_stays(trained, tmp_path, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(LilyError, match="exists"):
        invoke(command[0], trained[command[1]], *command[2:], "--out", tmp_path / "out")
    assert files(tmp_path / "out") == ["precious"]
    assert files(tmp_path) == ["out"]


def test_inspect_refuses_what_is_neither(tmp_path):
    with pytest.raises(LilyError, match="holds neither an adapter"):
        invoke("inspect", tmp_path)
    with pytest.raises(LilyError, match="holds neither an adapter"):
        invoke("inspect", tmp_path / "nowhere")


@pytest.mark.parametrize(("options", "said"), [
    ({"routing": "static", "activation": "relu"}, "activation='relu' adds what is no matrix, so it is not merged"),
    ({"group_options": {"query": {"activation": "gelu"}}}, "depends on the data; activation='gelu' adds what is no"),
    ({"routing": "static", "parallel_modules": ["intermediate"]}, "parallel_modules=['intermediate'] adds what is no"),
    ({"settled": 0.5}, "depends on the data; its training is to end first"),
    ({"routing": "static", "own_r": 1, "gain": "ones"}, "merges and exports exactly"),
])  # fmt: skip
def test_inspect_names_what_can_be_done_with_an_adapter(options, said, tmp_path):
    config = LilyConfig(r=2, num_A=1, num_B=2, target_modules=["query"], **options)
    get_peft_model(build("bert"), config).save_pretrained(tmp_path)
    shown = " ".join(invoke("inspect", tmp_path).split())
    assert said in shown
    assert ("makes it static" in shown, "other:" in shown) == (False, False)
    assert ("own_r: 1" in shown, "lily_gain: 4 tensors" in shown) == ("own_r" in options,) * 2


def test_inspect_says_what_a_dynamic_adapter_is(trained):
    said = invoke("inspect", trained["classifier"])
    assert "routing: sequence" in said
    assert "depends on the data" in said
    facts = json.loads(invoke("inspect", trained["classifier"], "--json"))
    assert facts["static"] is False
    assert facts["tensors"]["lily_A"]["count"] > 0
