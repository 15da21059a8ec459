"""Quantized bases: a training step of Lily beside LoRA's on the same frozen weights, in time and memory.

    python benchmarks/quantized.py                        # prints the table of docs/quantization.md
    python benchmarks/quantized.py --width 2048 --depth 16 --device cuda

One process, all contestants in every round; what counts are the ratios. Accuracy is `lily train chat` beside
`lily train chat-nf4`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lily.bench import measure, subjects
from lily.bench.contestants import LORA, contestants
from lily.bench.subjects import Shape, Subject

CONTESTANTS = (LORA, "Lily token", "Lily sequence", "Lily static")
OPTIONS = {"r": 32, "num_A": 2, "num_B": 2}


def quantized(subject: Subject, kind: str) -> Subject:
    """The subject with frozen linear layers of few bits."""
    if kind == "none":
        return subject
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    dtype = next(subject.base.parameters()).dtype
    config = BitsAndBytesConfig(
        **({**nf4, "bnb_4bit_compute_dtype": dtype} if kind == "nf4" else {"load_in_8bit": True})
    )
    with tempfile.TemporaryDirectory() as folder:
        subject.base.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=dtype, device_map={"": subject.device}
        )
    return replace(subject, base=base.requires_grad_(False).train())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, default in (("width", 512), ("depth", 6), ("batch", 4), ("tokens", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    shape = Shape(options.width, options.depth, options.batch, options.tokens)
    subject = subjects.llama(shape, options.device, getattr(torch, options.dtype), vocabulary=4096)
    print(f"{subject.name}, {options.batch} x {options.tokens} tokens, {options.dtype}, ranks of equal parameters")
    print(f"{'base':6} {'MB':>7}  {'contestant':14} {'step':>8} {'ratio':>6} {'memory':>9} {'ratio':>6}")
    for kind in ("none", "int8", "nf4"):
        base = quantized(subject, kind)
        size = base.base.get_memory_footprint() / 1e6
        rivals = contestants(base, OPTIONS, CONTESTANTS)
        times, memory = (
            measure.interleave({c.name: make(base, c) for c in rivals}, LORA, rounds)
            for make, rounds in ((measure.step_time, options.rounds), (measure.step_memory, 1))
        )
        for name, seconds in times.items():
            print(
                f"{kind:6} {size:7.1f}  {name:14} {1e3 * seconds.median:6.0f}ms {seconds.ratio:6.2f} "
                f"{memory[name].median / 1e6:7.1f}MB {memory[name].ratio:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
