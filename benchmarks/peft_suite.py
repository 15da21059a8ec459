"""PEFT's own tests with Lily in LoRA's place, and beside LoRA and the other methods. Writes and prints a table.

    git clone https://github.com/huggingface/peft
    pip install parameterized attrs                         # which PEFT's tests import
    python benchmarks/peft_suite.py --tests peft/tests      # goes on where it stopped; half an hour on one free core
    python benchmarks/peft_suite.py                         # the table of the committed figures

All files run four times, each time in one process: `plain`, PEFT alone; `beside`, the same after `import lily`, which
must change nothing for any method; and with every `peft.LoraConfig` a `LilyConfig`, by `default` and with `static`
routing. Of these two, tests count that make a configuration of LoRA and pass with LoRA. Every failure has a reason in
`REASONS`; one without is printed. Of the 18,413 tests of `test_custom_models.py` one of twelve runs (`--every 1`: all),
and only of LoRA, AdaLoRA, IA3 and VeRA. Instead of the hub's models the tests get those of `peft_suite_models.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft_suite_models

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "peft-suite.json"
PAGE = ROOT / "docs" / "compatibility.md"
FILES = (
    "config", "loraplus", "lorafa", "mapping", "low_level_api", "trainable_tokens", "mixed", "other",
    "target_parameters", "tuners_utils", "initialization", "lora_conversion", "lora_intruders", "lora_variants",
    "auto", "integrations", "vera", "shira", "custom_models", "adaption_prompt", "torch_compile",
)  # fmt: skip
OURS = ("default", "static")
WAYS = ("plain", "beside", *OURS)

NAMES = "the test reads LoRA's own names (`lora_A`, `lora_alpha`, `LoraModel`)"
BANK = "the bank is a layer of the tuner, and no layer of the model"
VARIANTS = "variants and starts of LoRA (DoRA, KaSA, PiSSA, a bias of B) are refused, with what Lily has instead"
WORDS = "the same is refused in other words"
# A test's name, its error, and why it is so; the first that fits counts.
REASONS: list[tuple[str, str, str]] = [
    (r"test_config\.py.*\[LoraConfig-", "", "the test compares names and files of the configuration's class"),
    (r"\[LilyConfig-", "", "`peft.LilyConfig` is read as this package's configuration, which has more options"),
    ("", r"LilyConfig has no |'fan_in_fan_out'|_get_kasa_loss", VARIANTS),
    ("", "not using LoRA", "PEFT's `reduce_intruder_dimension` is for LoRA; Lily's is in `lily.export`"),
    ("qwen3_moe.*regex", "== {", "a regular expression stays in the configuration as it was written"),
    ("add_lora_to_mixtral", "0 == 12", NAMES),
    ("TestEva", "DID NOT WARN", VARIANTS),
    ("", "safe_serialization=False", "pickles are refused: they can run code, and are never loaded"),
    ("", r"create_lorafa_optimizer is for LoRA", "LoRA-FA is refused: a B of Lily is used with several A"),
    ("test_lora_plus_helper", "6e-05 == 5e-05", "routers and static weights have a group of their own, at A's rate"),
    ("repeated_invocation", "NoTargetError", "a second `get_peft_model` adapts the base model, not the wrapper"),
    ("irregular_state", "DID NOT WARN", BANK),
    ("in_features_out_features_exposed", "", BANK),
    ("", "LilyBank", BANK),
    ("", "does not belong to a Lily adapter of this configuration",
     "tensors that the configuration does not train are refused"),
    ("", "NotStaticError|not static|data-dependent|depends on the data", "merging and exporting need static routing"),
    ("", "but its layers share B", "layers that share B have one rank"),
    ("", "rank_pattern has the key", "a key of `rank_pattern` that matches no layer is refused"),
    ("", "target_modules is empty", "an empty `target_modules` is refused"),
    ("test_valid_target_.*_warns", "DID NOT WARN", "targets that match nothing are refused, where LoRA warns"),
    ("", "Regex pattern did not match", WORDS),
    ("test_from_pretrained_config_construction", "", "a configuration that is used again is copied"),
    ("target_parameters_raises", "DID NOT RAISE", "works, where LoRA refuses it or warns"),
    ("test_weighted_combination", "DID NOT RAISE", "works, where LoRA refuses it or warns"),
    ("extra_keys_warning", "the state_dict has tensors for", WORDS),
    ("test_decoder_model", "assert not True", "the update of the test is too small to change generated tokens"),
    ("test_converted_lora_to_lora", "DID NOT WARN", "works, where LoRA refuses it or warns"),
    ("", "cannot tie adapters", "`ensure_weight_tying` does not tie adapters (`target_modules`)"),
    ("model_config_tie_false", "", "weights that are one parameter are tied, whatever the model's configuration says"),
    ("", "cannot be padded for compiled code", "no compiled hot-swapping on convolutions with groups"),
    ("compiled_hotswap_scalings", "", "preparing for compiled hot-swapping leaves scales and the configuration alone"),
    ("already_compiled_warns", "", WORDS),
    ("test_(nb_params|model_with_injected_layers)", "assert [0-9]+ == [0-9]+", "another number of parameters"),
    ("", "_register_custom_module", "LoRA's registration of layer classes of one's own"),
    ("", "has a parametrization", "a parameter that has a parametrization is refused"),
    ("different_ranks_alphas", "one of the same layers", "an adapter is hot-swapped only with one of the same layers"),
    ("reuses_param_wrapper|classifier_head|test_mha_|missing_keys_warning", "", NAMES),
    ("", r"'lora' in|lora_|[Ll]ora(Layer|Model)|LORA|lora\.|ParamWrapper|alpha_pattern|Extra items", NAMES),
    ("", "not found in the base|already marked to be|modules_to_save matches|"
     "would also be adapted|is not known; choose|is not a list of names", WORDS),
]  # fmt: skip

Outcomes = dict[str, dict[str, Any]]  # test -> outcome, error, and whether it made a configuration of Lily's


def run(tests: Path, files: list[str], way: str, out: Path, cache: Path, every: int) -> None:
    """Run the tests of which `out` has no outcome. A test that ends the process is in it too."""
    files = [f"test_{name}.py" for name in files]
    command = [sys.executable, "-m", "pytest", *files, "-q",
               "-o", "addopts=", "-o", "filterwarnings=", "-p", "peft_suite_plugin",
               "-p", "no:cacheprovider", "-p", "no:randomly",
               "--continue-on-collection-errors"]  # fmt: skip
    environment = {
        **os.environ, "PEFT_SUITE_AS": way, "PEFT_SUITE_OUT": str(out), "PEFT_SUITE_EVERY": str(every),
        "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src"), str(tests.parent)]),
    }  # fmt: skip
    while subprocess.run(command, cwd=tests, env=environment, check=False).returncode < 0:
        print(f"{way}: a test ended the process; going on after it", file=sys.stderr)


def read(out: Path) -> dict[str, Outcomes]:
    """File of tests -> its outcomes; the worst of a test's phases."""
    found: dict[str, Outcomes] = {}
    for line in out.read_text("utf-8").splitlines() if out.exists() else ():
        row = json.loads(line)
        name = re.sub(r"^(.*/)?test_(\w+)\.py$", r"\2", row["test"].partition("::")[0])
        of_file = found.setdefault(name, {})
        before = of_file.get(row["test"], {"outcome": "started"})["outcome"]
        if before == "started" or row["outcome"] == "failed":
            of_file[row["test"]] = row
    return found


