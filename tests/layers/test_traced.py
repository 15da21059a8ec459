"""Exported programs: `torch.export`, ONNX and TorchScript of adapted models, run in a process without this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from every_kind import KINDS, WIDTH, EveryConfig, EveryKind
from helpers import randomise
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.export import Dim
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from without_lily import Runner

import lily
from lily.kernels import matmul
from lily.layers.mask_forms import attended
from lily.layers.traced import exporting

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs the packages onnx, onnxscript and onnxruntime")

# Everything that can have a dynamic routing; `parameter` and `experts` are static.
DYNAMIC = {
    "target_modules": ["linear", "conv", "embed"],
    "parallel_modules": ["side"],
    "target_slices": KINDS["slice"][0]["target_slices"],
}
STATIC = {**DYNAMIC, "target_parameters": ["own.matrix", "own.up", "own.down"]}


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(autouse=True)
def every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of CPUs on which this package has separate operators."""
    monkeypatch.setattr(matmul, "ONEDNN", True)


class Program(nn.Module):
    """A model with tensors as arguments and result. The mask is an input that the base model may not use."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__()
        self.model, self.options = model, options
        self.train(model.training)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)
        return found if isinstance(found, Tensor) else found[0]


def call(batch: int, tokens: int, *lengths: int) -> tuple[Tensor, Tensor]:
    """Ids, and a mask that covers the first tokens of each row."""
    ids = torch.randint(13, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    return ids, (torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)).long()


def example() -> tuple[Tensor, Tensor]:
    """New tensors for each export, which marks the sizes of those that it is given."""
    return call(2, 5, 5, 3)


# The same shape with another mask; more and fewer rows and tokens; one row; one token.
CALLS = [example(), call(2, 5, 2, 5), call(4, 9, 9, 1, 4, 8), call(1, 3, 2), call(3, 1, 1, 1, 1)]


def write(program: nn.Module, kind: str, folder: Path, strict: bool = False) -> Path:
    """The program as a file, with batch and tokens dynamic."""
    path = folder / f"program.{kind}"
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) * 2
    if kind == "ts":
        torch.jit.trace(program, example(), check_trace=False).save(path)
    elif kind == "onnx":
        torch.onnx.export(program, example(), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    else:
        exported = torch.export.export(program, example(), dynamic_shapes=shapes, strict=strict)
        torch.export.save(exported, path)
    return path


def compare(program: nn.Module, kind: str, folder: Path, elsewhere: Runner, **options: bool) -> list[Tensor]:
    """Write a program, run it elsewhere and compare with the model here; returns the outputs."""
    with torch.no_grad():
        expected = [program(*one) for one in CALLS]
    found = elsewhere.outputs(write(program, kind, folder, **options), CALLS)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    return found


def every_kind(config: object) -> nn.Module:
    torch.manual_seed(0)
    model = EveryKind(EveryConfig())
    model.blocks = model.blocks[:1]
    return randomise(get_peft_model(model, config), scale=0.2).eval()


def of_every_kind(routing: str) -> lily.LilyConfig:
    kinds = STATIC if routing in ("static", "uniform") else DYNAMIC
    return lily.LilyConfig(r=3, num_A=1, num_B=2, routing=routing, gain="ones", own_r=1, **kinds)


def of_a_sequence(*targets: str) -> lily.LilyConfig:
    return lily.LilyConfig(r=3, num_A=1, num_B=2, routing="sequence", target_modules=list(targets))


def of_lora() -> LoraConfig:
    return LoraConfig(r=3, target_modules=["linear", "conv", "embed"], init_lora_weights=False)


def of_every_routing() -> nn.Module:
    """An adapter of each routing, which act together: all kinds of layers by sequence, since kinds look up masks."""
    model = every_kind(of_every_kind("sequence"))
    for routing in ("token", "batch", "uniform"):
        model.add_adapter(routing, lily.LilyConfig(r=3, num_B=2, routing=routing, target_modules=["linear"]))
    parameters = ["own.matrix", "own.up", "own.down"]
    static = lily.LilyConfig(r=3, num_B=2, routing="static", target_modules=["head"], target_parameters=parameters)
    model.add_adapter("static", static)
    model.base_model.set_adapter(["default", "token", "batch", "uniform", "static"])
    return randomise(model, scale=0.1).eval()


ROUTINGS = ["token", "sequence", "batch", "static", "uniform"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lambda: every_kind(of_lora()),
    "every routing": of_every_routing,
    "a sequence": lambda: every_kind(of_a_sequence("linear", "embed")),
    **{r: (lambda r=r: every_kind(of_every_kind(r))) for r in ROUTINGS},
}
# Seconds each. What finds out which routing fails is slow, and so is ONNX of more than two layers.
FAST = [("every routing", "pt2"), ("a sequence", "onnx")]
CASES = [
    pytest.param(model, kind, marks=[needs_onnx] * (kind == "onnx") + [pytest.mark.slow] * ((model, kind) not in FAST))
    for model in MODELS
    for kind in ("pt2", "ts", "onnx")
]


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_a_program_gives_the_models_outputs_for_other_sizes_and_masks_where_the_package_is_not(
    model, kind, tmp_path, elsewhere
):
    compare(Program(MODELS[model]()), kind, tmp_path, elsewhere)


def test_the_mask_is_an_input_of_the_program(tmp_path, elsewhere):
    ids, mask = example()
    program = Program(every_kind(of_a_sequence("linear")))
    path = write(program, "pt2", tmp_path)
    padded = torch.cat((ids, ids), 1), torch.cat((mask, torch.zeros_like(mask)), 1)
    nothing = ids, torch.ones_like(mask)
    own, longer, unmasked = elsewhere.outputs(path, [(ids, mask), padded, nothing])
    with torch.no_grad():
        torch.testing.assert_close(longer, program(*padded), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(own[1], unmasked[1], atol=1e-3)


def tiny(kind: str, config: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "bert":
        model: nn.Module = BertModel(BertConfig(vocab_size=13, **sizes), add_pooling_layer=False)
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=13, num_key_value_heads=1, use_cache=False, **sizes))
    return randomise(get_peft_model(model, config), scale=0.4).eval()


TARGETS = {"bert": ["query", "output.dense"], "llama": ["q_proj", "down_proj"]}
OF = {
    "LoRA": lambda targets: LoraConfig(r=3, target_modules=targets, init_lora_weights=False),
    "Lily": lambda targets: of_a_sequence(*targets),
}


slow = pytest.mark.slow


QUICK = [("bert", "Lily", "ts")]
BASES = [
    pytest.param(
        base,
        method,
        kind,
        marks=[needs_onnx] * (kind == "onnx") + [slow] * ((base, method, kind) not in QUICK),
    )
    for base in TARGETS
    for method in OF
    for kind in ("pt2", "ts", "onnx")
]


@pytest.mark.parametrize(("base", "method", "kind"), BASES)
def test_models_of_transformers_are_exported_as_with_lora(base, method, kind, tmp_path, elsewhere):
    compare(Program(tiny(base, OF[method](TARGETS[base]))), kind, tmp_path, elsewhere)


class Attended(nn.Module):
    def forward(self, mask: Tensor) -> Tensor:
        return attended(mask)


@needs_onnx
def test_onnx_runtime_reads_masks_that_are_added_to_the_scores(tmp_path):
    import onnxruntime

    mask = torch.zeros(2, 1, 3, 3).masked_fill(torch.tensor([False, False, True]), torch.finfo(torch.float32).min)
    torch.onnx.export(Attended(), (mask,), tmp_path / "program.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "program.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: mask.numpy()})
    assert found.tolist() == [[True, True, False]] * 2


@slow
def test_a_strict_export_is_the_same(tmp_path, elsewhere):
    compare(Program(every_kind(of_a_sequence("linear", "embed"))), "pt2", tmp_path, elsewhere, strict=True)


STATES = ["both", "the first of two", "the second of two", "switched off"]


@pytest.mark.parametrize("state", ["merged", *(pytest.param(state, marks=slow) for state in STATES)])
def test_a_program_has_the_adapters_that_act(state, tmp_path, elsewhere):
    kinds = {"target_modules": ["linear", "embed"], "target_parameters": ["own.up"]}
    model = every_kind(lily.LilyConfig(r=3, num_A=1, num_B=2, routing="static", **kinds))
    model.add_adapter("second", lily.LilyConfig(r=2, num_A=1, num_B=2, routing="sequence", target_modules=["linear"]))
    randomise(model, scale=0.2, seed=5)
    if state == "the second of two":
        model.set_adapter("second")
    elif state == "both":
        model.base_model.set_adapter(["default", "second"])
    elif state == "merged":
        model.merge_adapter(["default"])
    elif state == "switched off":
        model.base_model.disable_adapter_layers()
    compare(Program(model), "pt2", tmp_path, elsewhere)


class Crossed(nn.Module):
    """A layer that reads another sequence, which has its own mask."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self, x: Tensor, attention_mask: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        return self.own(x) + self.other(encoder_hidden_states).sum(1, keepdim=True)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=slow)])
