"""What of LoRA works with Lily: every cell of the table is a test. Runs them, and writes the table into the docs.

    python benchmarks/compatibility.py            # runs the tests of all cells (minutes), writes docs/compatibility.md
    python benchmarks/compatibility.py --only TRL # those of some rows, again
    python benchmarks/compatibility.py --show     # the table of the committed outcomes

A cell names tests by a part of their names, as pytest's node ids have them, or says why something is refused. It counts
if there are such tests and all of them pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTCOMES = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
COLUMNS = ("default", "static")


@dataclass(frozen=True)
class Cell:
    """Tests, by file and function and a part of the parameters; or the reason why it is refused."""

    test: str
    having: str = ""
    refused: str = ""

    def selects(self, node: str) -> bool:
        """Whether a test's node id is one of the cell's."""
        name, _, parameters = node.partition("[")
        return name == f"tests/{self.test}" and re.search(self.having, parameters.removesuffix("]")) is not None


def both(test: str, having: str = "") -> tuple[Cell, Cell]:
    """The same tests for both columns, which have both routings in them."""
    return Cell(test, having), Cell(test, having)


def each(test: str, default: str, static: str = "static") -> tuple[Cell, Cell]:
    """A test with parameters for each column."""
    return Cell(test, default), Cell(test, static)


def only_static(test: str, having: str, refusal: str, why: str) -> tuple[Cell, Cell]:
    """Works where the routing is static; `refusal` is the test that a dynamic adapter is refused."""
    return Cell(refusal, refused=why), Cell(test, having)


STATIC = "static alone: `lily collapse` or `settle` first"
ROUTED = "token|sequence"
MODEL, FILES, SEVERAL = "tuner/test_model.py", "checkpoint/test_beside.py", "tuner/test_second_adapters.py"
LIFE = "tuner/test_life_cycle.py::test_an_operation_on_two_adapters_is_what_it_is_for_lora"
WEIGHTED, SWAP = "tuner/test_weighted_adapters.py", "tuner/test_hotswap.py"
CONV, EXPERTS, DIFFUSERS = "layers/test_conv_embedding.py", "layers/test_parameter.py", "test_diffusers.py"
NOT_WRITTEN = "deploy/test_export.py::test_a_dynamic_adapter_is_refused_and_nothing_is_written"
ROWS: dict[str, dict[str, tuple[Cell, Cell]]] = {
    "Training and files": {
        "an untrained adapter changes nothing": each(
            f"{MODEL}::test_an_untrained_adapter_leaves_the_output_bit_identical", ROUTED
        ),
        "save and load": each(f"{MODEL}::test_saving_and_loading_gives_the_same_output", ROUTED),
        "`disable_adapter`": each(
            f"{MODEL}::test_a_trained_adapter_changes_the_output_and_disabling_restores_it", ROUTED
        ),
        "gradient checkpointing": each(f"{MODEL}::test_gradient_checkpointing_gives_the_same_gradients", ROUTED),
        "half-precision bases": each(f"{MODEL}::test_a_half_precision_base_carries_a_float32_adapter", ROUTED),
        "`inject_adapter_in_model`": each(f"{MODEL}::test_a_plain_module_takes_an_injected_adapter", ROUTED),
        "`modules_to_save`, trained rows, biases, tied weights": both(
            f"{FILES}::test_what_lora_can_do_with_it_lily_can"
        ),
        "LoRA+ (`create_loraplus_optimizer`)": each(
            "test_optim.py::test_pefts_function_for_loraplus_is_right_for_lily", "token"
        ),
        "quantized bases (bitsandbytes, torchao)": each(
            "layers/test_quantized.py::test_a_quantized_base_trains_saves_and_loads", ROUTED
        ),
    },
    "Several adapters": {
        "each gives what it gives alone": each(
            f"{SEVERAL}::test_each_of_several_adapters_gives_what_it_gives_alone", "-(token|sequence)$", "one B"
        ),
        "every operation beside LoRA's": (
            Cell(f"{SEVERAL}::test_adapters_of_different_layers_and_sharing_act_alone_and_together"),
            Cell(LIFE, "^linear-"),
        ),
        "without its last adapter a model is the base": (
            Cell("tuner/test_removal.py::test_a_model_without_its_last_adapter_is_the_base", "-layers$"),
            Cell("tuner/test_removal.py::test_a_model_without_its_last_adapter_is_the_base", "-static$"),
        ),
        "`adapter_names`: rows of one batch": each(
            "layers/test_mixed_batch.py::test_each_row_is_as_with_its_adapter_alone", ROUTED
        ),
        "hot-swapping": each(
            f"{SWAP}::test_an_adapter_with_other_options_takes_the_place", "^(token|shared router)$", "rank|scale|one A"
        ),
        "hot-swapping without recompilation": each(
            f"{SWAP}::test_a_compiled_model_is_not_compiled_again", "^token-eager$", "^every kind-eager$"
        ),
        "`add_weighted_adapter`: `cat`": (
            Cell(f"{WEIGHTED}::test_cat_of_routed_adapters_is_exact"),
            Cell(f"{WEIGHTED}::test_cat_is_the_exact_sum_and_keeps_the_sharing"),
        ),
        "`add_weighted_adapter`: other kinds": only_static(
            f"{WEIGHTED}::test_every_kind_gives_what_lora_gives",
            "",
            f"{WEIGHTED}::test_what_cannot_be_combined_is_refused_and_changes_nothing",
            STATIC,
        ),
        "beside LoRA or LoHa (`mixed=True`)": both(
            "tuner/test_mixed_models.py::test_two_methods_add_up_whichever_comes_first", "lily"
        ),
        "scales": each("layers/test_scales.py::test_scales_multiply_and_are_restored", ROUTED),
    },
    "Kinds of layers": {
        "convolutions": each(f"{CONV}::test_a_convolution_is_the_formula_with_a_kernel_for_a", ROUTED),
        "embeddings": each(f"{CONV}::test_an_embedding_is_the_formula_with_a_column_of_a_for_each_row", ROUTED),
        "`nn.MultiheadAttention`": each(
            "layers/test_attention.py::test_it_is_torchs_function_of_adapted_projections", ROUTED
        ),
        "stacked experts and matrices (`target_parameters`)": only_static(
            f"{EXPERTS}::test_a_mixture_trains_saves_loads_merges_and_exports",
            "",
            f"{EXPERTS}::test_a_dynamic_routing_is_refused_before_anything_is_touched",
            "the update must be a matrix; `static` is the default there",
        ),
    },
    "Away from training": {
        "merge and unmerge, bit by bit": only_static(LIFE, "^linear-.*merge", NOT_WRITTEN, STATIC),
        "export to a plain LoRA, read without this package": only_static(
            "deploy/test_export.py::test_a_process_without_this_package_computes_the_same",
            "static",
            NOT_WRITTEN,
            STATIC,
        ),
        "llama.cpp (GGUF)": only_static(
            "deploy/test_gguf.py::test_llama_cpp_computes_what_transformers_computes", "", NOT_WRITTEN, STATIC
        ),
        "mixtures for SGLang and vLLM (`--experts shared`; read back by a test)": only_static(
            "deploy/test_shared_experts.py::test_each_expert_gets_its_update", "", NOT_WRITTEN, STATIC
        ),
        "`torch.export`, ONNX, TorchScript": both(
            "layers/test_traced.py::test_a_program_gives_the_models_outputs_for_other_sizes_and_masks_where_the_package_"
            "is_not",
            "^every routing",
        ),
        "`torch.compile`": each(
            "layers/test_layer.py::test_a_compiled_block_has_no_graph_break_and_equals_the_eager_one", ROUTED
        ),
    },
    "Clients": {
        "transformers: its own adapter methods": both(f"{MODEL}::test_transformers_own_adapter_methods_work"),
        "sentence-transformers": each(
            "test_sentence_transformers.py::test_a_text_has_the_same_embedding_alone_and_in_a_batch", "None|sequence"
        ),
        "diffusers": only_static(
            f"{DIFFUSERS}::test_a_pipeline_loads_the_export_and_computes_the_same",
            "",
            f"{DIFFUSERS}::test_a_dynamic_adapter_is_refused_with_what_to_do_and_warned_of_before_training",
            f"{STATIC}; saving is refused, training is not",
        ),
        "TRL: DPO, GRPO, KTO, RLOO, with the policy's copy as reference": each(
            "tuner/test_references.py::test_the_first_difference_to_the_reference_is_exactly_zero", ROUTED
        ),
        "TRL: adapter-only weight synchronization": only_static(
            "deploy/test_trl_sync.py::test_each_synchronization_publishes_the_policy_as_it_is",
            "",
            "deploy/test_trl_sync.py::test_a_server_or_adapter_that_cannot_is_told_so_as_for_lora",
            STATIC,
        ),
        "accelerate: DDP and FSDP": both("test_distributed.py::test_two_processes_train_and_save_what_one_does"),
    },
}


def cells() -> Iterator[tuple[str, str, Cell]]:
    """(feature, column, cell) of the whole table."""
    for rows in ROWS.values():
        for feature, pair in rows.items():
            yield from ((feature, column, cell) for column, cell in zip(COLUMNS, pair, strict=True))


def run(only: str) -> dict[str, dict[str, int]]:
    """Run the tests of the rows that have `only` in their names; row and column -> tests that passed and did not."""
    asked = [one for one in cells() if only in one[0]]
    wanted = sorted({f"tests/{cell.test}" for _, _, cell in asked})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header", "-m", "not network", *wanted],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "1000"},
    )  # fmt: skip
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+::.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    outcomes: dict[str, dict[str, int]] = {}
    for feature, column, cell in asked:
        mine = [outcome for outcome, node in found if cell.selects(node)]
        outcomes[f"{feature} | {column}"] = {"passed": mine.count("PASSED"), "other": len(mine) - mine.count("PASSED")}
    return outcomes


def table(outcomes: dict[str, dict[str, int]]) -> str:
    """The outcomes as Markdown."""
    lines = []
    for group, rows in ROWS.items():
        lines += [f"| **{group}** | default routing | `routing=\"static\"` |" if lines else
                  f"| {group} | default routing | `routing=\"static\"` |"]  # fmt: skip
        lines += ["| --- | --- | --- |"] if len(lines) == 1 else []
        for feature, pair in rows.items():
            shown = [_shown(cell, outcomes[f"{feature} | {c}"]) for c, cell in zip(COLUMNS, pair, strict=True)]
            lines.append(f"| {feature} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _shown(cell: Cell, outcome: dict[str, int]) -> str:
    if outcome["other"] or not outcome["passed"]:
        return f"**no**: {outcome['other']} of {outcome['passed'] + outcome['other']} tests fail"
    tests = "1 test" if outcome["passed"] == 1 else f"{outcome['passed']} tests"
    return f"refused ({tests}); {cell.refused}" if cell.refused else f"yes ({tests})"


def write(found: str) -> None:
    """Put the table into the page."""
    begin, end = "<!-- figures: compatibility -->", "<!-- end -->"
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    PAGE.write_text(f"{before}{begin}\n{found}\n{end}{rest.partition(end)[2]}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of the committed outcomes")
    parser.add_argument("--only", default="", help="run the rows with this text in their names, and keep the others")
    given = parser.parse_args()
    if not given.show:
        kept = json.loads(OUTCOMES.read_text("utf-8")) if given.only else {}
        outcomes = kept | run(given.only)
        OUTCOMES.write_text(json.dumps(outcomes, indent=1) + "\n", "utf-8")
        write(table(outcomes))
    print(table(json.loads(OUTCOMES.read_text("utf-8"))))


if __name__ == "__main__":
    main()
