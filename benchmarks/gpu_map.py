"""Where sharing pays: loss of LoRA, published Lily and its structures at equal parameters on a causal model.

    python benchmarks/gpu_map.py --prepare          # on any machine that has the model: it and the texts, in pieces
    python benchmarks/gpu_map.py --out map.json     # on the GPU: run after run, until the time is over

Without a network the pieces (runs/gpu, bfloat16) can be brought one at a time. `make gpu` runs this as its part `map`.
Every run is kept as it ends, and none is repeated. Learning rates are tuned with seed 0, and the grid of an arm grows
until its best rate is inside; the other seeds, which are the ones that are compared, use that rate. The order is that
of what is most worth knowing, so that a stopped map is useful.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import lily
from lily import LilyError
from lily.bench import measure, report
from lily.bench.contestants import sharing_weights
from lily.budget import lora_parameters
from lily.io.atomic import write_text
from lily.io.tables import markdown

ROOT = Path(__file__).parents[1]
PREPARED = ROOT / "runs" / "gpu"
PIECE = 48  # MiB: what is copied at once beside the checkout stays below 64
MANIFEST, TEXTS, WEIGHTS = "manifest.json", "texts.safetensors", "model.safetensors"

LORA = "LoRA"
ONE = {"num_A": 1, "num_B": 1, "routing": "static"}
# `own_r` is half of the budget, so that it needs a LoRA of rank 2 or more.
ARMS: dict[str, dict[str, Any]] = {
    LORA: {},
    "published Lily": {"num_A": 2, "num_B": 2, "routing": "token"},
    "permuted pair": {**ONE, "distinct": "permute"},
    "pair with signed gains": {**ONE, "gain": "signs"},
    "own ranks": {**ONE, "own_r": None},
    "one pair": ONE,
}
# Task, and size in ranks of LoRA, in the order in which they are run.
PLACES = (("pairs", 1.0), ("pairs", 8.0), ("pairs", 0.25), ("texts", 1.0))
RATES = (1e-3, 2e-3, 4e-3)
MOST_RATES = 7
SEEDS = range(5)  # the first tunes
STEPS_A_PASS = 4  # at least
FULL = 0.8  # of the card's memory


@dataclass(frozen=True)
class Point:
    """One run."""

    task: str
    size: float  # parameters, in ranks of LoRA
    arm: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Data:
    """Token ids (rows, tokens) and labels, -100 where there is no loss."""

    train: tuple[Tensor, Tensor]
    judged: tuple[Tensor, Tensor]  # of the loss that is reported
    passes: int  # over the rows for training


# --- what is run ----------------------------------------------------------------------------------------------------


def todo(
    losses: Mapping[Point, float],
    can: Callable[[str, float], bool],
    places: Sequence[tuple[str, float]] = PLACES,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    most_rates: int = MOST_RATES,
) -> Iterator[Point]:
    """The runs that are not in `losses`, which the caller fills as it goes.

    Args:
        losses: of finished runs; infinite if they diverged.
        can: whether an arm has a shape of a size.
        places: tasks and sizes.
        rates: the first grid, ascending by factors of two.
        seeds: the first one tunes.
        most_rates: where a grid stops to grow.
    """
    for task, size in places:
        best = {}
        for arm in ARMS:
            if not can(arm, size):
                continue
            grid = list(rates)
            while True:
                tuning = [Point(task, size, arm, rate, seeds[0]) for rate in grid]
                yield from (point for point in tuning if point not in losses)
                best[arm] = grid[min(range(len(grid)), key=lambda i: losses[tuning[i]])]
                if grid[0] < best[arm] < grid[-1] or len(grid) >= most_rates:
                    break
                grid = [grid[0] / 2, *grid] if best[arm] == grid[0] else [*grid, grid[-1] * 2]
        for seed in seeds[1:]:
            points = [Point(task, size, arm, rate, seed) for arm, rate in best.items()]
            yield from (point for point in points if point not in losses)


def configuration(arm: str, size: float, base: nn.Module) -> PeftConfig | None:
    """The adapter with as many parameters as a LoRA of rank `size`, or the next fewer; None if there is none."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if arm == LORA:
        rank = int(size)
        return LoraConfig(r=rank, lora_alpha=2 * rank, **common) if rank == size else None
    options = dict(ARMS[arm])
    if "own_r" in options:
        options["own_r"] = int(size) // 2
        if not options["own_r"]:
            return None
    plain = lily.LilyConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    modules = lily.select_modules(base, plain)
    budget = int(size * lora_parameters(modules, 1))

    def total(rank: int) -> int:
        return lily.build_plan(modules, lily.LilyConfig(r=rank, **options, **common)).parameters.total

    one, slope = total(1), total(2) - total(1)  # linear in the rank
    rank = (budget - one + slope) // slope
    return lily.LilyConfig(r=rank, **options, **common) if rank > 0 else None