def test_a_layer_that_reads_another_sequence_has_the_mask_of_that(strict):
    torch.manual_seed(0)
    config = lily.LilyConfig(r=3, num_A=1, num_B=2, routing="sequence", target_modules=["own", "other"])
    model = randomise(get_peft_model(Crossed(), config)).eval().base_model.model
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    # Of the same sizes: their shapes do not say which mask belongs to which sequence.
    first = torch.randn(2, 4, WIDTH), mask, torch.randn(2, 4, WIDTH), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) * 4
    program = torch.export.export(model, first, dynamic_shapes=shapes, strict=strict).module()
    ones = torch.ones(3, 6, dtype=torch.long)
    other = torch.randn(3, 6, WIDTH), ones, torch.randn(3, 6, WIDTH), ones.tril()
    for one in (first, other):
        with torch.no_grad():
            torch.testing.assert_close(program(*one), model(*one))


def test_rows_with_different_adapters_are_for_one_number_of_rows():
    config = lily.LilyConfig(r=3, num_A=1, num_B=2, routing="token", target_modules=["linear"])
    model = every_kind(config)

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, adapter_names=["default", "__base__"])

    ids = example()[0]
    program = torch.export.export(Rows(), (ids,), dynamic_shapes=({1: Dim.DYNAMIC},)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(ids[:, :3]), Rows()(ids[:, :3]))
    with pytest.raises(Exception, match=r"specialized|constant"):
        torch.export.export(Rows(), (ids.clone(),), dynamic_shapes=({0: Dim.DYNAMIC},))


