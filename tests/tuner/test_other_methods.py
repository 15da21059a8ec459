"""`import lily` changes nothing for other methods of PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest

import lily

FILES = {
    "no type": '{"r": 4}',
    "a list": "[1]",
    "not JSON": "{",
    "empty": "",
    "unknown type": '{"peft_type": "FOO"}',
    "null type": '{"peft_type": null}',
    "not UTF-8": '"\xff"',
    "LoRA": '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN, "unknown": 1}',
    "prompt tuning": '{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}',
}


@pytest.fixture
def stock():
    yield lily.unregister
    lily.register()


def outcome(cls: type, folder: Path) -> tuple[str, str]:
    try:
        return type(cls.from_pretrained(str(folder))).__name__, ""
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("text", FILES)
@pytest.mark.parametrize("cls", [peft.PeftConfig, peft.LoraConfig])
def test_a_configuration_of_another_method_is_read_as_without_lily(cls, text, tmp_path, stock):
    (tmp_path / "adapter_config.json").write_bytes(FILES[text].encode("latin1"))
    ours = outcome(cls, tmp_path)
    stock()
    assert ours == outcome(cls, tmp_path)