def pairs(count: int, vocabulary: int, key: int = 6, value: int = 2) -> Data:
    """Random keys with random values, to be known by heart: what an adapter of this size can hold."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 50, vocabulary, (count, key + value), generator=generator)
    labels = ids.clone()
    labels[:, :key] = -100
    return Data((ids, labels), (ids, labels), passes=60)


def texts(ids: Tensor) -> Data:
    """Next tokens of short texts, padded with -1; judged on a tenth that is not trained on."""
    labels = ids.long().masked_fill(ids < 0, -100)
    ids = ids.long().clamp(min=0)
    held = len(ids) // 10
    return Data((ids[held:], labels[held:]), (ids[:held], labels[:held]), passes=4)


# --- a run ----------------------------------------------------------------------------------------------------------


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def train(base: nn.Module, config: PeftConfig, data: Data, point: Point, batch: int) -> dict[str, Any]:
    """One run: linear warm-up over a tenth of the steps, then linearly to zero."""
    device = next(base.parameters()).device
    torch.manual_seed(point.seed)
    model: Any = get_peft_model(sharing_weights(base), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=point.rate, weight_decay=0.0)
    rows = len(data.train[0])
    steps = data.passes * (rows // batch)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    order = torch.Generator().manual_seed(point.seed)
    started, loss = time.perf_counter(), torch.zeros(())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(data.passes):
        shuffled = torch.randperm(rows, generator=order)
        for i in range(rows // batch):
            chosen = shuffled[i * batch : (i + 1) * batch].to(device)
            with autocast(device):
                loss = model(input_ids=data.train[0][chosen], labels=data.train[1][chosen]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if not math.isfinite(loss.item()):
            break
    seconds = time.perf_counter() - started
    final = judged(model, data, batch) if math.isfinite(loss.item()) else math.inf
    return {
        **asdict(point),
        "r": config.r,
        "scaling": 2.0 if point.arm == LORA else config.scaling,
        "parameters": sum(p.numel() for p in trained),
        "loss": final if math.isfinite(final) else None,
        "seconds": round(seconds, 2),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


@torch.no_grad()
def judged(model: nn.Module, data: Data, batch: int) -> float:
    """Mean loss of the tokens that have one."""
    ids, labels = data.judged
    total = count = 0.0
    for start in range(0, len(ids), batch):
        some = slice(start, start + batch)
        tokens = int((labels[some][:, 1:] != -100).sum())
        with autocast(ids.device):
            total += tokens * float(model(input_ids=ids[some], labels=labels[some]).loss)
        count += tokens
    return total / count


def full_batch(base: nn.Module, config: PeftConfig, data: Data, first: int = 64) -> int:
    """The batch that fills the card: doubled until twice as much would not fit, or a pass would have too few steps."""
    device, rows = next(base.parameters()).device, len(data.train[0])
    batch = min(first, max(1, rows // STEPS_A_PASS))
    if device.type != "cuda":
        return batch
    model: Any = get_peft_model(sharing_weights(base), config)
    total = torch.cuda.get_device_properties(device).total_memory

    def step() -> None:
        with autocast(device):
            loss = model(input_ids=data.train[0][:batch], labels=data.train[1][:batch]).loss
        loss.backward()

    while 2 * batch * STEPS_A_PASS <= rows and 2 * measure.peak(step, device) < FULL * total:
        batch *= 2
    return batch


# --- the model and the texts, in pieces that travel -----------------------------------------------------------------


def write_pieces(folder: Path, model: Any, ids: Tensor, piece: int) -> list[Path]:
    """Write the model in bfloat16, in pieces of at most `piece` bytes, and the texts; the manifest comes last."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{WEIGHTS}.*"):
        old.unlink()
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), (name, tensor.to(torch.bfloat16).contiguous()))  # tied ones once
    weights = save(dict(tensors.values()))
    contents = {
        f"{WEIGHTS}.{i:02d}": weights[start : start + piece] for i, start in enumerate(range(0, len(weights), piece))
    }
    contents[TEXTS] = save({"ids": ids.to(torch.int32)})
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    model.config.save_pretrained(folder)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    write_text(folder / MANIFEST, json.dumps(digests, indent=1))
    return [folder / name for name in (*contents, "config.json", MANIFEST)]


