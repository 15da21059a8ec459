"""Adapters from strangers: whatever is in the folder, one clear error and an untouched model, or all of it."""

from __future__ import annotations

import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CONFIG, TARGETS, TENSORS, Case, cases, good_folders, read_plainly
from helpers import build, randomise, tally
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import lily
from lily import LilyError

SECONDS = 60  # a guard: a case that takes longer hangs


@contextmanager
def guarded(name: str) -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise TimeoutError(f"{name} took over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a load can change."""
    modules = {
        name: (type(m), id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    }
    return {
        "modules": modules,
        "tensors": {k: (id(p), p.requires_grad, p.detach().clone()) for k, p in model.named_parameters()},
        "buffers": {k: b.clone() for k, b in model.named_buffers()},
        "configs": repr(getattr(model, "peft_config", None)),
        "active": repr(getattr(model, "active_adapters", None)) if hasattr(model, "peft_config") else None,
        "attributes": sorted(model.__dict__),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    plain = ("modules", "configs", "active", "attributes")
    if any(before[key] != after[key] for key in plain) or before["tensors"].keys() != after["tensors"].keys():
        return False
    then, now = before["tensors"], after["tensors"]
    return all(then[k][:2] == now[k][:2] and torch.equal(then[k][2], now[k][2]) for k in then) and all(
        torch.equal(b, after["buffers"][k]) for k, b in before["buffers"].items()
    )


class Bench:
    """Models that are attacked over and over: a failed load leaves them as they were, or the next case would tell."""

    def __init__(self, config: dict[str, Any]) -> None:
        options = {k: v for k, v in config.items() if k in ("r", "num_B", "stride_A", "routing", "rank_pattern", "bias",
                                                              "modules_to_save", "settled", "scaling")}  # fmt: skip
        self.options = {"routing": "batch", **options, "target_modules": TARGETS}
        self.ways: dict[str, Callable[[Path, nn.Module], Any]] = {
            "from_pretrained": lambda folder, model: PeftModel.from_pretrained(model, folder),
            "load_adapter": lambda folder, model: model.load_adapter(folder, "evil"),
            "again": lambda folder, model: model.load_adapter(folder, "default"),
            "hotswap": lambda folder, model: hotswap_adapter(model, str(folder), "default", "cpu"),
        }
        self.models = {way: self.model(way) for way in self.ways}

    def model(self, way: str, base: Callable[[], nn.Module] | None = None) -> nn.Module:
        model = build("plain") if base is None else base()
        if way == "from_pretrained":
            return model
        options = dict(self.options)
        if way == "load_adapter":  # PEFT allows one adapter with biases
            options["bias"] = "none"
        return randomise(get_peft_model(model, lily.LilyConfig(**options)), seed=5)

    def attack(self, case: Case, way: str, folder: Path) -> str:
        """'refused' or 'loaded'; anything else fails the test."""
        model = self.models[way] if case.base is None else self.model(way, case.base)
        before = fingerprint(model)
        label = f"{case.kind}, {case.name}, through {way}"
        with guarded(label):
            try:
                loaded = self.ways[way](folder, model)
            except LilyError as error:
                text = str(error)
                assert "\n" not in text and text.isprintable() and len(text) < 700, (label, text)
                assert str(folder / CONFIG) in text or str(folder / TENSORS) in text, (label, text)
                assert same(before, fingerprint(model)), f"{label} changed the model: {text}"
                return "refused"
        if case.base is None:
            self.models[way] = self.model(way)
        loaded = model if way != "from_pretrained" else loaded
        adapter = "evil" if way == "load_adapter" else "default"
        expected = {t.float().numpy().tobytes() for t in read_plainly(folder).values()}
        found = {t.float().numpy().tobytes() for t in get_peft_model_state_dict(loaded, adapter_name=adapter).values()}
        assert found == expected, f"{label} was loaded in part"
        assert all(bool(torch.isfinite(t).all()) for t in read_plainly(folder).values()), label
        return "loaded"


def run(chosen: list[Case], benches: dict[str, Bench], tmp_path: Path) -> Counter[str]:
    """Attack with every case, each by another way in; counts outcomes by kind."""
    counts: Counter[str] = Counter()
    for number, case in enumerate(chosen):
        folder = tmp_path / "case"
        folder.mkdir()
        case.write(folder)
        bench = benches[case.name.partition(":")[0]]
        names = ["from_pretrained", "load_adapter"] if case.config_only else list(bench.ways)
        if case.base is not None:
            names = ["from_pretrained"]
        outcome = bench.attack(case, names[number % len(names)], folder)
        assert not (folder / "marker").exists(), case.name
        assert outcome == "refused" or not case.spoils, f"{case.kind}, {case.name} was loaded"
        counts[f"{case.kind}: {outcome}"] += 1
        shutil.rmtree(folder)
    tally("inputs rejected", sum(n for key, n in counts.items() if key.endswith("refused")))
    return counts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return good_folders(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def benches(good: list[Any]) -> dict[str, Bench]:
    return {folder.name: Bench(folder.config) for folder in good}


def test_the_good_folders_load_by_every_way(good, benches, tmp_path):
    for folder in good:
        for way in benches[folder.name].ways:
            target = tmp_path / f"{folder.name}-{way}"
            target.mkdir()
            folder.write(target)
            case = Case("good", folder.name, folder.write, spoils=False)
            assert benches[folder.name].attack(case, way, target) == "loaded"


def test_a_sample_of_spoilt_folders_is_refused_and_changes_nothing(good, benches, tmp_path):
    everything = [case for folder in good for case in cases(folder)]
    by_kind: dict[str, list[Case]] = {}
    for case in everything:
        by_kind.setdefault(case.kind, []).append(case)
    sample = [case for kind in by_kind.values() for case in kind[:: max(1, len(kind) // 25)]]
    counts = run(sample, benches, tmp_path)
    assert {key.partition(":")[0] for key in counts} == set(by_kind)
    assert sum(n for key, n in counts.items() if key.endswith("refused")) >= 250


@pytest.mark.slow
def test_every_spoilt_folder_is_refused_and_changes_nothing(good, benches, tmp_path):
    counts = run([case for folder in good for case in cases(folder)], benches, tmp_path)
    assert sum(n for key, n in counts.items() if key.endswith("refused")) >= 1000
