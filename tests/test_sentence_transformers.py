"""sentence-transformers calls `model.forward` directly; an embedding must not depend on the texts beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recipes_helpers import tokenizer
from transformers import BertConfig, BertModel

from lily import LilyConfig

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

TEXTS = ["a good film", "a film that is good and long and good and long and good and long"]


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    made = tokenizer(chat=False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=len(made), pad_token_id=made.pad_token_id)).save_pretrained(tmp_path / "m")
    made.save_pretrained(tmp_path / "m")
    return sentence_transformers.SentenceTransformer(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("routing", [None, "sequence", "token", "static"])
def test_a_text_has_the_same_embedding_alone_and_in_a_batch(encoder, routing):
    encoder.add_adapter(LilyConfig(r=4, num_B=2, target_modules=["query", "value"], routing=routing))
    for name, p in encoder.named_parameters():
        if "lily" in name:
            torch.nn.init.normal_(p, std=0.5)
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    together = encoder.encode(TEXTS)
    assert np.abs(alone - together).max() < 1e-5
    encoder.disable_adapters()
    assert np.abs(encoder.encode(TEXTS) - together).max() > 1e-3