def read_pieces(folder: Path) -> tuple[Any, Tensor]:
    """The model in bfloat16, and the ids of the texts.

    Raises:
        LilyError: if a piece is missing or differs from the one that was written.
    """
    from safetensors.torch import load
    from transformers import AutoConfig, AutoModelForCausalLM

    names = [MANIFEST, "config.json"]
    if (folder / MANIFEST).is_file():
        digests = json.loads((folder / MANIFEST).read_text("utf-8"))
        names += digests
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise LilyError(
            f"{folder}: {', '.join(missing)} missing; run `python benchmarks/gpu.py prepare` on a machine that has the "
            "model, and copy every file of this folder"
        )
    contents = {name: (folder / name).read_bytes() for name in digests}
    if changed := [name for name in digests if hashlib.sha256(contents[name]).hexdigest() != digests[name]]:
        raise LilyError(f"{folder}: {', '.join(changed)} not as written; copy again, with the manifest of the same run")
    state = load(b"".join(contents[name] for name in sorted(digests) if name != TEXTS))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    rest, unknown = model.load_state_dict(state, strict=False)
    model.tie_weights()
    now = model.state_dict()
    read = {now[name].data_ptr() for name in state if name in now}
    if lacking := [*unknown, *(name for name in rest if now[name].data_ptr() not in read)]:
        raise LilyError(f"{folder}: {lacking[0]} does not fit this version of transformers; prepare it again")
    return model, load(contents[TEXTS])["ids"]


def prepare(folder: Path, piece: int) -> None:
    """Convert the packaged model and tokenize the quickstart's texts."""
    import yaml

    from lily.recipes import loader
    from lily.recipes.data.rows import load_splits
    from lily.recipes.models.load import load_model, load_tokenizer
    from lily.recipes.spec.schema import Model

    source = Model(**yaml.safe_load((loader.LIBRARY / "_smollm.yaml").read_text("utf-8"))["model"])
    tokenizer: Any = load_tokenizer(source)
    rows = load_splits(loader.load_recipe("quickstart")).train
    tokens = [tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=48).input_ids for row in rows]
    ids = torch.full((len(tokens), max(map(len, tokens))), -1)
    for i, text in enumerate(tokens):
        ids[i, : len(text)] = torch.tensor(text)
    for path in write_pieces(folder, load_model(source, "sft"), ids, piece * 2**20):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


