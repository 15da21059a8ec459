"""A tiny encoder and a tiny chat model in folders, and a tiny table: recipes run in seconds, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

TEXT = "good bad fine awful the film was a plot and actors so very not is it yes no question answer"
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", "<end>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not chat:
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="<end>",
        model_max_length=64,
    )
    out.chat_template = CHAT if chat else None
    return out


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(WORDS) + len(SPECIAL),
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer(chat=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(WORDS) + len(SPECIAL),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=6,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return folder


def rows(count: int = 60) -> list[dict[str, Any]]:
    good, bad = ("good", "fine"), ("bad", "awful")
    out = []
    for i in range(count):
        word = (good if i % 2 else bad)[i // 2 % 2]
        filler = WORDS[4 + i % 9]
        out.append(
            {"text": f"the film {filler} was {word} {WORDS[6 + i % 7]}", "label": str(i % 2), "score": i % 2 + 0.5}
        )
    return out


def write_jsonl(path: Path, table: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", rows())


def write_recipe(folder: Path, values: dict[str, Any], name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def classification(encoder: Path, table: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "task": "text-classification",
        "model": {"path": str(encoder)},
        "data": {
            "train": {"path": str(table)},
            "columns": {"text": "text", "label": "label"},
            "split": {"validation": 0.2, "test": 0.2},
            "max_length": 16,
        },
        "targets": "all-linear",
        "lily": {"r": 4, "num_A": 1, "num_B": 2, "scaling": 4.0},
        "train": {"epochs": 6, "batch_size": 8, "learning_rate": 0.01, "precision": "float32"},
        "output": str(tmp_path / "run"),
        **changes,
    }


def sft(chat_model: Path, table: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tinychat",
        "task": "sft",
        "model": {"path": str(chat_model)},
        "data": {
            "train": {"path": str(table)},
            "columns": {"prompt": "question", "completion": "answer"},
            "split": {"validation": 0.2, "test": 0.2},
            "max_length": 24,
        },
        "targets": "all-linear",
        "lily": {"r": 8, "num_A": 1, "num_B": 2, "scaling": 4.0},
        "train": {"epochs": 8, "batch_size": 8, "learning_rate": 0.02, "precision": "float32"},
        "generation": {"max_new_tokens": 3, "samples": 2},
        "metrics": ["exact_match", "loss"],
        "output": str(tmp_path / "run"),
        **changes,
    }


@pytest.fixture
def chat_table(tmp_path: Path) -> Path:
    table = [{"question": f"question {r['text']}", "answer": ("no", "yes")[int(r["label"])]} for r in rows()]
    return write_jsonl(tmp_path / "chat.jsonl", table)
