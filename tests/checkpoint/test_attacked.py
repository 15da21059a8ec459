"""Untrusted adapters: whatever is in the folder, one clear error and an untouched model, or all of it."""

from __future__ import annotations

import json
import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from corpus import CONFIG, TARGETS, TENSORS, Case, cases, good_folders, read_plainly
from helpers import build, inputs, predict, randomise, tally
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
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
                                                              "modules_to_save", "settled", "scaling", "distinct",
                                                              "group_options")}  # fmt: skip
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
                assert text.isprintable(), (label, text)  # so it is one line
                assert len(text) < 700, (label, text)
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
    sample = [case for kind in by_kind.values() for case in kind[:: max(1, len(kind) // 15)]]
    counts = run(sample, benches, tmp_path)
    assert {key.partition(":")[0] for key in counts} == set(by_kind)
    assert sum(n for key, n in counts.items() if key.endswith("refused")) >= 150


@pytest.mark.slow
def test_every_spoilt_folder_is_refused_and_changes_nothing(good, benches, tmp_path):
    counts = run([case for folder in good for case in cases(folder)], benches, tmp_path)
    assert sum(n for key, n in counts.items() if key.endswith("refused")) >= 1000


def put(folder: Path, good: Any, **changes: Any) -> Path:
    """A good folder with some of its configuration changed."""
    folder.mkdir()
    good.write(folder)
    (folder / CONFIG).write_text(json.dumps({**good.config, **changes}))
    return folder


def refused(folder: Path, base: nn.Module | None = None) -> str:
    model = build("plain") if base is None else base
    before = fingerprint(model)
    with guarded(str(folder)), pytest.raises(LilyError) as caught:
        PeftModel.from_pretrained(model, folder)
    assert same(before, fingerprint(model))
    tally("inputs rejected")
    return str(caught.value)


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["(a|a)*b", "(.*)*x"])
def test_an_expression_that_does_not_end_is_stopped(good, tmp_path, monkeypatch, where, pattern):
    monkeypatch.setattr("lily.checkpoint.bounded_regex.SECONDS", 1.0)
    name = "a" * 40
    base = nn.ModuleDict({name: nn.Linear(8, 12), "blocks": build("plain").blocks, "head": nn.Linear(8, 5)})
    value: Any = {"modules_to_save": [pattern], "rank_pattern": {pattern: 2}}.get(where, pattern)
    text = refused(put(tmp_path / "x", good[0], **{where: value}), base)
    assert "takes longer than" in text
    assert str(tmp_path / "x" / CONFIG) in text


def test_an_expression_that_ends_selects_what_it_says(tmp_path):
    config = lily.LilyConfig(r=4, target_modules=r"(.*\.)*blocks\.(\d+)+\.(up|down)")
    model = randomise(get_peft_model(build("plain"), config))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("plain"), tmp_path)
    assert torch.equal(predict(again, inputs("plain")), predict(model.eval(), inputs("plain")))


@pytest.mark.parametrize("filling", [b"[", b" ", b"1,", b'"a",'])
def test_a_hundred_megabytes_of_json_are_refused_unread(good, tmp_path, filling):
    folder = put(tmp_path / "x", good[0])
    text = good[0].config_bytes[:-1] + b', "x": ['
    (folder / CONFIG).write_bytes(text + filling * (100_000_000 // len(filling)))
    tracemalloc.start()
    try:
        assert "larger than" in refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [40_000_000, 10_000_000_000])
def test_a_huge_header_is_refused_unread(good, tmp_path, length):
    folder = put(tmp_path / "x", good[0])
    with open(folder / TENSORS, "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(length + 100)  # sparse
    tracemalloc.start()
    try:
        assert f"declares a header of {length} bytes" in refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_huge_sizes_are_refused_before_anything_is_allocated(good, tmp_path):
    for i, changes in enumerate([{"r": 10**18}, {"num_B": 10**18}, {"r": 10**9, "num_B": 10**9}, {"num_A": 10**18}]):
        text = refused(put(tmp_path / f"{i}", good[0], stride_A=None, **changes))
        assert "has shape" in text or "has no" in text or "different values" in text or "holds" in text


def test_a_tensor_file_of_many_gigabytes_is_refused_by_its_header(good, tmp_path):
    folder = put(tmp_path / "x", good[0])
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    with open(folder / TENSORS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * 10**10)  # sparse
    assert "has no A of" in refused(folder)


@pytest.fixture
def llama_folder(tmp_path) -> Path:
    config = lily.LilyConfig(r=4, num_B=3, target_modules=["q_proj"], routing="token", task_type="CAUSAL_LM")
    randomise(get_peft_model(build("llama"), config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def damaged(folder: Path) -> Path:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-4:] = b"\0\0\xc0\x7f"  # NaN, which only shows when the last tensor is read
    (folder / TENSORS).write_bytes(bytes(data))
    return folder


@pytest.mark.parametrize("others", [False, True])
def test_transformers_own_loading_leaves_the_model_as_it_was(llama_folder, others):
    model = build("llama")
    if others:
        model.load_adapter(str(llama_folder), adapter_name="first")
    damaged(llama_folder)
    before = fingerprint(model)
    with pytest.raises(LilyError, match=f"{TENSORS}: .*NaN"):
        model.load_adapter(str(llama_folder), adapter_name="evil")
    assert same(before, fingerprint(model))
    tally("inputs rejected")


def test_a_state_dict_is_set_whole_or_not_at_all(good, tmp_path):
    folder = put(tmp_path / "x", next(g for g in good if g.name == "saved"))
    model = PeftModel.from_pretrained(build("plain"), folder)
    state = peft.load_peft_weights(str(folder), device="cpu")
    before = fingerprint(model)
    for name in state:
        for harm in (torch.zeros(1), torch.zeros(state[name].shape, dtype=torch.int64), None):
            spoilt = {key: value + 1 for key, value in state.items()}
            spoilt.pop(name) if harm is None else spoilt.update({name: harm})
            with pytest.raises(LilyError):
                peft.set_peft_model_state_dict(model, spoilt)
            assert same(before, fingerprint(model)), name
    peft.set_peft_model_state_dict(model, {key: value + 1 for key, value in state.items()})
    found = get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], value + 1) for key, value in state.items())


def test_a_pickle_is_never_read_by_any_name(good, tmp_path):
    pickled = next(c for folder in good for c in cases(folder) if c.name.endswith("missing beside a pickle"))
    for i, load in enumerate([
        lambda f: peft.load_peft_weights(str(f)),
        lambda f: PeftModel.from_pretrained(build("plain"), f),
        lambda f: PeftModel.from_pretrained(build("plain"), f, config=PeftConfig.from_pretrained(f)),
    ]):  # fmt: skip
        folder = tmp_path / f"{i}"
        folder.mkdir()
        pickled.write(folder)
        with pytest.raises(LilyError, match=r"adapter_model.bin is a pickle, which can run code and is never read"):
            load(folder)
        assert not (folder / "marker").exists()


def test_links_inside_the_hubs_cache_and_inside_the_folder_are_followed(good, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "main", repository / "blobs"
    snapshot.mkdir(parents=True)
    good[0].write(snapshot)
    blobs.mkdir()
    for i, name in enumerate((CONFIG, TENSORS)):
        (snapshot / name).rename(blobs / f"{i}")
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    PeftModel.from_pretrained(build("plain"), snapshot)
    folder = put(tmp_path / "x", good[0])
    (folder / TENSORS).rename(folder / "v1.safetensors")
    (folder / TENSORS).symlink_to("v1.safetensors")
    PeftModel.from_pretrained(build("plain"), folder)


def test_lora_is_left_to_peft(tmp_path):
    model = get_peft_model(build("plain"), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "lora")
    expected = predict(model, inputs("plain"))
    text = (tmp_path / "lora" / CONFIG).read_text()
    # What PEFT reads stays readable: a link, a key twice, tensors that are not finite or in a pickle.
    (tmp_path / "config").write_text(text[:-1] + ', "r": 2}')
    (tmp_path / "lora" / CONFIG).unlink()
    (tmp_path / "lora" / CONFIG).symlink_to(tmp_path / "config")
    torch.save(peft.load_peft_weights(str(tmp_path / "lora")), tmp_path / "lora" / "adapter_model.bin")
    (tmp_path / "lora" / TENSORS).unlink()
    again = PeftModel.from_pretrained(build("plain"), tmp_path / "lora").eval()
    assert torch.equal(predict(again, inputs("plain")), expected)
