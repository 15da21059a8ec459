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

# errno of a disk that is full, over quota or read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Linux's renameat2: paths relative to the working directory; exchange them.
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
        sync(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context: errors of a full disk become an `OSError` that names `path`.

    Python's error may not name the file, and safetensors raises a separate type.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def disk_error(error: OSError | SafetensorError) -> int | None:
    """The errno of an error of the disk, or None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    return number if number in DISK_ERRORS else None


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Context: a temporary folder that is renamed to `folder` at the end; after an exception, it is deleted.

    Raises:
        LilyError: before anything is written, if `folder` exists and `overwrite` is False, or its parent is missing.
        OSError: naming `folder`, if the disk is full.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not (overwrite and path.is_dir()):
        what = (
            "exists; name another folder, or give --overwrite (in Python overwrite=True)"
            if path.is_dir()
            else "is a file; name a folder"
        )
        raise LilyError(f"{folder} {what}")
    if not path.parent.is_dir():
        raise LilyError(f"{folder}: there is no folder {path.parent}; make it first")
    with naming(path), _scratch(path) as scratch:
        new = scratch / "new"
        new.mkdir()
        yield new
        publish(new, path)


def publish(new: Path, path: Path) -> None:
    """Rename a complete folder to its final name, after fsync of all its files.

    Args:
        new: the folder, inside a temporary folder on the same file system, where a folder that it replaces is left.
        path: its final name.
    """
    for entry in new.rglob("*"):
        if entry.is_file():
            _finish(entry)
        else:
            sync(entry)
    sync(new)
    if path.exists():
        _exchange(new, path)
    else:
        os.replace(new, path)
    sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder, which is renamed first, so that its name never refers to a partly deleted one."""
    if folder.is_dir():
        hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        os.replace(folder, hidden / folder.name)
        shutil.rmtree(hidden, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Swap two folders, atomically on Linux: killed between two renames, a process would leave no folder at `path`."""
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
    """Context: a temporary path that is renamed to `file` at the end; after an exception, it is deleted.

    Raises:
        LilyError: before anything is written, if `file` exists and `overwrite` is False, or its folder is missing.
        OSError: naming `file`, if the disk is full.
    """
    path = Path(file).expanduser().absolute()
    if path.is_dir():
        raise LilyError(f"{file} is a folder; name a file")
    if path.exists() and not overwrite:
        raise LilyError(f"{file} exists; name another file, or give --overwrite (in Python overwrite=True)")
    if not path.parent.is_dir():
        raise LilyError(f"{file}: there is no folder {path.parent}; make it first")
    with naming(path), _scratch(path) as scratch:
        new = scratch / path.name
        yield new
        _finish(new)
        os.replace(new, path)
        sync(path.parent)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A temporary folder in the folder of `path`, so that its contents can be renamed to `path`."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(file: Path) -> None:
    """Apply the default permissions, since safetensors makes files private, and fsync."""
    os.chmod(file, 0o666 & ~_umask())
    sync(file)


def sync(path: str | os.PathLike[str]) -> None:
    """Fsync a file, or a folder to make renames in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
