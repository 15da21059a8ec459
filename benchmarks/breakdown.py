"""Where a training step's time goes, what sharing one product between siblings would save, what compiling saves.

    python benchmarks/breakdown.py

Prints the three tables of docs/performance.md for this machine. The first is one profiled step of each contestant, its
operators sorted by what they are; the second times the A of q, k and v in one product and in three; the third a step
of the model, compiled and not, in one process.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch

from lily.bench import measure, subjects
from lily.bench.contestants import contestants
from lily.bench.subjects import Shape
from lily.io.tables import markdown
from lily.kernels.matmul import mm, plus_mm

NAMES = ("frozen", "LoRA", "stock Lily", "Lily token", "Lily static")
OPTIONS = {"r": 32, "num_A": 2, "num_B": 2}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise", "aten::matmul")


def kind_of(event: object, narrow: int) -> str:
    """The purpose of an operator: products are the adapter's if one of their sides is as narrow as the adapter."""
    name, shapes = event.name, event.input_shapes  # type: ignore[attr-defined]
    if name in PRODUCTS:
        sides = [side for shape in shapes if len(shape) == 2 for side in shape]
        return "products of the adapter" if sides and min(sides) <= narrow else "products of the base model"
    if "attention" in name:
        return "attention"
    return "element-wise, copies, rest"


def breakdown(subject: subjects.Subject) -> list[list[str]]:
    """Rows of the first table, in ms."""
    kinds = ("products of the base model", "products of the adapter", "attention", "element-wise, copies, rest")
    rows = []
    for contestant in contestants(subject, OPTIONS, NAMES):
        step = measure.training_step(subject, contestant)
        step(0)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
        ) as profile:
            step(1)
        sums = dict.fromkeys(kinds, 0.0)
        events = list(profile.events())
        for event in events:
            sums[kind_of(event, narrow=2 * OPTIONS["r"])] += event.self_cpu_time_total / 1e3
        rows.append([contestant.name, *(f"{sums[kind]:.0f}" for kind in kinds), f"{len(events):,}"])
    return rows


def siblings(n: int, width: int, r: int, rounds: int) -> list[list[str]]:
    """The products with A and with dh of three layers that read the same x: three each, or one each."""
    x, W = torch.randn(n, width), torch.randn(width, width)
    apart = [torch.randn(r, width) for _ in range(3)]
    joint = torch.cat(apart)
    dh, wide = [torch.randn(n, r) for _ in range(3)], torch.randn(n, 3 * r)

    def three(_: int) -> float:
        return _seconds(lambda: [(mm(x, A.t()), mm(d.t(), x), mm(d, A)) for A, d in zip(apart, dh, strict=True)])

    def one(_: int) -> float:
        return _seconds(lambda: (mm(x, joint.t()), mm(wide.t(), x), mm(wide, joint)))

    def layers(_: int) -> float:
        return _seconds(lambda: [(torch.mm(x, W), plus_mm(mm(x, W), d, A)) for A, d in zip(apart, dh, strict=True)])

    found = measure.interleave({"three products": three, "one product": one, "base": layers}, "base", rounds)
    return [[name, f"{o.median * 1e3:.2f}", f"{o.ratio:.1%}"] for name, o in found.items() if name != "base"]


def compiled(subject: subjects.Subject, rounds: int) -> list[list[str]]:
    """Rows of the third table."""
    runs, names = {}, ("LoRA", "Lily token", "Lily sequence", "Lily static")
    for contestant in contestants(subject, OPTIONS, names):
        runs[contestant.name] = measure.step_time(subject, contestant)
        fast = contestant.__class__(
            f"{contestant.name}, compiled", torch.compile(contestant.model), contestant.rank, contestant.parameters
        )
        runs[fast.name] = measure.step_time(subject, fast)
    found = measure.interleave(runs, "LoRA", rounds, warm_up=2)
    rows = []
    for name in names:
        eager, quick = found[name], found[f"{name}, compiled"]
        ratio = sorted(b / a for a, b in zip(eager.ratios, quick.ratios, strict=True))
        rows.append([name, f"{eager.median * 1e3:.0f}", f"{quick.median * 1e3:.0f}", f"{ratio[len(ratio) // 2]:.2f}"])
    return rows


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-compile", action="store_true")
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    subject = subjects.llama(Shape(768, 12, 4, 128), "cpu", torch.float32)
    header = ["ms of a step", "base products", "adapter products", "attention", "element-wise, rest", "operators"]
    print(markdown(header, breakdown(subject)), flush=True)
    print(
        f"\n{markdown(['q, k, v: A forward and backward', 'ms', 'of the base'], siblings(512, 768, 32, 50))}",
        flush=True,
    )
    if not o.skip_compile:
        small = subjects.llama(Shape(768, 4, 4, 128), "cpu", torch.float32, vocabulary=1000)
        print(f"\n{markdown(['step, ms', 'eager', 'compiled', 'ratio'], compiled(small, o.rounds))}")


if __name__ == "__main__":
    main()
