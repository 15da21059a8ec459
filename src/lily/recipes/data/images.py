"""Images as rows, from folders by class, archives and lists of files, and their preprocessing."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.recipes.data.cells import short
from lily.recipes.data.delimited import Note
from lily.recipes.data.sources import building, cache_folder

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef")  # images, but not Pillow's
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")

# Mean and standard deviation per channel that pretrained image models expect.
NORMS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Preprocess:
    """From an image to a model's input: upright, RGB, resized, scaled to [0, 1], normalized.

    Attributes:
        size: height and width in pixels.
        norm: key of `NORMS`.
        crop: resize the shorter side and crop the center; otherwise resize to a square regardless of the aspect
            ratio, as in the VTAB protocol.
    """

    size: int = 224
    norm: str = "imagenet"
    crop: bool = False

    def batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The model inputs of examples.

        Args:
            examples: each with an `image`, and optionally its class index as `labels`.

        Returns:
            `pixel_values` (batch, 3, size, size), float32, and `labels` (batch,), int64, if all have one.
        """
        import torch

        inputs = {"pixel_values": torch.stack([self(example["image"]) for example in examples])}
        if all("labels" in example for example in examples):
            inputs["labels"] = torch.tensor([example["labels"] for example in examples])
        return inputs

    def __call__(self, source: Any) -> Tensor:
        """Read and prepare one image, from its path or a PIL image: (3, size, size), float32.

        Raises:
            LilyError: if the file is not a readable image.
        """
        import numpy as np
        import torch
        from PIL import Image

        try:
            if isinstance(source, Image.Image):
                image = _rgb(source)
            else:
                with Image.open(source) as file:
                    image = _rgb(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LilyError(f"{source}: not a readable image ({error}); remove or replace it") from None
        width, height = image.size
        if self.crop:
            scale = self.size / min(width, height)
            width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + self.size, top + self.size))
        else:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[self.norm])
        return (pixels - mean) / std


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as it is shown: cameras store photographs as the sensor lay, with a note (EXIF) of how to turn them."""
    from PIL import ExifTags, ImageOps

    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # whatever Pillow makes of damaged notes, the image itself can be read
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image upright with 8 bits for each color. Pillow cuts larger values off at 255: a photograph of 16 bits turns
    white.

    Raises:
        ValueError: if its values have no known range.
    """
    import numpy as np
    from PIL import Image

    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if low < 0 or high > 0xFFFF or (image.mode == "F" and (high > 0xFF or high <= 1)):
            raise ValueError(f"values from {low:g} to {high:g}, expected 8 or 16 bits")
        if image.mode != "F" and (image.mode != "I" or high > 0xFF):
            image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def holds_images(path: Path) -> bool:
    """Whether `read_images` reads this path: a folder, an archive or a list, not a table."""
    return path.is_dir() or is_archive(path) or path.name.lower().endswith(".txt")


def is_image(path: Path) -> bool:
    """Whether a file is called like an image."""
    return path.suffix.lower() in ENDINGS and not is_stray(path.name) and path.is_file()


def is_stray(name: str) -> bool:
    """Whether a program put a file or folder of this name beside the data, as macOS and Jupyter do."""
    return name.startswith(".") or name == "__MACOSX"


def is_archive(path: Path) -> bool:
    """Whether a file may be an archive of folders of images."""
    return path.name.lower().endswith(ARCHIVES)


def is_list(path: Path) -> bool:
    """Whether a text file lists images with their classes, as VTAB-1K's do, by its first line."""
    if not path.name.lower().endswith(".txt"):
        return False
    with path.open("rb") as file:
        name, _, label = file.readline(1 << 12).decode("utf-8", "replace").strip().rpartition(" ")
    return bool(label) and name.lower().endswith(ENDINGS)


def image_of(value: Any, column: str, where: str, folder: Path | None = None) -> Any:
    """The image in a table's row: the path of a file, or a PIL image as in data sets of the hub.

    `where` is for messages; `folder` is the base of relative paths, by default the working directory.

    Raises:
        LilyError: if it is neither, or the file does not exist.
    """
    if hasattr(value, "convert"):
        return value
    if not isinstance(value, str) or not value.strip():
        raise LilyError(f"{where}: column {column!r} holds {short(value)}, expected the path of an image")
    path = (folder or Path()) / Path(value).expanduser()
    if not path.is_file():
        raise LilyError(f"{where}: there is no image {path}; paths are read relative to the table's own folder")
    return str(path)


