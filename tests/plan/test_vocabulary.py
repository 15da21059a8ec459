"""Whether a vocabulary was changed: only a configuration that is there can say so."""

from __future__ import annotations

import pytest
from helpers import build
from peft.config import PeftConfig

from lily.plan.vocabulary import vocabulary_changed


@pytest.mark.parametrize(("more", "changed"), [(0, False), (3, True)])
def test_the_pretrained_configuration_decides(tmp_path, more, changed):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    model.config.vocab_size += more
    assert vocabulary_changed(model, PeftConfig(base_model_name_or_path=str(tmp_path))) == changed


def test_a_folder_without_a_configuration_says_nothing(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert not vocabulary_changed(build("llama"), PeftConfig(base_model_name_or_path=str(tmp_path)))
