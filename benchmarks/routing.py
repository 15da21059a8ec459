"""What the output of each routing depends on, measured. Prints the table of docs/routing.md.

A small random Llama with a randomly trained-looking adapter, in float32; the base model and PEFT's own Lily are the
controls. Changes are the largest over all logits, in standard deviations of the logits.
"""

from __future__ import annotations

import tempfile
import warnings

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lily

VOCAB = 97
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    vocab_size=VOCAB,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OPTIONS = {"r": 16, "stride_A": 2, "num_B": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def model(routing: str) -> torch.nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIG).eval()
    if routing == "base model":
        return base
    if routing == "stock Lily":  # the weights of the batch row, through a file
        with tempfile.TemporaryDirectory() as folder:
            model("batch").save_pretrained(folder)
            lily.unregister()
            adapted = peft.PeftModel.from_pretrained(base, folder).eval()
            lily.register()
        return adapted
    adapted = peft.get_peft_model(base, lily.LilyConfig(task_type="CAUSAL_LM", routing=routing, **OPTIONS))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lily_" in name:
                p.normal_(std=2.0 if "router" in name else 0.2)
    return adapted.eval()


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(m: torch.nn.Module, ids: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    return m(input_ids=ids, **kwargs).logits


@torch.no_grad()
def measure(m: torch.nn.Module) -> list[str]:
    one, others = tokens(1, 32, 1), tokens(3, 32, 2)
    alone = logits(m, one)
    mates = logits(m, torch.cat([one, others]))[:1] - alone
    later = logits(m, torch.cat([one[:, :20], tokens(1, 12, 3)], 1))[:, :20] - alone[:, :20]
    mask = torch.cat([torch.zeros(1, 8, dtype=torch.long), torch.ones_like(one)], 1)
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), one], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padding = logits(m, padded, attention_mask=mask, position_ids=positions)[:, 8:] - alone
    kwargs = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(one)}
    cached = m.generate(input_ids=one, use_cache=True, **kwargs)[:, 32:]
    plain = m.generate(input_ids=one, use_cache=False, **kwargs)[:, 32:]
    changes = [f"{(change.abs().max() / alone.std()).item():.1e}" for change in (mates, later, padding)]
    return [*changes, f"{(cached == plain).float().mean().item():.0%}"]


def main() -> None:
    warnings.simplefilter("ignore")
    print("| routing | other samples | later tokens | 8 left padding tokens | cache agrees on |")
    print("| --- | --- | --- | --- | --- |")
    for routing in ("base model", "stock Lily", "batch", "sequence", "token", "static", "uniform"):
        print("|", " | ".join([routing, *measure(model(routing))]), "|")


if __name__ == "__main__":
    main()