def test_an_export_leaves_nothing_behind():
    program = Program(every_kind(of_a_sequence("linear")))
    with torch.no_grad():
        before = program(*example())
        torch.export.export(program, example())
        torch.jit.trace(program, example(), check_trace=False)
        assert torch.equal(program(*example()), before)
    program(*example()).sum().backward()
    assert not exporting()


def test_compiling_is_no_export():
    compiled = torch.compile(lambda x: x + exporting(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 0


class Speech(nn.Module):
    """Reads tenfold fewer tokens than its mask has, as speech models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 8)

    def _get_feat_extract_output_lengths(self, lengths: Tensor) -> Tensor:
        return lengths // 10

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.linear(input_ids.unfold(1, 10, 10))
        return found


def test_a_program_of_a_shortened_sequence_takes_any_number_of_samples():
    torch.manual_seed(0)
    model = Program(randomise(get_peft_model(Speech(), of_a_sequence("linear"))).eval())
    masks = [(torch.arange(40) < torch.tensor([[40], [20], [30]])).long(), torch.ones(2, 60, dtype=torch.long)]
    inputs = [(torch.randn(mask.shape), mask) for mask in masks]
    sizes = {0: Dim("samples"), 1: 10 * Dim("tokens", min=2)}
    program = torch.export.export(model, inputs[0], dynamic_shapes=(sizes, sizes)).module()
    for given in inputs:
        assert torch.allclose(program(*given), model(*given), atol=1e-5)
