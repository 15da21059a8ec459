"""GGUF LoRA: what the file holds, and what a real llama.cpp computes from it."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re

import pytest
import torch
from adapters import adapted
from helpers import build, randomise
from paths import ROOT
from peft import get_peft_model

from lily import LilyConfig, LilyError, export
from lily.gguf_lora import FAMILIES, halves_to_pairs, write_gguf

gguf = pytest.importorskip("gguf", reason='GGUF needs gguf: pip install "lily-peft[sft]"')
from tiny_gguf import VOCAB, tiny, write_base  # noqa: E402

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PROMPT = [1, *(5 + 7 * i % 80 for i in range(20))]


def with_adapter(model, targets, **options):
    """A static adapter that changes the model's outputs a lot."""
    config = LilyConfig(r=4, num_A=2, num_B=3, routing="static", scaling=0.7, target_modules=targets, **options)
    return randomise(get_peft_model(model, config), scale=0.3).eval()


def read(file):
    """Fields and tensors of a GGUF file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.tensor(t.data) for t in reader.tensors}


@pytest.fixture(scope="module")
def llama():
    return adapted("llama", routing="static", scaling=0.7)


def test_the_file_holds_what_llama_cpp_asks_for(llama, tmp_path):
    lora = export.as_lora(llama, target="llama.cpp", provenance={"adapter": "näme"})
    write_gguf(lora, llama.config, tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == lora.rank
    assert json.loads(fields["lily.provenance"])["adapter"] == "näme"
    assert len(tensors) == 2 * len(lora.layers)
    names = {"q_proj": "attn_q", "v_proj": "attn_v", "down_proj": "ffn_down"}
    for name, layer in lora.layers.items():
        block, kind = name.split(".")[2], names[name.rsplit(".", 1)[1]]
        assert torch.equal(tensors[f"blk.{block}.{kind}.weight.lora_a"], layer.A)
        B = tensors[f"blk.{block}.{kind}.weight.lora_b"]
        assert torch.equal(B, halves_to_pairs(layer.B, 4) if kind == "attn_q" else layer.B)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


def test_rows_of_each_head_are_interleaved():
    rows = torch.arange(8.0)[:, None]
    assert halves_to_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_configuration_can_be_a_folder_or_a_file(llama, tmp_path):
    lora = export.as_lora(llama, target="llama.cpp")
    llama.config.save_pretrained(tmp_path)
    for i, where in enumerate([llama.config, str(tmp_path), tmp_path / "config.json"]):
        write_gguf(lora, where, tmp_path / f"{i}.gguf")
    assert len({(tmp_path / f"{i}.gguf").read_bytes() for i in range(3)}) == 1


def test_an_existing_file_stays_unless_it_is_to_be_replaced(llama, tmp_path):
    lora = export.as_lora(llama, target="llama.cpp")
    file = tmp_path / "a.gguf"
    file.write_text("mine")
    with pytest.raises(LilyError, match="exists"):
        write_gguf(lora, llama.config, file)
    assert file.read_text() == "mine"
    write_gguf(lora, llama.config, file, overwrite=True)
    assert read(file)[0]["general.type"] == "adapter"
    with pytest.raises(LilyError, match="there is no folder"):
        write_gguf(lora, llama.config, tmp_path / "nowhere" / "a.gguf")
    with pytest.raises(LilyError, match="is a folder"):
        write_gguf(lora, llama.config, tmp_path, overwrite=True)


def test_a_failed_write_leaves_nothing(llama, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space"):
        write_gguf(export.as_lora(llama, target="llama.cpp"), llama.config, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_what_llama_cpp_cannot_read_is_refused_with_the_way_out(llama, tmp_path):
    lora, file = export.as_lora(llama, target="llama.cpp"), tmp_path / "a.gguf"
    with pytest.raises(LilyError, match=r"model_type .*'gpt2'.*export --to merged"):
        write_gguf(lora, build("gpt2").config, file)
    wrong = type(llama.config).from_dict({**llama.config.to_dict(), "num_attention_heads": 2})
    with pytest.raises(LilyError, match="the model that the adapter was trained on"):
        write_gguf(lora, wrong, file)
    with pytest.raises(LilyError, match=r"no config\.json"):
        write_gguf(lora, tmp_path, file)
    short = type(llama.config).from_dict({**llama.config.to_dict(), "num_hidden_layers": 1})
    with pytest.raises(LilyError, match=r"has no layer for model\.layers\.1"):
        write_gguf(lora, short, file)
    uneven = dict(lora.layers)
    first = next(iter(uneven))
    uneven[first] = dataclasses.replace(uneven[first], scale=0.5)
    with pytest.raises(LilyError, match="one alpha for all layers"):
        write_gguf(dataclasses.replace(lora, layers=uneven), llama.config, file)
    with pytest.raises(LilyError, match="only A and B"):
        write_gguf(dataclasses.replace(lora, other={"score.weight": torch.ones(1)}), llama.config, file)
    assert not file.exists()


def test_a_tied_output_layer_is_refused(tmp_path):
    model = with_adapter(tiny("llama"), ["lm_head"])
    model.config.tie_word_embeddings = True
    with pytest.raises(LilyError, match="tie_word_embeddings"):
        write_gguf(export.as_lora(model, target="llama.cpp"), model.config, tmp_path / "a.gguf")


def test_without_gguf_the_error_says_what_to_install(llama, tmp_path, monkeypatch):
    genuine = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    lora = export.as_lora(llama, target="llama.cpp")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(LilyError, match="pip install"):
        write_gguf(lora, llama.config, tmp_path / "a.gguf")


def test_the_guides_example_runs(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = ROOT / "docs" / "deploy-targets.md"
    code = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)[0]
    exec(compile(code, guide.name, "exec"), {"peft_model": llama})
    assert read("as-lora.gguf")[0]["adapter.type"] == "lora"


class LlamaCpp:
    """A base model and a LoRA in llama.cpp, which computes in float32 as far as it can."""

    def __init__(self, base, lora, tokens=256):
        cpp = pytest.importorskip("xllamacpp", reason="comparing with llama.cpp needs it: pip install xllamacpp")
        params = cpp.CommonParams()
        params.model.path = str(base)
        params.lora_adapters = [cpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        params.n_ctx, params.n_parallel, params.warmup = tokens, 1, False
        params.cpuparams.n_threads = 1
        params.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
        self.server = cpp.Server(params)

    def greedy(self, prompt, steps, vocabulary, scale):
        """Greedy tokens, and their log-probabilities (steps, vocabulary)."""
        request = {
            "prompt": prompt,
            "max_tokens": steps,
            "temperature": 0.0,
            "logprobs": vocabulary,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": [{"id": 0, "scale": scale}],
        }
        content = self.server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        seen = torch.full((len(content), vocabulary), float("nan"))
        for row, step in zip(seen, content, strict=True):
            for entry in step["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return [step["id"] for step in content], seen


@torch.no_grad()
def greedy(model, prompt, steps):
    """The same by transformers; the end token is never chosen, as llama.cpp is told to ignore it."""
    ids, rows = list(prompt), []
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits[0, -1].float()
        rows.append(logits.log_softmax(-1))
        logits[model.config.eos_token_id] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(rows)


# What is adapted: every projection of every family and, once, an output layer.
CASES = [*((family, FUSED if family == "phi3" else LAYERS) for family in FAMILIES), ("llama", ["lm_head"])]


@pytest.mark.parametrize(("family", "targets"), CASES, ids=lambda v: v if isinstance(v, str) else v[0])
def test_llama_cpp_computes_what_transformers_computes(family, targets, tmp_path):
    base, known = tiny(family), FAMILIES[family]
    write_base(base, tmp_path / "base.gguf", known.architecture, known.reorders)
    plain = greedy(base, PROMPT, 8)
    model = with_adapter(base, targets)
    write_gguf(export.as_lora(model, target="llama.cpp"), model.config, tmp_path / "lora.gguf")
    expected = greedy(model, PROMPT, 8)

    # llama.cpp takes GELU from a table in float16, which the gemmas use; everything else is float32 throughout.
    tolerance = 1e-2 if family.startswith("gemma") else 1e-4
    real = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    for scale, (tokens, rows) in ((0.0, plain), (1.0, expected)):
        seen_tokens, seen = real.greedy(PROMPT, 8, VOCAB, scale)
        assert seen_tokens == tokens
        difference = (seen - rows).abs().max()  # nan if llama.cpp leaves any token out
        print(f"{family}, scale {scale}: log-probabilities differ by {difference:.1e}")
        assert difference < tolerance
    assert plain[0] != expected[0]
    assert (plain[1] - expected[1])[0].abs().max() > 1


@pytest.mark.network
def test_llama_cpp_agrees_on_a_real_base_of_4_bits(tmp_path):
    """Both read one Q4_1 file; llama.cpp also rounds activations to 8 bits, which bounds how well they can agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lily.recipes import loader
    from lily.recipes.data import sources

    pytest.importorskip("xllamacpp", reason="comparing with llama.cpp needs it: pip install xllamacpp")
    file = sources.fetch(loader.load_recipe("chat").model)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    prompt = tokenizer("The capital of France is Paris. The capital of Italy is")["input_ids"]
    plain = greedy(base, prompt, 1)[1]
    model = randomise(
        get_peft_model(base, LilyConfig(r=16, num_A=3, num_B=3, routing="static", scaling=1.0, target_modules=LAYERS)),
        scale=0.08,
    ).eval()
    expected = greedy(model, prompt, 1)[1]
    write_gguf(export.as_lora(model, target="llama.cpp"), base.config, tmp_path / "lora.gguf")
    real = LlamaCpp(file, tmp_path / "lora.gguf")
    seen = {scale: real.greedy(prompt, 1, base.config.vocab_size, scale)[1] for scale in (0.0, 1.0)}
    assert (plain - expected).abs().mean() > 1  # what the adapter does
    assert (seen[0.0] - plain).abs().mean() < 0.2
    assert (seen[1.0] - expected).abs().mean() < 0.2  # without reordered rows: 0.5