def tiny(folder: Path) -> None:
    """A random model and random texts, written as the real ones are."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=200, tie_word_embeddings=True))
    write_pieces(folder, model, torch.randint(0, 200, (20, 8)), piece=2**15)


# --- the file -------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], tuning: int = 0) -> str:
    """Of each task and size: every arm at its best rate, and in how many seeds it ends below LoRA.

    LoRA is that of the same size, or the smallest one where none is as small.
    """
    lines = []
    for task, size in dict.fromkeys((row["task"], row["size"]) for row in rows):
        here = [row for row in rows if (row["task"], row["size"]) == (task, size)]
        compared = [row for row in here if row["seed"] != tuning]
        of_lora = [row for row in rows if (row["task"], row["arm"], row["size"]) == (task, LORA, max(size, 1.0))]
        lora = {row["seed"]: _loss(row) for row in of_lora if row["seed"] != tuning}
        for arm in dict.fromkeys(row["arm"] for row in compared):
            own = [row for row in compared if row["arm"] == arm]
            grid = sorted(row["rate"] for row in here if row["arm"] == arm and row["seed"] == tuning)
            rate, losses = own[0]["rate"], [_loss(row) for row in own if row["loss"] is not None]
            edge = " (at the edge of the grid)" if rate in (grid[0], grid[-1]) else ""
            paired = [row for row in own if row["seed"] in lora and arm != LORA]
            below = sum(_loss(row) < lora[row["seed"]] for row in paired)
            spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            loss = f"{statistics.mean(losses):.4f}{spread}" if losses else ""
            if len(losses) < len(own):
                loss += f" ({len(own) - len(losses)} of {len(own)} diverged)"
            lines.append(
                [
                    *(task, f"{size:g}", arm, str(own[0]["r"]), f"{own[0]['parameters']:,}", f"{rate:g}{edge}"),
                    *(loss.strip(), f"{below} of {len(paired)}" if paired else ""),
                ]
            )
    return markdown(["task", "size", "arm", "rank", "parameters", "rate", "loss", "seeds below LoRA"], lines)


def _loss(row: Mapping[str, Any]) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


def run(
    base: nn.Module, tasks: Mapping[str, Data], out: Path, seconds: float, again: bool = False, **order: Any
) -> dict[str, Any]:
    """Train what is missing in `out`, until nothing is, or the next run would not end in time.

    Raises:
        LilyError: if the file has rows of other settings or another device.
    """
    deadline, device = time.monotonic() + seconds, next(base.parameters()).device
    config_of = functools.cache(lambda arm, size: configuration(arm, size, base))
    machine = report.machine(device)
    setting: dict[str, Any] = {
        name: {
            "rows": len(data.train[0]),
            "passes": data.passes,
            "parameters": sum(p.numel() for p in base.parameters()),
        }
        for name, data in tasks.items()
    }
    kept = json.loads(out.read_text("utf-8")) if out.is_file() and not again else None
    if kept is None:
        largest = max((size for _, size in order.get("places", PLACES)))
        for name, data in tasks.items():
            setting[name]["batch"] = full_batch(base, config_of(LORA, largest), data)
        kept = {"done": False, "machine": machine, "setting": setting, "rows": []}
    batches = {name: found["batch"] for name, found in kept["setting"].items()}
    same = all({**setting.get(name, {}), "batch": batches[name]} == kept["setting"][name] for name in batches)
    if not same or kept["machine"]["device"] != machine["device"]:
        raise LilyError(f"{out}: has rows of another device or other settings; give another --out, or --again")
    losses = {Point(*(row[f] for f in Point.__dataclass_fields__)): _loss(row) for row in kept["rows"]}
    longest = 0.0
    for point in todo(losses, lambda arm, size: config_of(arm, size) is not None, **order):
        if time.monotonic() + 1.2 * longest > deadline:
            print(f"stopped before {point}: the time is over", flush=True)
            return kept
        started = time.monotonic()
        row = train(base, config_of(point.arm, point.size), tasks[point.task], point, batches[point.task])
        longest = max(longest, time.monotonic() - started)
        losses[point] = _loss(row)
        kept["rows"].append(row)
        write_text(out, json.dumps(kept, indent=1))
        print(f"{point.task} {point.size:g} {point.arm} {point.rate:g} seed {point.seed}: {row['loss']}", flush=True)
    kept["done"] = True
    write_text(out, json.dumps(kept, indent=1))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write the pieces, train nothing")
    parser.add_argument("--model", type=Path, default=PREPARED, help="folder of the pieces")
    parser.add_argument("--piece", type=int, default=PIECE, help="largest piece, MiB")
    parser.add_argument("--out", type=Path, help="JSON file of the runs")
    parser.add_argument("--seconds", type=float, default=3600, help="no run starts that would end later")
    parser.add_argument("--pairs", type=int, default=8192, help="number of key-value pairs")
    parser.add_argument("--again", action="store_true", help="drop the rows that the file has")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, one rate: does it run?")
    o = parser.parse_args()
    if o.prepare:
        prepare(o.model, o.piece)
        return
    if o.out is None:
        parser.error("--out is needed, or --prepare")
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    order: dict[str, Any] = {}
    if o.smoke:
        order = {"places": (("pairs", 2.0), ("texts", 0.5)), "rates": (1e-3,), "seeds": (0, 1), "most_rates": 1}
        with tempfile.TemporaryDirectory() as folder:
            tiny(Path(folder))
            base, ids = read_pieces(Path(folder))
    else:
        base, ids = read_pieces(o.model)
    base = base.to(device).requires_grad_(False).train()
    count = 16 if o.smoke else o.pairs
    found = {"pairs": pairs(count, base.config.vocab_size), "texts": texts(ids)}
    tasks = {
        name: Data(*(tuple(t.to(device) for t in part) for part in (d.train, d.judged)), 1 if o.smoke else d.passes)
        for name, d in found.items()
    }
    done = run(base, tasks, o.out, o.seconds, o.again, **order)
    print(f"\n{table(done['rows'])}", flush=True)


if __name__ == "__main__":
    main()
