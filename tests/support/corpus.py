"""Untrusted adapter folders: many ways to damage a valid one, derived from a seed and not from a clock.

A `Case` writes one folder. `spoils` says whether it must be refused; where a flipped bit can leave a good file behind
(another finite number, a spare letter), the outcome is not known, but it must be complete.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from helpers import build, randomise
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

import lily

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ["up", "down"]


@dataclass(frozen=True)
class Folder:
    """A good adapter's two files, in parts."""

    name: str
    config: dict[str, Any]
    header: dict[str, Any]
    body: bytes

    @property
    def config_bytes(self) -> bytes:
        return json.dumps(self.config).encode()

    @property
    def tensor_bytes(self) -> bytes:
        return packed(self.header, self.body)

    @property
    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def write(self, folder: Path) -> None:
        (folder / CONFIG).write_bytes(self.config_bytes)
        (folder / TENSORS).write_bytes(self.tensor_bytes)


@dataclass(frozen=True)
class Case:
    """One spoilt folder.

    Attributes:
        kind: what was done to it.
        name: where exactly.
        write: writes it.
        spoils: whether it must be refused.
        config_only: whether only ways that read the configuration can notice.
        base: builds the base model; None: the one that it was trained on.
    """

    kind: str
    name: str
    write: Callable[[Path], None]
    spoils: bool = True
    config_only: bool = False
    base: Callable[[], nn.Module] | None = None