def reason(test: str, error: str) -> str | None:
    """Why a test that LoRA passes fails with Lily, or None if no reason is known."""
    return next((why for name, text, why in REASONS if re.search(name, test) and re.search(text, error, re.S)), None)


def summary(folder: Path) -> dict[str, Any]:
    """The figures of all files, from the outcomes in a folder."""
    outcomes = {way: read(folder / f"{way}.jsonl") for way in WAYS}
    files: dict[str, Any] = {}
    why: dict[str, Counter[str]] = {way: Counter() for way in OURS}
    differ, unknown = [], []
    for name in FILES:
        plain = outcomes["plain"].get(name, {})
        passed = {test for test, row in plain.items() if row["outcome"] == "passed"}
        if not passed:
            continue
        beside = outcomes["beside"].get(name, {})
        differ += sorted(t for t in plain if t in beside and beside[t]["outcome"] != plain[t]["outcome"])
        files[name] = {"plain": len(passed), "beside": None}
        if beside:
            files[name]["beside"] = sum(row["outcome"] == "passed" for row in beside.values())
        for way in OURS:
            mine = {t: row for t, row in outcomes[way].get(name, {}).items() if t in passed}
            found = {t: row for t, row in mine.items() if row["lily"] or row["outcome"] == "started"}
            failed = {test: row["error"] for test, row in found.items() if row["outcome"] in ("failed", "started")}
            files[name][way] = {
                "passed": sum(row["outcome"] == "passed" for row in found.values()), "failed": len(failed),
            }  # fmt: skip
            for test, error in failed.items():
                if (known := reason(test, error)) is None:
                    unknown.append({"as": way, "test": test, "error": error})
                else:
                    why[way][known] += 1
    return {
        "files": files, "differ": differ, "unknown": unknown,
        "reasons": {way: dict(why[way].most_common()) for way in OURS},
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| tests | PEFT alone | after `import lily` | Lily, default | Lily, static |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = Counter[str]()
    for name, row in found["files"].items():
        cells = [_share(row[way]["passed"], row[way]["failed"]) for way in OURS]
        beside = "-" if row["beside"] is None else f"{row['beside']:,}"
        lines.append(f"| `test_{name}.py` | {row['plain']:,} | {beside} | {cells[0]} | {cells[1]} |")
        total.update({"plain": row["plain"], "beside": row["beside"] or 0})
        for way in OURS:
            total.update({way: row[way]["passed"], f"{way} failed": row[way]["failed"]})
    cells = [_share(total[way], total[f"{way} failed"]) for way in OURS]
    lines += [f"| all | {total['plain']:,} | {total['beside']:,} | {cells[0]} | {cells[1]} |", ""]
    lines += ["| why Lily does not pass it | default | static |", "| --- | --- | --- |"]
    reasons = found["reasons"]
    for why in dict.fromkeys([*reasons["default"], *reasons["static"]]):
        lines.append(f"| {why} | {reasons['default'].get(why, 0)} | {reasons['static'].get(why, 0)} |")
    names = Counter(name.partition("::")[2].partition("[")[0] for name in found["differ"])
    listed = ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in names.items())
    lines += ["", f"Tests whose outcome `import lily` changes: {listed or 'none'}."]
    return "\n".join(lines)


def _share(passed: int, failed: int) -> str:
    return f"{passed:,} of {passed + failed:,}" if passed + failed else "-"


def write(found: str) -> None:
    """Put the table into the page."""
    begin, end = "<!-- figures: peft-suite -->", "<!-- end -->"
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    PAGE.write_text(f"{before}{begin}\n{found}\n{end}{rest.partition(end)[2]}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="the folder tests/ of a checkout of PEFT")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peft-suite", help="outcomes of single tests")
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES)
    parser.add_argument("--as", dest="ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--every", type=int, default=12, help="of test_custom_models.py, run one test in this number")
    given = parser.parse_args()
    if given.tests is not None:
        out = given.out.resolve()
        peft_suite_models.make(out / "hub")
        for way in given.ways:
            run(given.tests.resolve(), given.files, way, out / f"{way}.jsonl", out / "hub", given.every)
        found = summary(out)
        for row in found["unknown"]:
            print(f"no reason: {row['as']} {row['test']}\n    {row['error'][:300]}", file=sys.stderr)
        FIGURES.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        write(table(found))
    print(table(json.loads(FIGURES.read_text("utf-8"))))


if __name__ == "__main__":
    main()
