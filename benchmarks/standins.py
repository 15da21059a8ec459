"""What the stand-in base models learned: makes them (minutes, once) and compares each with an untrained model.

    python benchmarks/standins.py --out benchmarks/results/standins.json [NAME ...]

The measurements are added to the file; what is in it is printed as the tables of docs/standins.md.

Text: perplexity of headlines kept from training, beside an untrained model's and that of counting tokens. Images: a
logistic regression on the frozen features of classes that the stand-in never saw, beside the same on the features of
the untrained model and on the pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from lily.io.atomic import write_text
from lily.recipes.offline import standins
from lily.recipes.offline.standins import STANDINS, TEXTS, Standin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help="default: all")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(chosen.out.read_text("utf-8")) if chosen.out.exists() else {}
    for name in chosen.names or STANDINS:
        start = time.monotonic()
        folder, definition = standins.standin(name), STANDINS[name]
        seconds = time.monotonic() - start
        measured = text(folder, definition) if definition.data in TEXTS else images(folder, definition)
        found[name] = {"folder": folder.name, "seconds_to_make_or_find": round(seconds), **measured}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.out, json.dumps(found, indent=2) + "\n")
    print(tables(found))


def tables(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [
        "| text | parameters | tokens trained on | perplexity, held-out | untrained | token counts |",
        "|" + " --- |" * 6,
    ]
    for name, row in found.items():
        if "perplexity" in row:
            after, before, counts = (row["perplexity"][k] for k in ("trained", "untrained", "token_counts"))
            sizes = f"{row['parameters']:,} | {row['training_tokens']:,}"
            lines.append(f"| `{name}` | {sizes} | {after:.1f} | {before:.0f} | {counts:.0f} |")
    lines += [
        "",
        "| images | parameters | accuracy in training | probe of unseen classes | untrained | pixels |",
        "|" + " --- |" * 6,
    ]
    for name, row in found.items():
        if "probe_accuracy" in row:
            scores = " | ".join(f"{row['probe_accuracy'][k]:.1%}" for k in ("trained", "untrained", "pixels"))
            lines.append(f"| `{name}` | {row['parameters']:,} | {row['training_accuracy']:.1%} | {scores} |")
    return "\n".join(lines)


def text(folder: Path, definition: Standin) -> dict[str, Any]:
    """Perplexities per token of the held-out texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, kept = standins.held_out(TEXTS[definition.data]())
    ids = standins.windows(tokenizer, kept, definition.tokens)
    counts = torch.bincount(standins.windows(tokenizer, train, definition.tokens).flatten(), minlength=len(tokenizer))
    log_p = ((counts + 1) / (counts + 1).sum()).log()
    torch.manual_seed(definition.seed)
    trained = AutoModelForCausalLM.from_pretrained(folder)
    return {
        "parameters": trained.num_parameters(),
        "held_out_texts": len(kept),
        "held_out_tokens": ids.numel(),
        "training_tokens": definition.steps * definition.batch * definition.tokens,
        "perplexity": {
            "trained": perplexity(trained, ids),
            "untrained": perplexity(standins.language_model(definition, tokenizer), ids),
            "token_counts": math.exp(-log_p[ids[:, 1:]].mean().item()),
        },
    }


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """exp of the mean loss over all windows; the last of each batch's rows count as the others."""
    model.eval()
    losses = [(model(input_ids=rows, labels=rows, use_cache=False).loss.item(), len(rows)) for rows in ids.split(64)]
    return math.exp(sum(loss * n for loss, n in losses) / len(ids))


def images(folder: Path, definition: Standin) -> dict[str, Any]:
    """Accuracy of linear probes on the classes that were left out."""
    rows = standins.image_rows(definition, trained=False)
    pixels, labels, names = standins.load_images(definition, rows)
    torch.manual_seed(definition.seed)
    trained = AutoModelForImageClassification.from_pretrained(folder)
    untrained = standins.classifier(definition, names)
    seen, seen_labels, _ = standins.load_images(definition, standins.image_rows(definition))
    return {
        "parameters": trained.num_parameters(),
        "trained_on": list(definition.classes or ()),
        "training_accuracy": accuracy(trained, seen, seen_labels),
        "probed_on": names,
        "probe_images": {"train": len(rows) * 4 // 5, "test": len(rows) - len(rows) * 4 // 5},
        "probe_accuracy": {
            "trained": probe(features(trained, pixels), labels),
            "untrained": probe(features(untrained, pixels), labels),
            "pixels": probe(pixels.flatten(1), labels),
        },
    }


@torch.no_grad()
def accuracy(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    guesses = torch.cat([model(batch).logits.argmax(-1) for batch in pixels.split(128)])
    return (guesses == labels).float().mean().item()


@torch.no_grad()
def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model.features(batch) for batch in pixels.split(128)])


def probe(x: torch.Tensor, labels: torch.Tensor) -> float:
    """Test accuracy of a logistic regression on four fifths of the rows."""
    split = train_test_split(x.numpy(), labels.numpy(), test_size=0.2, random_state=0, stratify=labels.numpy())
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(split[0], split[2])
    return float(model.score(split[1], split[3]))


if __name__ == "__main__":
    main()
