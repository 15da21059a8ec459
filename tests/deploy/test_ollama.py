"""Modelfiles: the chat template in Ollama's language, for templates of known models, rendered as Go would."""

from __future__ import annotations

import re

import pytest
from recipes_helpers import CHAT
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from lily.deploy.ollama import modelfile, turns_of

TEMPLATES = {
    "smollm2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n'+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = "
    "bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi3": "{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "tests": CHAT,
}
ASKED = [("user", "Who {{are}} you?")]
TALK = [*ASKED, ("assistant", "Nobody."), ("user", "Why?")]


def tokenizer(template, start="<s>", added=True):
    """A tokenizer with a first token, which it adds to every text or leaves to the template."""
    inner = Tokenizer(models.WordLevel({"a": 0, start: 1}, unk_token="a"))
    if added:
        inner.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=start, eos_token="</s>")
    out.chat_template = template
    return out


def go(template, messages):
    """What Go's text/template makes of the part of its language that Modelfiles here use."""
    before, _, rest = template.partition("{{ range .Messages }}")
    body, _, after = rest.rpartition("{{ end }}{{ end }}")
    cases = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)
    texts = dict(zip(cases[1::2], cases[2::2], strict=True))
    assert cases[0] == ""
    written = [texts[role].replace("{{ .Content }}", "\0") for role, _ in messages]
    filled = [plain(text).replace("\0", content) for text, (_, content) in zip(written, messages, strict=True)]
    return plain(before) + "".join(filled) + plain(after)


def plain(text):
    assert "{{" not in text.replace('{{ "{{" }}', "")
    return text.replace('{{ "{{" }}', "{{")


def test_a_first_token_that_nobody_adds_stays_in_the_template():
    text, _ = modelfile("base.gguf", "adapter.gguf", tokenizer=tokenizer(TEMPLATES["smollm2"], "<|im_start|>", False))
    assert '{{ if eq .Role "system" }}<|im_start|>system' in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_renders_conversations_as_the_models_own_does(name):
    own = tokenizer(TEMPLATES[name])
    text, missing = modelfile("base.gguf", "adapter.gguf", tokenizer=own)
    assert missing is None
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)[1]
    default = re.search(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    for messages in (ASKED, TALK):
        values = [{"role": role, "content": content} for role, content in messages]
        expected = own.apply_chat_template(values, tokenize=False, add_generation_prompt=True).removeprefix("<s>")
        told = [("system", default[1]), *messages] if default else messages
        assert go(template, told) == expected
    assert (default is not None) == (name == "smollm2")


def test_the_lines_are_those_that_ollama_documents():
    text, _ = modelfile("base.gguf", "adapter.gguf", tokenizer=tokenizer(TEMPLATES["llama3"]), about="some/model")
    assert text.startswith("# FROM is the base model as GGUF: some/model\nFROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<|eot_id|>"\n')


def test_a_template_that_looks_into_messages_is_left_out_and_the_reason_said():
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }} {% endfor %}"
    for template in (
        numbered,
        '{% for m in messages %}"""{{ m["content"] }}{% endfor %}',
        "{{ raise_exception('no') }}",
    ):
        text, missing = modelfile("base.gguf", "adapter.gguf", tokenizer=tokenizer(template))
        assert missing is not None
        assert missing in text
        assert "\nTEMPLATE" not in text
        assert 'PARAMETER stop "</s>"' in text
    assert turns_of(tokenizer(numbered)) is None


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [(None, None, "{{ .Prompt }}"), (CHAT, "### {prompt}\n=> {{", '### {{ .Prompt }}\n=> {{ "{{" }}')],
)
def test_a_recipes_own_template_stands_around_the_prompt(template, prompt, expected):
    text, missing = modelfile("base.gguf", "adapter.gguf", tokenizer=tokenizer(template), prompt=prompt)
    assert missing is None
    assert f'TEMPLATE """{expected}"""' in text
    assert "SYSTEM" not in text
