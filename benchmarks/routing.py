"""What the output of each routing depends on, measured. Writes the figures of docs/routing.md.

    python benchmarks/routing.py                                      # a small random Llama
    python benchmarks/routing.py --runs runs/by-batch runs/by-sample  # and runs of a classifier, on their held-out rows

The Llama has a randomly trained-looking adapter, in float32; the base model and PEFT's own Lily are the controls.
Changes are the largest over all logits, in standard deviations of the logits. Of a run, the same rows are classified in
several arrangements into batches, in float32. `python docs/hooks/figures.py` puts the figures into the pages.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lily

RESULTS = Path(__file__).parent / "results" / "routing.json"
SIZE = 32  # rows of a batch
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
def measure(m: torch.nn.Module) -> dict[str, float]:
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
    changes = {"other samples": mates, "later tokens": later, "8 left padding tokens": padding}
    found = {name: float(f"{(change.abs().max() / alone.std()).item():.2g}") for name, change in changes.items()}
    return {**found, "cache agrees on": (cached == plain).float().mean().item()}


def arrangements(labels: list[str]) -> dict[str, list[list[int]]]:
    """The same rows in batches: as they come, one by one, among others, by class."""
    count = len(labels)
    shuffled = random.Random(0).sample(range(count), count)
    orders = {
        "as they come": range(count),
        "other neighbors": shuffled,
        "by class": sorted(shuffled, key=labels.__getitem__),
    }
    found = {name: [list(o)[i : i + SIZE] for i in range(0, count, SIZE)] for name, o in orders.items()}
    return {**found, "one by one": [[i] for i in range(count)]}


@torch.no_grad()
def classify(folder: str) -> dict[str, Any]:
    """Of each arrangement of a run's held-out rows: the accuracy, and what differs from the rows as they come."""
    from lily.recipes.data.tasks import collate, encode
    from lily.recipes.results.adapter import Adapter

    used = Adapter(folder)
    rows, names = used.splits.held_out, used.labels
    assert names is not None, f"{folder} is no classifier"
    truth = [str(row["label"]) for row in rows]
    examples = encode(rows, used.recipe, used.processor, names)
    out: dict[str, torch.Tensor] = {}
    for name, batches in arrangements(truth).items():
        out[name] = torch.zeros(len(rows), len(names))
        for batch in batches:
            inputs = collate([examples[i] for i in batch], used.processor)
            inputs.pop("labels")
            out[name][batch] = used.model.float()(**inputs).logits.softmax(-1)
    first = out["as they come"]
    found = {}
    for name, p in out.items():
        right = sum(names[i] == label for i, label in zip(p.argmax(-1).tolist(), truth, strict=True))
        found[name] = {
            "accuracy": round(right / len(rows), 4),
            "changed": int((p.argmax(-1) != first.argmax(-1)).sum()),
            "largest": round((p - first).abs().max().item(), 4),
        }
    return {"rows": len(rows), "routing": used.recipe.lily.routing or "sequence", "arrangements": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", help="folders of `lily train`; default: what the file has stays")
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = json.loads(o.out.read_text()) if o.out.is_file() else {}
    names = ("base model", "stock Lily", "batch", "sequence", "token", "static", "uniform")
    found = {
        "random": {name: measure(model(name)) for name in names},
        "runs": kept.get("runs", []) if o.runs is None else [classify(run) for run in o.runs],
    }
    o.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
