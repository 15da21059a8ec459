"""Reading files from strangers: JSON and safetensors, checked before anything is believed.

Everything here is bounded in time and memory by limits that are stated once, below. Whatever is wrong ends in a
`LilyError` of one line that begins with the file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lily.errors import LilyError

MAX_JSON = 4 << 20  # an adapter's configuration is a page of text; one that names every expert of a large model, 2 MB
MAX_HEADER = 32 << 20  # stock's layout names every tensor of every layer; 200,000 of them still fit
MAX_DEPTH = 32
MAX_NUMBER = 2**63 - 1  # what a tensor's size can be; beyond it, numbers are of no use and slow to print
MAX_DIMENSIONS = 8
MAX_MESSAGE = 600

# The safetensors format's types that PyTorch has too.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "C64": torch.complex64,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def one_line(text: str) -> str:
    """A message that may quote a file of a stranger: control characters written out, and cut where it goes on."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= MAX_MESSAGE else shown[: MAX_MESSAGE - 3] + "..."


def blame(file: str | os.PathLike[str], text: object) -> LilyError:
    """The error that says what is wrong with a file."""
    return LilyError(one_line(f"{os.fspath(file)}: {text}"))


def check_inside(path: Path) -> None:
    """Refuse a link that leads out of its folder (or, in the hub's cache, out of its repository's blobs).

    Raises:
        LilyError: if it does, or leads nowhere.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise blame(path, f"cannot be read ({error.strerror})") from None
    folder = Path(os.path.realpath(path.parent))
    homes = [folder]
    if "snapshots" in folder.parts:  # models--owner--name/snapshots/<revision>, whose files are links into blobs/
        last = len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")
        homes.append(Path(*folder.parts[:last]) / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise blame(path, f"is a link to {target}, outside its folder; put the file itself there")


def open_regular(path: Path) -> BinaryIO:
    """Open a file that is one: a device, a pipe or a folder is refused before it is opened.

    Raises:
        LilyError: if it is none, or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise blame(path, "is not a regular file; put the file itself there")
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except OSError as error:
        raise blame(path, f"cannot be read ({error.strerror}); is the folder complete?") from None


@dataclass
class Json:
    """A JSON file's value, and what about it is not plain (repeated keys, infinities, endless numbers)."""

    value: Any = None
    oddities: list[str] = field(default_factory=list)


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """The value of a JSON file that is plain: no repeated keys, no NaN or infinities, no number beyond 64 bits.

    Args:
        path: the file.
        most: its largest size in bytes.

    Raises:
        LilyError: if it is anything else.
    """
    found = parse_json(path, most)
    if found.oddities:
        raise blame(path, found.oddities[0])
    return found.value


def parse_json(path: Path, most: int = MAX_JSON) -> Json:
    """As `read_json`, but what is odd is listed and not refused.

    Raises:
        LilyError: if it is no JSON, not UTF-8, too large or nested too deeply.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise blame(path, f"is larger than {most} bytes, which no such file is; is it the right one?")
    return parse_text(path, data)


def parse_text(path: Path, data: bytes) -> Json:
    """As `parse_json`, for a text that was found in a file."""
    found = Json()
    odd = found.oddities

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) < len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            odd.append(f"the key {twice[:80]!r} is given twice; keep one of them")
        return out

    def constant(name: str) -> float:
        odd.append(f"{name} is not a JSON number; write a finite one")
        return float(name)

    def integer(text: str) -> int:
        if len(text) > 20 or abs(int(text)) > MAX_NUMBER:
            odd.append(f"the number {text[:20]}... is too large")
        return int(text)

    try:
        found.value = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer
        )
    except UnicodeDecodeError as error:
        raise blame(path, f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise blame(path, f"not valid JSON: {error}") from None
    except RecursionError:
        raise blame(path, f"nested too deeply; at most {MAX_DEPTH} levels") from None
    if not _is_flat(found.value):
        raise blame(path, f"nested too deeply; at most {MAX_DEPTH} levels")
    return found


def _is_flat(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [v for values in inner for v in values]
        if not level:
            return True
    return False


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def meta(self) -> Tensor:
        """A tensor of this type and shape that holds nothing."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, checked against its size.

    Attributes:
        path: the file.
        entries: name -> type and shape.
        metadata: the file's own texts.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """A safetensors file's header. No tensor is read.

    Raises:
        LilyError: if its length, names, types, shapes or offsets are not those of a whole, well-formed file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise blame(path, f"has {size} bytes and no header; is it complete?")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER or length > size - 8:
            raise blame(path, f"names a header of {length} bytes in a file of {size}; it is damaged or incomplete")
        data = file.read(length)
    if not data.startswith(b"{"):
        raise blame(path, "its header is no JSON object; is it a safetensors file?")
    found = parse_text(path, data)
    if found.oddities:
        raise blame(path, f"header: {found.oddities[0]}")
    values: dict[str, Any] = found.value
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise blame(path, "header: __metadata__ does not map names to texts; the file is damaged")
    entries: dict[str, Entry] = {}
    places = []
    for name, value in values.items():
        entries[name], place = _entry(path, name, value)
        places.append((*place, name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            raise blame(path, f"header: the bytes of {name!r} begin at {begin}, expected {end}; the file is damaged")
        end = stop
    if end != size - 8 - length:
        raise blame(path, f"holds {size - 8 - length} bytes of tensors, expected {end}; the file is damaged")
    return Header(path, entries, metadata)


def _entry(path: Path, name: str, value: Any) -> tuple[Entry, tuple[int, int]]:
    if not name or not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        raise blame(path, f"header: {name!r} is no tensor's name; the file is not an adapter")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise blame(path, f"header: {name!r} does not say dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise blame(path, f"header: {name!r} has the unknown data type {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise blame(path, f"header: {name!r} has the shape {shape!r}; the file is damaged")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise blame(path, f"header: {name!r} has the offsets {offsets!r}; the file is damaged")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise blame(
            path, f"header: {name!r} takes {offsets[1] - offsets[0]} bytes, expected {expected} for {dtype} {shape}"
        )
    return Entry(DTYPES[dtype], tuple(shape)), (offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a file whose header is checked, on the CPU.

    Raises:
        LilyError: if one holds NaN or an infinity, or the file cannot be read.
    """
    out = {}
    try:
        with safe_open(header.path, "pt") as opened:
            for name in header.entries:
                tensor = opened.get_tensor(name)
                if tensor.dtype in FLOATS and not bool(torch.isfinite(tensor).all()):
                    raise blame(header.path, f"{name!r} holds NaN or an infinity; save a healthy adapter again")
                out[name] = tensor
    except (OSError, SafetensorError) as error:
        raise blame(header.path, f"cannot be read ({error})") from None
    return out
