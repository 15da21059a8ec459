"""Read untrusted JSON files and safetensors headers, bounded in time and memory.

The limits are the constants below. Every error is a `LilyError` of one line that begins with the file.
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

MAX_JSON = 4 << 20  # bytes; a configuration that names every expert of a large model has 2 MB
MAX_HEADER = 32 << 20  # bytes; enough for 200,000 tensors, since stock PEFT lists every tensor of every layer
MAX_DEPTH = 32
MAX_NUMBER = 2**63 - 1  # the largest tensor size; larger numbers are slow to print
MAX_DIMENSIONS = 8
MAX_MESSAGE = 600

# Data types of the safetensors format that PyTorch supports.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "C64": torch.complex64,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def one_line(text: str) -> str:
    """Escape control characters and truncate, so that a message can quote untrusted input."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= MAX_MESSAGE else shown[: MAX_MESSAGE - 3] + "..."


def blame(file: str | os.PathLike[str], text: object) -> LilyError:
    """An error about a file, which begins with its name."""
    return LilyError(one_line(f"{os.fspath(file)}: {text}"))


def check_inside(path: Path) -> None:
    """Refuse a symbolic link that leaves its folder (or, in the hub's cache, the blobs of its repository).

    Raises:
        LilyError: if it does, or its target does not exist.
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
    """Open a regular file; devices, pipes and folders are refused before they are opened.

    Raises:
        LilyError: if it is not a regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise blame(path, "is not a regular file; put the file itself there")
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except OSError as error:
        raise blame(path, f"cannot be read ({error.strerror}); is the folder complete?") from None


@dataclass
class Json:
    """A JSON file's value, and what is not valid in it (repeated keys, infinities, too large numbers)."""

    value: Any = None
    oddities: list[str] = field(default_factory=list)


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """The value of a JSON file without repeated keys, NaN, infinities and numbers of more than 64 bits.

    Args:
        path: the file.
        most: largest accepted size in bytes.

    Raises:
        LilyError: if it has any of them, or as `parse_json`.
    """
    parsed = parse_json(path, most)
    if parsed.oddities:
        raise blame(path, parsed.oddities[0])
    return parsed.value


def parse_json(path: Path, most: int = MAX_JSON) -> Json:
    """As `read_json`, but oddities are listed instead of refused.

    Raises:
        LilyError: if it is not JSON, not UTF-8, too large or nested too deeply.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise blame(path, f"is larger than {most} bytes, the largest accepted size; is it the right file?")
    return parse_text(path, data)


def parse_text(path: Path, data: bytes) -> Json:
    """As `parse_json`, for JSON inside another file."""
    parsed = Json()
    odd = parsed.oddities

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
        parsed.value = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer
        )
    except UnicodeDecodeError as error:
        raise blame(path, f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise blame(path, f"not valid JSON: {error}") from None
    except RecursionError:
        raise blame(path, f"nested too deeply; at most {MAX_DEPTH} levels") from None
    if not _is_flat(parsed.value):
        raise blame(path, f"nested too deeply; at most {MAX_DEPTH} levels")
    return parsed


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
        """A tensor of this dtype and shape on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, checked against the file's size.

    Attributes:
        path: the file.
        entries: name -> dtype and shape.
        metadata: the `__metadata__` texts.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read a safetensors file's header, without its tensors.

    Raises:
        LilyError: if its length, names, dtypes, shapes or offsets are not those of a complete, well-formed file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise blame(path, f"has {size} bytes and no header; is it complete?")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER or length > size - 8:
            raise blame(path, f"declares a header of {length} bytes in a file of {size}; it is damaged or incomplete")
        data = file.read(length)
    if not data.startswith(b"{"):
        raise blame(path, "its header is not a JSON object; is it a safetensors file?")
    parsed = parse_text(path, data)
    if parsed.oddities:
        raise blame(path, f"header: {parsed.oddities[0]}")
    values: dict[str, Any] = parsed.value
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise blame(path, "header: __metadata__ does not map names to texts; the file is damaged")
    entries: dict[str, Entry] = {}
    offsets = []
    for name, value in values.items():
        entries[name], span = _entry(path, name, value)
        offsets.append((*span, name))
    end = 0
    for begin, stop, name in sorted(offsets):
        if begin != end:
            raise blame(path, f"header: the bytes of {name!r} begin at {begin}, expected {end}; the file is damaged")
        end = stop
    if end != size - 8 - length:
        raise blame(path, f"holds {size - 8 - length} bytes of tensors, expected {end}; the file is damaged")
    return Header(path, entries, metadata)


def _entry(path: Path, name: str, value: Any) -> tuple[Entry, tuple[int, int]]:
    if not name or not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        raise blame(path, f"header: {name!r} is not a valid tensor name; the file is not an adapter")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise blame(path, f"header: {name!r} does not have exactly dtype, shape and data_offsets; the file is damaged")
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
    """Read the tensors of a checked file, on the CPU.

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
