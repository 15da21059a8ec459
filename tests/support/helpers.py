"""Small models of every kind, built from configs: no weight is downloaded."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

VOCAB = 61


class Plain(nn.Module):
    """Not a transformers model: two same-named layers per block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config)


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=0,
    )
    return AutoModelForSequenceClassification.from_config(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return AutoModelForImageClassification.from_config(config)


def t5() -> nn.Module:
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForSeq2SeqLM.from_config(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "plain": Plain,
}

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value", "output.dense"],
    "vit": ["q_proj", "v_proj", "fc1"],
    "t5": ["q", "v", "wo"],
    "plain": ["up", "down"],
}

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None, "t5": "SEQ_2_SEQ_LM", "plain": None}


def build(kind: str, seed: int = 0) -> nn.Module:
    """A model in eval mode, the same weights for the same seed."""
    torch.manual_seed(seed)
    return BUILDERS[kind]().eval()


def inputs(kind: str, batch: int = 3, tokens: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs for a model of that kind."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "plain":
        return {"x": torch.randn(batch, tokens, 8, generator=generator)}
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    if kind == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.logits


def predict(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits without autograd: attention picks its kernel by what requires grad, which freezing the base changes."""
    with torch.no_grad():
        return logits(model, batch)


def randomise(model: nn.Module, scale: float = 0.2, seed: int = 2) -> nn.Module:
    """Give every adapter tensor large random values, as if it were trained hard."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lily_" in name:
                gain = 2.0 if "router" in name or "logits" in name else scale
                p.copy_(torch.randn(p.shape, generator=generator).to(p) * gain)
    return model


def processes(work: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `work(rank)`, a function of a test module or a partial of one, returns in each of several processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")  # this process has imported what they need, which takes seconds
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(work, rank, count, port, queue)) for rank in range(count)]
    for worker in workers:
        worker.start()
    found = {}
    try:
        for _ in workers:
            rank, result, failed = queue.get(timeout=400)
            assert failed is None, f"process {rank}:\n{failed}"
            found[rank] = result
    finally:
        for worker in workers:
            if len(found) < count:
                worker.kill()
            worker.join()
    return [found[rank] for rank in range(count)]


def _worker(work: Callable[[int], Any], rank: int, count: int, port: int, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer of the process that was forked
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    try:
        queue.put((rank, work(rank), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise
    torch.distributed.destroy_process_group()


def tally(what: str, count: int = 1) -> None:
    """Count towards the summary at the end of a test run: `loads held`, `faults survived`, `inputs rejected`."""
    with open(os.environ["LILY_TALLY"], "a", encoding="utf-8") as file:
        file.write(f"{count} {what}\n")
