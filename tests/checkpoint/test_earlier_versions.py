"""Adapters that an earlier version wrote give the logits that they gave then."""

from __future__ import annotations

import json

import pytest
from helpers import build, inputs, predict
from paths import ROOT
from peft import PeftModel
from safetensors.torch import load_file

ADAPTERS = sorted((ROOT / "tests" / "fixtures" / "earlier" / "adapters").iterdir())


@pytest.mark.filterwarnings("ignore:routing=.* on a causal model")
@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_an_adapter_of_an_earlier_version_gives_the_logits_that_it_gave(folder, tmp_path):
    kind = json.loads((folder / "kind.json").read_text())["kind"]
    expected = load_file(folder / "expected.safetensors")["logits"]
    model = PeftModel.from_pretrained(build(kind), folder).eval()
    assert (predict(build(kind), inputs(kind)) - expected).abs().max() > 1e-3  # the adapter acts
    assert (predict(model, inputs(kind)) - expected).abs().max() <= 1e-5  # another CPU may round otherwise
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert (predict(again, inputs(kind)) - expected).abs().max() <= 1e-5
