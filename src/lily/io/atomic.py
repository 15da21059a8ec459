"""Writing files so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lily.errors import LilyError

# What a disk answers when it takes no more.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Linux's renameat2: both paths are taken from the working directory; swap them.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically: temporary name in the same folder, fsync, rename, fsync of the folder.

    Raises:
        OSError: when the disk is full or the folder is not writable; the old file is then intact.
    """
    folder = os.path.dirname(os.path.abspath(path))
    with naming(path):
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within: what a full disk does to any writer becomes an `OSError` that names `path`.

    Python's own says which call failed but not for which file, and safetensors has an error type of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def disk_error(error: OSError | SafetensorError) -> int | None:
    """The number of the disk's refusal behind an error, or None if it is another kind of error."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return number if number in DISK_ERRORS else None


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well; if it does not, nothing is left.

    Raises:
        LilyError: before anything is written: if `folder` exists and is not to be replaced, or its parent is missing.
        OSError: naming `folder`, when the disk is full, whoever wrote.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not (overwrite and path.is_dir()):
        what = "exists; name another folder, or give overwrite" if path.is_dir() else "is a file; name a folder"
        raise LilyError(f"{folder} {what}")
    if not path.parent.is_dir():
        raise LilyError(f"{folder}: there is no folder {path.parent}; make it first")
    with naming(path), _scratch(path) as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        publish(new, path)


def publish(new: Path, path: Path) -> None:
    """Give a finished folder its name: durable before it is seen. What had the name before is left beside `new`.

    Args:
        new: the folder, inside a temporary one on the same file system.
        path: its name.
    """
    for entry in new.rglob("*"):
        if entry.is_file():
            _finish(entry)
        else:
            _sync(entry)
    _sync(new)
    if path.exists():
        _exchange(new, path)
    else:
        os.replace(new, path)
    sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder that never stands there half deleted under its name."""
    if folder.is_dir():
        hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        os.replace(folder, hidden / folder.name)
        shutil.rmtree(hidden, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Swap two folders, in one step where the system can: there is no moment without a folder of that name."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if swap is not None and not swap(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE):
        return
    old = new.with_name("old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise


@contextlib.contextmanager
def new_file(file: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary path that becomes `file` when the block ends well; if it does not, nothing is left.

    Raises:
        LilyError: before anything is written: if `file` exists and is not to be replaced, or its folder is missing.
        OSError: naming `file`, when the disk is full, whoever wrote.
    """
    path = Path(file).expanduser().absolute()
    if path.is_dir():
        raise LilyError(f"{file} is a folder; name a file")
    if path.exists() and not overwrite:
        raise LilyError(f"{file} exists; name another file, or give overwrite")
    if not path.parent.is_dir():
        raise LilyError(f"{file}: there is no folder {path.parent}; make it first")
    with naming(path), _scratch(path) as scratch:
        new = scratch / path.name
        yield new
        _finish(new)
        os.replace(new, path)
        sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a rename inside `folder` durable."""
    _sync(folder)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, so that what is written there can be renamed to it."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(file: Path) -> None:
    """Make a written file durable, and as readable as one that Python opens: safetensors makes its own private."""
    os.chmod(file, 0o666 & ~_umask())
    _sync(file)


def _sync(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