def digest(image: Any) -> str:
    """SHA-256 of an image's bytes, by which duplicates are detected.

    Raises:
        LilyError: if a file has no image's header: training would find that out at its first use.
    """
    from PIL import Image

    if hasattr(image, "convert"):
        return hashlib.sha256(image.tobytes()).hexdigest()
    data = Path(image).read_bytes()
    try:
        with Image.open(io.BytesIO(data)):
            return hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        what = "it is empty" if not data else "no format of images" if "cannot identify" in str(error) else str(error)
        raise LilyError(f"{image}: not a readable image ({what}); remove or replace it") from None


def read_images(path: Path, note: Note = lambda _: None) -> Iterator[dict[str, Any]]:
    """Rows of images and their classes, sorted by path.

    Args:
        path: a folder with one folder per class; an archive of one (unpacked once, into the cache); or a list of
            files as VTAB-1K has them, `images/x.jpg 12` in each line, relative to the list's folder.
        note: called with a sentence about images in a folder that cannot be read.

    Yields:
        `image` (the file's path) and `label`.

    Raises:
        LilyError: if there are no images, or a listed file is missing.
    """
    if path.is_dir():
        unread = Counter(p.suffix.lower() for p in path.rglob("*") if p.suffix.lower() in UNREAD)
        if unread:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in unread.most_common())
            note(f"{path}: images of other formats are left out ({kinds}); convert them to .jpg or .png")
        yield from _by_class(path)
    elif path.name.lower().endswith(ARCHIVES):
        yield from _by_class(unpacked(path))
    else:
        yield from _listed(path)


def rows_below(path: Path, column: str) -> Iterator[dict[str, Any]]:
    """Rows of an image, of those anywhere below a folder, or in an archive or a list: `column` -> path, no classes.

    Raises:
        LilyError: if there are no images.
    """
    if is_image(path):
        files = [str(path)]
    elif path.is_file() and not path.name.lower().endswith(ARCHIVES):
        files = [row["image"] for row in _listed(path)]
    else:
        top = path if path.is_dir() else unpacked(path)
        below = (p for p in top.rglob("*") if not any(map(is_stray, p.relative_to(top).parts)))
        files = sorted(str(p) for p in below if is_image(p))
    if not files:
        raise LilyError(f"{path}: there are no images ({', '.join(ENDINGS)})")
    yield from ({column: file} for file in files)


def _by_class(folder: Path) -> Iterator[dict[str, Any]]:
    top, seen = folder, set()
    while not any(_classes(top)):  # an archive often has one folder around the classes
        below = [p for p in top.iterdir() if p.is_dir() and not is_stray(p.name)]
        if len(below) != 1 or below[0] in seen:
            raise LilyError(f"{folder}: no folders of images; make one folder per class, with its name")
        top = below[0]
        seen.add(top)
    for name, files in _classes(top):
        for file in files:
            yield {"image": str(file), "label": name}


def _classes(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    for below in sorted(p for p in folder.iterdir() if p.is_dir() and not is_stray(p.name)):
        files = sorted(p for p in below.iterdir() if is_image(p))
        if files:
            yield below.name, files


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LilyError(f"{path}: cannot be read as a list of images ({error}); give a folder or a list") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        file = path.parent / name
        if not name or not label:
            raise LilyError(f"{path}:{number}: {line!r} is not a file and its class, such as images/x.jpg 12")
        if not file.is_file():
            raise LilyError(f"{path}:{number}: there is no file {file}; the list is read relative to its own folder")
        yield {"image": str(file), "label": label}


def unpacked(archive: Path) -> Path:
    """The folder of an archive's images, unpacked once into the cache. Only images are unpacked.

    Raises:
        LilyError: if it cannot be read, or a name in it leaves its folder.
    """
    state = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / "images" / f"{archive.name.partition('.')[0]}-{key}"
    if not target.is_dir():
        with building(target) as temporary:
            temporary.mkdir()
            try:
                _unpack(archive, temporary)
            except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
                raise LilyError(f"{archive}: not a readable archive ({error}); check the file") from None
    return target


def _unpack(archive: Path, target: Path) -> None:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir() and _is_image(archive, info.filename):
                    with bundle.open(info) as source:
                        _copy(source, target / info.filename)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and _is_image(archive, member.name):
                _copy(tar.extractfile(member), target / member.name)


def _is_image(archive: Path, name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise LilyError(f"{archive}: {name!r} points outside of the archive's folder; remove it from the archive")
    return path.suffix.lower() in ENDINGS and not any(map(is_stray, path.parts))


def _copy(source: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
