"""Which layers of every model type of transformers and diffusers Lily adapts, beside LoRA. Writes and prints a table.

    python benchmarks/model_types.py            # every type, on the meta device; about 10 minutes on one core
    python benchmarks/model_types.py --only qwen3_moe UNet2DConditionModel
    python benchmarks/model_types.py --show     # the table of the committed rows

Models have the default configuration, cut to two layers where it says how many. Each is adapted twice: by `all-linear`,
and by a regular expression that names the layers which LoRA adapts then.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lily  # noqa: F401  before PEFT
from lily import LilyConfig
from lily.layers.bank import LilyBank
from lily.plan.uncalled_layers import uncalled

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "model-types.jsonl"
DEPTHS = {
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth", "num_blocks",
    "num_encoder_layers", "num_decoder_layers", "vision_layers", "num_single_layers", "num_attention_blocks",
}  # fmt: skip
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")
Row = dict[str, Any]


def cut(config: Any) -> Any:
    """The configuration with two layers of each kind, where it can have so few."""
    from transformers import PretrainedConfig

    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > 2:
            with contextlib.suppress(Exception):
                setattr(config, name, 2)
    for name in PER_LAYER:
        if isinstance(listed := getattr(config, name, None), list) and len(listed) > 2:
            with contextlib.suppress(Exception):
                setattr(config, name, listed[:2])
    for inner in list(vars(config).values()):
        if isinstance(inner, PretrainedConfig):
            cut(inner)
    return config


def of_transformers() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Model types that `AutoModel` knows, each with what builds it."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for name, kind in CONFIG_MAPPING.items():
        if name not in MODEL_MAPPING_NAMES:
            continue

        def build(kind: Any = kind) -> nn.Module:
            with torch.device("meta"):
                try:
                    return AutoModel.from_config(cut(kind()))
                except Exception:  # some cannot be cut
                    return AutoModel.from_config(kind())

        yield name, build


def of_diffusers() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Models of diffusers, each with what builds it."""
    import diffusers

    for name in sorted(diffusers._import_structure["models"]):
        kind = getattr(diffusers, name, None)
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
            continue

        def build(kind: Any = kind) -> nn.Module:
            known = inspect.signature(kind.__init__).parameters
            few = {n: 2 for n in DEPTHS & known.keys() if isinstance(known[n].default, int) and known[n].default > 2}
            with torch.device("meta"):
                return kind(**few)

        yield name, build


def adapted(model: nn.Module, config: Any) -> list[str] | str:
    """Names of the modules with an adapter, or the error."""
    model = copy.deepcopy(model)
    try:
        get_peft_model(model, config)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    layers = (n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, LilyBank))
    return sorted({name.replace(".base_layer", "") for name in layers})


def compare(model: nn.Module) -> Row:
    """What LoRA and Lily adapt of a model: numbers of layers or an error, and why Lily leaves out what it does."""
    row: Row = {}
    unread = uncalled(dict(model.named_modules()))
    targets = "all-linear"
    for how in ("all-linear", "expression"):
        lora = adapted(model, LoraConfig(r=2, target_modules=targets))
        ours = adapted(model, LilyConfig(r=2, num_A=1, num_B=1, target_modules=targets))
        row[how] = {"lora": len(lora) if isinstance(lora, list) else lora,
                    "lily": len(ours) if isinstance(ours, list) else ours}  # fmt: skip
        if isinstance(lora, str):
            break
        missing = sorted(set(lora) - set(ours)) if isinstance(ours, list) else []
        known = {f"{unread[name].parent} reads the weight {unread[name].why}" for name in missing if name in unread}
        if missing:
            row[how]["left out"] = sorted(known) if all(name in unread for name in missing) else missing
        others = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is not nn.Linear}
        names = {name.rpartition(".")[2] for name in lora if name not in unread} - others
        if not names:
            break
        targets = rf"(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"
    return row


def rows(only: list[str] | None = None) -> Iterator[Row]:
    """A row for each model type."""
    for library, models in (("transformers", of_transformers()), ("diffusers", of_diffusers())):
        for name, build in models:
            if only and name not in only:
                continue
            row = {"library": library, "type": name}
            try:
                model = build()
                copy.deepcopy(model)  # each method gets one
            except Exception as error:
                yield row | {"not built": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
                continue
            yield row | compare(model)


def stored(path: Path = ROWS) -> list[Row]:
    """The committed rows."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def verdict(row: Row, how: str) -> str:
    """How Lily compares with LoRA on a model type."""
    if "not built" in row:
        return "not built by its default configuration"
    if how not in row:
        return "not asked"
    lora, ours = row[how]["lora"], row[how]["lily"]
    if isinstance(lora, str):
        return "refused by both" if isinstance(ours, str) else "refused by LoRA alone"
    if isinstance(ours, str):
        return "refused by Lily alone"
    return "as many layers" if ours == lora else "more layers" if ours > lora else "fewer layers"


def table(found: list[Row]) -> str:
    """Numbers of types by verdict, and every type of which Lily adapts fewer layers, with the reason."""
    ways = ("all-linear", "expression")
    counts = {how: Counter(verdict(row, how) for row in found) for how in ways}
    verdicts = list(dict.fromkeys(v for how in ways for v, _ in counts[how].most_common()))
    lines = ["| Lily beside LoRA | `all-linear` | a regular expression |", "| --- | --- | --- |"]
    lines += [f"| {v} | {counts['all-linear'][v]} | {counts['expression'][v]} |" for v in verdicts]
    lines += ["", "| type | LoRA | Lily | left out, because |", "| --- | --- | --- | --- |"]
    for row in found:
        for how in ways:
            if verdict(row, how) in ("fewer layers", "refused by Lily alone"):
                one = row[how]
                lines.append(
                    f"| {row['type']} | {one['lora']} | {one['lily']} | {'; '.join(one.get('left out', []))} |"
                )
    return "\n".join(lines)


def command(
    about: str, path: Path, rows: Callable[[list[str] | None], Iterator[Row]], table: Callable[[list[Row]], str]
) -> None:
    """Command line of a script that makes rows of model types, keeps them in a file and prints a table of them."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="model types, or classes of diffusers; writes nothing")
    parser.add_argument("--show", action="store_true", help="print the table of the committed rows")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    found = stored(path) if given.show else []
    for row in () if given.show else rows(given.only):
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    if not (given.show or given.only):
        path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    command(__doc__ or "", ROWS, rows, table)