def packed(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def good_folders(scratch: Path) -> list[Folder]:
    """One of each layout: ours, stock's with every duplicate, settling, with a saved head, with biases."""
    options: dict[str, dict[str, Any]] = {
        "ours": {"routing": "token"},
        "static": {"routing": "static", "rank_pattern": {"down": 2}},
        "settling": {"routing": "sequence", "settled": 0.5},
        "saved": {"routing": "uniform", "modules_to_save": ["head"]},
        "bias": {"num_B": 1, "bias": "lily_only"},
    }
    found = []
    for name, changes in options.items():
        config = lily.LilyConfig(**{"r": 4, "num_B": 3, "stride_A": 2, "target_modules": TARGETS, **changes})
        found.append(_saved(name, config, scratch / name))
    lily.unregister()
    try:
        import peft

        stock = peft.LilyConfig(r=4, num_B=3, stride_A=2, target_modules=TARGETS)
        found.append(_saved("stock", stock, scratch / "stock"))
    finally:
        lily.register()
    return found


def _saved(name: str, config: Any, folder: Path) -> Folder:
    model = randomise(get_peft_model(build("plain"), config))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "lily_" not in key:
                p.add_(0.5)
    model.save_pretrained(folder)
    data = (folder / TENSORS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return Folder(name, json.loads((folder / CONFIG).read_text()), json.loads(data[8 : 8 + length]), data[8 + length :])


def cases(good: Folder, seed: int = 0) -> Iterator[Case]:
    """Everything that is done to one good folder."""
    rng = random.Random(f"{good.name}-{seed}")
    for make in (truncated, header_flips, body_flips, headers, shapes, dtypes, tensors, values, no_files, configs,
                 config_fields, other_methods, other_bases):  # fmt: skip
        yield from make(good, rng)


def _tensors(good: Folder, kind: str, name: str, data: bytes, **more: Any) -> Case:
    def write(folder: Path) -> None:
        (folder / CONFIG).write_bytes(good.config_bytes)
        (folder / TENSORS).write_bytes(data)

    return Case(kind, f"{good.name}: {name}", write, **more)


def _config(good: Folder, kind: str, name: str, data: bytes, **more: Any) -> Case:
    def write(folder: Path) -> None:
        (folder / CONFIG).write_bytes(data)
        (folder / TENSORS).write_bytes(good.tensor_bytes)

    return Case(kind, f"{good.name}: {name}", write, config_only=True, **more)


def truncated(good: Folder, rng: random.Random) -> Iterator[Case]:
    data = good.tensor_bytes
    start = len(data) - len(good.body)
    ends = {value["data_offsets"][1] + start for key, value in good.header.items() if key != "__metadata__"}
    cuts = {*range(10), start - 1, start, start + 1, *(e + d for e in ends for d in (-4, -1, 0, 1)), len(data) - 1}
    cuts |= {rng.randrange(len(data)) for _ in range(20)}
    for cut in sorted(c for c in cuts if 0 <= c < len(data)):
        yield _tensors(good, "truncated", f"tensors cut at {cut}", data[:cut])
    yield _tensors(good, "truncated", "tensors with a byte too many", data + b"\0")
    text = good.config_bytes
    for cut in sorted({0, 1, len(text) - 1, *rng.sample(range(len(text)), 40)}):
        yield _config(good, "truncated", f"config cut at {cut}", text[:cut])


def header_flips(good: Folder, rng: random.Random) -> Iterator[Case]:
    data = good.tensor_bytes
    start = len(data) - len(good.body)
    for _ in range(250):
        bit = rng.randrange(start * 8)
        yield _tensors(good, "header flipped", f"bit {bit}", _flipped(data, bit), spoils=False)
    for bit in range(64):
        yield _tensors(good, "header flipped", f"length's bit {bit}", _flipped(data, bit))


def body_flips(good: Folder, rng: random.Random) -> Iterator[Case]:
    data = good.tensor_bytes
    start = len(data) - len(good.body)
    for _ in range(60):
        bit = rng.randrange(start * 8, len(data) * 8)
        yield _tensors(good, "body flipped", f"bit {bit}", _flipped(data, bit), spoils=False)


def _flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def headers(good: Folder, rng: random.Random) -> Iterator[Case]:
    text, size = json.dumps(good.header).encode(), len(good.tensor_bytes)
    for length in (0, 1, 7, len(text) - 1, len(text) + 1, size - 8, size - 7, size, 1 << 31, 100 << 20, 1 << 62,
                   1 << 63, (1 << 64) - 1):  # fmt: skip
        yield _tensors(good, "header", f"length {length}", packed(text, good.body, length))
    for name, header in {
        "empty": b"",
        "no JSON": b"not json" + text,
        "a list": b"[]",
        "a number": b"1",
        "null": b"null",
        "no UTF-8": b"\xff" + text,
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "deep lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "an endless number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
        "spaces only": b" " * 64,
        "a zero byte": text[:-1] + b"\0}",
    }.items():
        yield _tensors(good, "header", name, packed(header, good.body))
    for metadata in ([], "x", 1, {"format": 1}, {"a": {"b": "c"}}):
        yield _tensors(
            good, "header", f"metadata {metadata!r}", packed({**good.header, "__metadata__": metadata}, good.body)
        )
    for name in good.names:
        entry = good.header[name]
        twice = text[:-1] + b", " + json.dumps({name: entry}).encode()[1:]
        yield _tensors(good, "header", f"{name} twice", packed(twice, good.body))
        begin, end = entry["data_offsets"]
        for offsets in ([end, begin], [begin + 4, end + 4], [begin, end + 4], [0, 0], [-4, end], [begin], [], "0,4",
                        None, [float(begin), float(end)], [begin, 1 << 62], [True, end],
                        [begin, end, end]):  # fmt: skip
            changed = {**good.header, name: {**entry, "data_offsets": offsets}}
            if changed != good.header:
                yield _tensors(good, "header", f"{name} offsets {offsets}", packed(changed, good.body))
        for harm in ({}, [], None, 1, {**entry, "more": 1}, {"dtype": "F32"}):
            yield _tensors(good, "header", f"{name} is {harm}", packed({**good.header, name: harm}, good.body))
        for other in ("../../../etc/passwd", "/etc/passwd", f"..{name}", f"{name}/../x", f"{name}\n", f"{name}\x00",
                      f"\x1b[2J{name}", name.replace(".", "\\"), f"{name}\u202e", "a" * 100_000,
                      f"{name}.{name}", ""):  # fmt: skip
            renamed = {other if key == name else key: value for key, value in good.header.items()}
            yield _tensors(good, "name", f"{name} is called {other[:40]!r}", packed(renamed, good.body))


def _with(good: Folder, changes: dict[str, tuple[str, list[int], bytes] | None]) -> bytes:
    """The tensor file with some tensors replaced (dtype, shape, bytes), added, or (None) left out."""
    header: dict[str, Any] = {key: value for key, value in good.header.items() if key == "__metadata__"}
    parts, at = [], 0
    for name in [*good.names, *(key for key in changes if key not in good.header)]:
        if name in changes:
            if changes[name] is None:
                continue
            dtype, shape, data = changes[name]
        else:
            entry = good.header[name]
            dtype, shape, data = entry["dtype"], entry["shape"], good.body[slice(*entry["data_offsets"])]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    return packed(header, b"".join(parts))


def shapes(good: Folder, rng: random.Random) -> Iterator[Case]:
    for name in good.names:
        old = good.header[name]["shape"]
        data = good.body[slice(*good.header[name]["data_offsets"])]
        count = len(data) // 4
        for shape in ([count], [1, count], [*old, 1], old[::-1] if old != old[::-1] else [count, 1], [0], [], [2, *old],
                      [old[0] + 1, *old[1:]], [*old[:-1], old[-1] - 1], [1] * 20):  # fmt: skip
            if shape != old:
                numbers = 1
                for n in shape:
                    numbers *= n
                body = (data * 4)[: numbers * 4]
                yield _tensors(good, "shape", f"{name} {shape}", _with(good, {name: ("F32", shape, body)}))
        for shape in ([1 << 40, 1 << 40], [-1, *old], [1.0, 2], [True], None, "4", [1 << 70], [[4]], [0, 1 << 62]):
            header = copy.deepcopy(good.header)
            header[name]["shape"] = shape
            yield _tensors(good, "shape", f"{name} {shape}", packed(header, good.body))


def dtypes(good: Folder, rng: random.Random) -> Iterator[Case]:
    sizes = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "I32": 4, "I64": 8, "C64": 8, "U32": 4}
    for name in good.names:
        shape, count = good.header[name]["shape"], 1
        for n in shape:
            count *= n
        for dtype, size in sizes.items():
            yield _tensors(good, "dtype", f"{name} {dtype}", _with(good, {name: (dtype, shape, bytes(count * size))}))
        for dtype in ("F31", "", 32, None, ["F32"], "float32", "f32", "I64", "BF16"):
            header = copy.deepcopy(good.header)
            header[name]["dtype"] = dtype
            yield _tensors(good, "dtype", f"{name} is said to be {dtype!r}", packed(header, good.body))


def tensors(good: Folder, rng: random.Random) -> Iterator[Case]:
    for name in good.names:
        # Of stock's duplicates, one is enough.
        spoils = good.name != "stock" or "router" in name
        yield _tensors(good, "missing tensor", name, _with(good, {name: None}), spoils=spoils)
    four = struct.pack("<4f", 1, 2, 3, 4)
    strange = ["base_model.model.blocks.0.up.weight", "base_model.model.blocks.0.up.base_layer.weight", "extra",
               "base_model.model.blocks.7.up.lily_A.weight", "base_model.model.head.lily_A.weight", "head.weight",
               "base_model.model.head.bias", "base_model.model.lily_bank.lily_A.default.0", "blocks.0.up.lily_A",
               "base_model.model.blocks.0.up.lora_A.weight", "__class__",
               "base_model.model.blocks.0.down.bias"]  # fmt: skip
    for name in strange:
        if name not in good.header:
            yield _tensors(good, "extra tensor", name, _with(good, {name: ("F32", [4], four)}))
            yield _tensors(good, "extra tensor", f"{name} (empty)", _with(good, {name: ("F32", [0], b"")}))
    yield _tensors(good, "missing tensor", "all", packed({}, b""))
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    yield _tensors(good, "extra tensor", "20,000 empty ones", packed({**good.header, **many}, good.body))


def values(good: Folder, rng: random.Random) -> Iterator[Case]:
    start = len(good.tensor_bytes) - len(good.body)
    bad = {"NaN": 0x7FC00000, "signalling NaN": 0x7FA00000, "inf": 0x7F800000, "-inf": 0xFF800000}
    for name in good.names:
        begin, end = good.header[name]["data_offsets"]
        for what, bits in bad.items():
            at = start + begin + 4 * rng.randrange((end - begin) // 4)
            data = good.tensor_bytes[:at] + struct.pack("<I", bits) + good.tensor_bytes[at + 4 :]
            yield _tensors(good, "not finite", f"{name} {what}", data)
        shape = good.header[name]["shape"]
        half = struct.pack("<H", 0x7C00) * ((end - begin) // 4)
        yield _tensors(good, "not finite", f"{name} half inf", _with(good, {name: ("F16", shape, half)}))


class Marker:
    """What a pickle runs when it is loaded: it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def no_files(good: Folder, rng: random.Random) -> Iterator[Case]:
    def case(name: str, file: str, change: Callable[[Path, Path], None]) -> Case:
        def write(folder: Path) -> None:
            good.write(folder)
            change(folder / file, folder)

        return Case("file", f"{good.name}: {file} {name}", write, config_only=file == CONFIG)

    def outside(path: Path, folder: Path) -> None:
        away = folder.parent / f"{folder.name}-away-{path.name}"
        os.replace(path, away)
        path.symlink_to(away)

    def link(target: str) -> Callable[[Path, Path], None]:
        return lambda path, _: (path.unlink(), path.symlink_to(target))[0]

    def pickled(path: Path, folder: Path) -> None:
        path.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Marker(str(folder / "marker"))))

    def poisoned(path: Path, folder: Path) -> None:
        path.write_bytes(pickle.dumps(Marker(str(folder / "marker"))))

    for file in (CONFIG, TENSORS):
        yield case("missing", file, lambda path, _: path.unlink())
        yield case("empty", file, lambda path, _: path.write_bytes(b"") and None)
        yield case("links outside", file, outside)
        yield case("links to nothing", file, link("nothing"))
        yield case("links to itself", file, link(file))
        yield case("links to a device", file, link("/dev/zero"))
        yield case("links to a system file", file, link("/etc/passwd"))
        yield case("links to a folder", file, link("."))
        yield case("is a folder", file, lambda path, _: (path.unlink(), path.mkdir())[0])
        yield case("is a pipe", file, lambda path, _: (path.unlink(), os.mkfifo(path))[0])
        yield case("is a pickle", file, poisoned)
    yield case("missing beside a pickle", TENSORS, pickled)


def configs(good: Folder, rng: random.Random) -> Iterator[Case]:
    text = good.config_bytes
    for name, data in {
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "UTF-16": text.decode().encode("utf-16"),
        "Latin-1": text[:-1] + b', "x": "caf\xe9"}',
        "an overlong character": text[:-1] + b', "x": "\xc0\xaf"}',
        "a zero byte": text + b"\0",
        "all zeros": bytes(len(text)),
        "a list": b"[" + text + b"]",
        "a text": b'"LILY"',
        "null": b"null",
        "a number": b"1",
        "an empty object": b"{}",
        "two objects": text + text,
        "a comment": text + b"// yes",
        "single quotes": text.replace(b'"', b"'"),
        "deep lists": text[:-1] + b', "provenance": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep objects": text[:-1] + b', "auto_mapping": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        "forty levels": text[:-1] + b', "provenance": ' + b'{"a":' * 40 + b"1" + b"}" * 41,
        "a key twice": text[:-1] + b', "r": 4}',
        "an inner key twice": text[:-1] + b', "x": {"a": 1, "a": 2}}',
        "an endless number": text[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
        "a long number": text[:-1] + b', "x": ' + b"9" * 400 + b"}",
        "NaN": text[:-1] + b', "x": NaN}',
        "Infinity": text[:-1] + b', "x": -Infinity}',
        "100,000 targets": json.dumps({**good.config, "target_modules": [f"t{i}" for i in range(100_000)]}).encode(),
        "100,000 layers": json.dumps({**good.config, "layers_to_transform": [0] * 100_000}).encode(),
        "100,000 ranks": json.dumps({**good.config, "rank_pattern": {f"t{i}": 1 for i in range(100_000)}}).encode(),
        "100,000 heads": json.dumps({**good.config, "modules_to_save": [f"t{i}" for i in range(100_000)]}).encode(),
        "an expression too long": json.dumps({**good.config, "target_modules": "(" + "a|" * 50_000 + "b)"}).encode(),
        "an expression too deep": json.dumps({**good.config, "target_modules": "(" * 9_000 + ")" * 9_000}).encode(),
        "an expression that is none": json.dumps({**good.config, "target_modules": "*up"}).encode(),
        "an expression in a head": json.dumps({**good.config, "modules_to_save": ["*up"]}).encode(),
        "an expression in a layer list": json.dumps(
            {**good.config, "layers_pattern": "(", "layers_to_transform": [0]}
        ).encode(),
    }.items():
        yield _config(good, "config", name, data)


POOL: list[Any] = [
    None, True, False, -1, 0, 3, 10**18, 2**63, 1.5, 1e308, "", "x", "up", "none", "a\nb\x1b[0m", "x" * 5000, [], [1],
    ["x"], [[1]], [None], {}, {"a": 1}, {"up": "x"}, {"a": {"b": []}},
]  # fmt: skip


# Fields of which an empty mapping says nothing.
EMPTY_IS_NONE = ("rank_pattern", "scaling_pattern", "target_slices", "group_options", "trainable_token_indices")


def config_fields(good: Folder, rng: random.Random) -> Iterator[Case]:
    """Every field with every value of the pool; whether the value could be right depends on the field's type."""
    for f in fields(lily.LilyConfig):
        for i, value in enumerate(POOL):
            changed = {**good.config, f.name: value}
            if f.name in good.config and good.config[f.name] == value:
                continue
            spoils = isinstance(value, list) and value[:1] in ([[1]], [None])
            spoils |= (
                isinstance(value, dict)
                and f.name not in ("provenance", "auto_mapping", "adapted_layers")
                and (value != {} or f.name not in EMPTY_IS_NONE)
            )
            yield _config(
                good, "config field", f"{f.name} #{i} {str(value)[:20]!r}", json.dumps(changed).encode(), spoils=spoils
            )
    for f in ("r", "num_B", "stride_A", "scaling", "dropout", "routing", "activation", "bias", "target_modules"):
        for value in ([1], {"a": 1}, [[]], "x" * 5000, 2**64):
            changed = {**good.config, f: value}
            yield _config(good, "config field", f"{f} {str(value)[:20]}", json.dumps(changed).encode())


def other_methods(good: Folder, rng: random.Random) -> Iterator[Case]:
    from peft.utils import PeftType

    kinds = [kind.value for kind in PeftType if kind.value != "LILY"]
    for kind in [*kinds, "NONE_SUCH", "lily", "LILY ", "", None, 1, ["LILY"], {"LILY": 1}, True]:
        yield _config(good, "method", repr(kind), json.dumps({**good.config, "peft_type": kind}).encode())
    without = {key: value for key, value in good.config.items() if key != "peft_type"}
    yield _config(good, "method", "missing", json.dumps(without).encode())


class Other(nn.Module):
    """Like `helpers.Plain`, of other depth, width or names."""

    def __init__(self, depth: int = 3, width: int = 8, inner: int = 12, up: str = "up", out: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({up: nn.Linear(width, inner), "down": nn.Linear(inner, width)}) for _ in range(depth)
        )
        self.head = nn.Linear(width, out)


def other_bases(good: Folder, rng: random.Random) -> Iterator[Case]:
    bases: dict[str, dict[str, Any]] = {
        "1 block": {"depth": 1}, "2 blocks": {"depth": 2}, "4 blocks": {"depth": 4}, "9 blocks": {"depth": 9},
        "narrower": {"width": 4}, "wider": {"width": 16}, "an inner size": {"inner": 8}, "other names": {"up": "gate"},
    }  # fmt: skip
    for name, options in bases.items():
        yield Case("base", f"{good.name}: {name}", good.write, base=lambda options=options: Other(**options))
    if good.config.get("modules_to_save"):
        yield Case("base", f"{good.name}: more classes", good.write, base=lambda: Other(out=9))


def read_plainly(folder: Path) -> dict[str, torch.Tensor]:
    """What the format's own library reads."""
    with safe_open(folder / TENSORS, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
