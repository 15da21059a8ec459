"""What one weight synchronization of an RL trainer sends to vLLM: merged weights or the LoRA. Prints Markdown.

    python benchmarks/lora_sync.py [--layers 8 --width 512 --r 24]

The merged weights are those that TRL's trainers send: all parameters, after a merge, which is then undone. The LoRA is
`lily.export.as_lora(model, target="vllm")`. Times are of this machine's CPU and do not include sending.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lily import LilyConfig, export


def policy(layers: int, width: int, r: int) -> PeftModel:
    """A random Llama in bfloat16 with a static adapter on all its linear layers."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8, vocab_size=8000
    )
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapter = LilyConfig(r=r, stride_A=4, num_B=2, routing="static", target_modules="all-linear")
    return get_peft_model(base, adapter)


def size(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def timed(act: Callable[[], dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], float]:
    """What `act` returns, and the seconds that it takes."""
    start = time.perf_counter()
    return act(), time.perf_counter() - start


def merged(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights that TRL sends after `merge_adapter`."""
    model.merge_adapter()
    sent = {name: p.data for name, p in model.named_parameters() if model.prefix not in name}
    model.unmerge_adapter()
    return sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--r", type=int, default=24)
    options = parser.parse_args()
    model = policy(options.layers, options.width, options.r)
    rows = {
        "merged weights": timed(lambda: merged(model)),
        "LoRA, float32": timed(lambda: export.as_lora(model, target="vllm").state_dict()),
        "LoRA, bfloat16": timed(lambda: export.as_lora(model, target="vllm", dtype=torch.bfloat16).state_dict()),
    }
    whole = size(rows["merged weights"][0])
    print("| sent | tensors | bytes | share | seconds to make |\n| --- | --- | --- | --- | --- |")
    for name, (tensors, seconds) in rows.items():
        print(f"| {name} | {len(tensors)} | {size(tensors):,} | {size(tensors) / whole:.1%} | {seconds:.2f} |")
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    print(f"\nThe adapter itself, whose layers share, has {own:,} bytes.")


if __name__ == "__main__":
    main()
