"""From a trained chat adapter to answers over HTTP: docs/serve.md with llama.cpp's server, beside transformers."""

from __future__ import annotations

import json
import re
import urllib.request

import pytest
from paths import ROOT
from peft import PeftModel
from recipes_helpers import sft, write_jsonl, write_recipe
from runs import files, invoke
from tiny_gguf import tiny, write_base

from lily.deploy.gguf import FAMILIES
from lily.recipes import loader
from lily.recipes.results.adapter import Adapter
from lily.recipes.train import train

QUESTION = "is it good?"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of an export with its base model, and the run that it is from."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("serve")
    family = FAMILIES["llama"]
    write_base(tiny("llama"), folder / "tiny.gguf", family.architecture, family.reorders)
    table = write_jsonl(folder / "chats.jsonl", [{"question": f"{i} or {i + 1}?", "answer": "yes"} for i in range(20)])
    values = sft(folder, table, folder)
    values |= {"model": {"path": str(folder / "tiny.gguf"), "format": "gguf"}, "metrics": ["loss"]}
    values |= {"generation": {"max_new_tokens": 6, "samples": 0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LILY_CACHE", str(folder / "cache"))
        recipe = loader.load_recipe(
            write_recipe(folder, values),
            ["lily.routing=static", "train.max_steps=4", "data.max_length=60", f"output={folder}/run"],
        )
        train(recipe, quiet=True)
        config = json.loads((folder / "run" / "best" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "tiny.gguf")
        said = invoke("export", folder / "run", "--to", "gguf", "--with-base", "--out", folder / "served")
        assert "Modelfile: ollama create NAME -f Modelfile, beside tiny.gguf" in said
        yield folder / "served", Adapter(str(folder / "run"))


def ask(address, scale):
    request = {
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 6,
        "lora": [{"id": 0, "scale": scale}],
    }
    body = json.dumps(request).encode()
    with urllib.request.urlopen(f"{address}/v1/chat/completions", body, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_the_folder_has_what_a_server_needs(served):
    folder, _ = served
    assert files(folder) == ["Modelfile", "README.md", "adapter.gguf", "tiny.gguf"]
    text = (folder / "Modelfile").read_text()
    assert "FROM ./tiny.gguf\nADAPTER ./adapter.gguf\n" in text
    assert 'eq .Role "user" }}user:{{ .Content }};' in text
    assert 'PARAMETER stop "</s>"' in text
    assert "llama-server --model tiny.gguf --lora adapter.gguf" in (folder / "README.md").read_text()


def test_the_servers_answers_are_those_of_the_adapter_and_of_the_base(served):
    pytest.importorskip("xllamacpp", reason="llama.cpp's server in a wheel: pip install xllamacpp")
    folder, adapter = served
    page = (ROOT / "docs" / "serve.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import xllamacpp.*?)```", page, re.DOTALL)
    code = code.replace("served/SmolLM2-135M-Instruct.Q4_1.gguf", str(folder / "tiny.gguf"))
    code = code.replace("served/adapter.gguf", str(folder / "adapter.gguf"))
    scope: dict[str, object] = {}
    exec(code, scope)
    adapted = adapter.generate(QUESTION)
    assert isinstance(adapter.model, PeftModel)
    with adapter.model.disable_adapter():
        plain = adapter.generate(QUESTION)
    address = scope["server"].listening_address
    assert (ask(address, 1.0), ask(address, 0.0)) == (adapted, plain)
    assert adapted != plain


def test_a_file_is_written_beside_its_modelfile_and_nothing_is_replaced(served, tmp_path):
    folder, _ = served
    run = folder.parent / "run"
    (tmp_path / "README.md").write_text("mine")
    said = invoke("export", run, "--to", "gguf", "--out", tmp_path / "lora.gguf")
    assert files(tmp_path) == ["Modelfile", "README.md", "lora.gguf"]
    assert "ADAPTER ./lora.gguf" in (tmp_path / "Modelfile").read_text()
    assert "README.md exists and was kept" in said
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(Exception, match=r"Modelfile exists, and --to gguf writes one; name another folder"):
        invoke("export", run, "--to", "gguf", "--out", tmp_path / "second.gguf")
