"""Time of a training step: the frozen model, LoRA at equal parameters, stock Lily, and Lily per routing.

All contestants run interleaved in one process, several rounds after warm-up; what counts is each round's ratio to LoRA.
`python benchmarks/step.py --out results.json` writes the figures with versions and device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lily
from lily.budget import equal_lora_rank

ROUTINGS = ("token", "sequence", "batch", "static")


def base(width: int, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=1000,
    )
    return AutoModelForCausalLM.from_config(config)


def contestants(width: int, layers: int, r: int) -> dict[str, torch.nn.Module]:
    options = {"r": r, "stride_A": layers // 2, "num_B": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = lily.LilyConfig(**{**options, "routing": "batch"})
    modules = lily.select_modules(base(width, layers), config)
    rank = equal_lora_rank(modules, lily.build_plan(modules, config).parameters.total)
    targets = sorted({m.name.rpartition(".")[2] for m in modules})
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    models = {"floor": base(width, layers).requires_grad_(False)}
    models["floor"].get_input_embeddings().requires_grad_(True)
    models["LoRA"] = peft.get_peft_model(base(width, layers), lora)
    lily.unregister()
    stock = peft.LilyConfig(**{**options, "target_modules": targets})
    models["stock Lily"] = peft.get_peft_model(base(width, layers), stock)
    lily.register()
    for routing in ROUTINGS:
        models[f"Lily {routing}"] = peft.get_peft_model(
            base(width, layers), lily.LilyConfig(**{**options, "routing": routing})
        )
    return models


def step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 768), ("layers", 4), ("r", 64), ("batch", 4), ("tokens", 128), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    models = contestants(o.width, o.layers, o.r)
    ids = torch.randint(0, 1000, (o.batch, o.tokens))
    for model in models.values():
        step(model.train(), ids)
    rounds = [{name: step(model, ids) for name, model in models.items()} for _ in range(o.rounds)]
    report = {}
    print("| | median s | to LoRA | spread | trainable |")
    print("| --- | --- | --- | --- | --- |")
    for name, model in models.items():
        ratios = sorted(r[name] / r["LoRA"] for r in rounds)
        seconds = statistics.median(r[name] for r in rounds)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report[name] = {"seconds": seconds, "ratios": ratios, "trainable": trainable}
        middle = statistics.median(ratios)
        print(f"| {name} | {seconds:.3f} | {middle:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {trainable:,} |")
    if o.out:
        versions = {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()}
        setting = {k: v for k, v in vars(o).items() if k != "out"}
        o.out.write_text(json.dumps({"setting": setting, "versions": versions, "results": report}, indent=2))


if __name__ == "__main__":
    main()
