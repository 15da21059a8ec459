"""Images as rows, the VTAB-1K protocol, and what makes an image an input."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import vtab
from lily.errors import LilyError
from lily.recipes.data import images
from lily.recipes.data.images import Preprocess, read_images
from lily.recipes.dreambooth import latents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for c, (label, count) in enumerate({"cat": 7, "dog": 5, "emu": 3}.items()):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8 + c, 6), (10 * i, 50 * c, 7)).save(tmp_path / "pets" / label / f"{i}.png")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "pets"


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(Path(row["image"]).name, row["label"]) for row in read_images(path)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("ending", ["tar.xz", "tar.gz", "tar", "zip"])
def test_an_archive_reads_like_its_folder(folder, tmp_path, ending):
    archive = tmp_path / f"pets.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(archive, "w") as bundle:
            for file in folder.rglob("*.*"):
                bundle.write(file, f"top/{file.relative_to(folder)}")
    else:
        mode = {"tar.xz": "w:xz", "tar.gz": "w:gz", "tar": "w"}[ending]
        with tarfile.open(archive, mode) as tar:
            tar.add(folder, "top")
    assert pairs(archive) == pairs(folder)
    assert len(pairs(folder)) == 15
    assert not list(images.unpacked(archive).rglob("*.txt"))


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        info = tarfile.TarInfo("../../evil.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(LilyError, match="points outside of the archive's folder"):
        list(read_images(tmp_path / "evil.tar"))
    assert not list(tmp_path.parent.glob("evil.png"))
    assert not (tmp_path / "cache" / "images").exists() or not list((tmp_path / "cache" / "images").iterdir())


@pytest.mark.parametrize(
    ("name", "says"),
    [("broken.tar", "not a readable archive"), ("broken.zip", "not a readable archive"), ("list.txt", "is not a file")],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"word\n")
    with pytest.raises(LilyError, match=says):
        list(read_images(tmp_path / name))


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(LilyError, match="one folder per class"):
        list(read_images(tmp_path / "a"))


def test_a_list_is_read_relative_to_its_own_folder(folder):
    (folder / "train.txt").write_text("cat/0.png 3\n\ndog/1.png 12\n")
    assert pairs(folder / "train.txt") == [("0.png", "3"), ("1.png", "12")]
    (folder / "train.txt").write_text("cat/0.png 3\ncat/99.png 3\n")
    with pytest.raises(LilyError, match=r"train.txt:2: there is no file .*99.png"):
        list(read_images(folder / "train.txt"))


def test_preprocessing_normalises_and_squeezes_or_crops(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 8, 20))
    image.save(tmp_path / "x.png")
    squeezed, cropped = (Preprocess(10, "half", crop)(tmp_path / "x.png") for crop in (False, True))
    assert squeezed.shape == cropped.shape == (3, 10, 10)
    assert squeezed.dtype == torch.float32
    assert squeezed[2, 5, 0] > 0.9  # the blue edge is squeezed in, and cropped away
    assert torch.allclose(cropped[:, 5, 5], torch.tensor([1.0, -1.0, -1.0]))
    assert (cropped[2] < -0.9).all()
    mean = Preprocess(10)(tmp_path / "x.png")[1, 5, 9]
    assert mean == pytest.approx((0 - 0.456) / 0.224, abs=1e-4)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photograph_is_turned_as_it_is_shown(tmp_path, orientation):
    shown = Image.new("RGB", (16, 8), (255, 0, 0))
    shown.paste((0, 0, 255), (0, 0, 8, 8))
    stored = shown.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
                              8: Image.Transpose.ROTATE_270}[orientation])  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    shown.save(tmp_path / "shown.png")
    read = Preprocess(size=8, norm="half")
    assert torch.equal(read(tmp_path / "photo.png"), read(tmp_path / "shown.png"))
    assert torch.equal(read(Image.open(tmp_path / "photo.png")), read(tmp_path / "shown.png"))
    pixels, sizes = latents.read([tmp_path / "photo.png", tmp_path / "shown.png"], 8)
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(sizes[0], sizes[1])


def test_a_photograph_with_a_damaged_note_is_read(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0 damaged")
    assert Preprocess(size=8)(tmp_path / "x.jpg").shape == (3, 8, 8)


@pytest.mark.parametrize(("bits", "mode", "dtype"), [(16, "I;16", "uint16"), (16, "I", "int32"), (8, "F", "float32")])
def test_a_gray_image_of_more_bits_is_read_as_that_of_eight(tmp_path, bits, mode, dtype):
    gray = np.linspace(3, 250, 64).round().astype("uint8").reshape(8, 8)
    Image.fromarray(gray).save(tmp_path / "eight.png")
    more = Image.fromarray((gray.astype("uint32") << (bits - 8)).astype(dtype))
    assert more.mode == mode
    more.save(tmp_path / "more.tif")
    read = Preprocess(size=8, norm="half")
    assert torch.equal(read(str(tmp_path / "more.tif")), read(str(tmp_path / "eight.png")))


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64), np.linspace(-5, 200, 64), np.linspace(0, 1e5, 64)])
def test_values_of_no_known_range_are_refused(tmp_path, values):
    Image.fromarray(values.astype("float32").reshape(8, 8)).save(tmp_path / "x.tif")
    with pytest.raises(LilyError, match="expected 8 or 16 bits"):
        Preprocess(size=8)(str(tmp_path / "x.tif"))


def test_images_that_cannot_be_read_are_counted(folder):
    (first,) = {Path(row["image"]).parent for row in list(read_images(folder))[:1]}
    Image.new("P", (4, 4)).save(first / "moving.gif")
    (first / "phone.HEIC").write_bytes(b"x")
    (first / "notes.txt").write_text("x")
    said = []
    assert str(first / "moving.gif") in [row["image"] for row in read_images(folder, said.append)]
    assert [text.partition(" (")[2] for text in said] == ["1 .heic); convert them to .jpg or .png"]


def test_what_programs_put_beside_images_is_left_out(folder, tmp_path):
    before = list(read_images(folder))
    kind = Path(before[0]["image"]).parent
    for junk in (
        kind / "._1.png",
        folder / ".ipynb_checkpoints" / "1.png",
        folder / "__MACOSX" / kind.name / "._1.png",
    ):
        junk.parent.mkdir(parents=True, exist_ok=True)
        junk.write_bytes(Path(before[0]["image"]).read_bytes() if "checkpoints" in str(junk) else b"Mac OS X")
    assert list(read_images(folder)) == before
    assert len(list(images.rows_below(folder, "image"))) == len(before)
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as bundle:
        for file in folder.rglob("*.*"):
            bundle.write(file, Path("mine" if "__MACOSX" not in file.parts else "", file.relative_to(folder)))
    found = list(read_images(tmp_path / "mac.zip"))
    assert [row["label"] for row in found] == [row["label"] for row in before]


def test_a_single_image_is_a_row(folder):
    first = next(read_images(folder))["image"]
    assert list(images.rows_below(Path(first), "picture")) == [{"picture": first}]


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(LilyError, match=r"x\.png: not a readable image"):
        Preprocess(8)(tmp_path / "x.png")


def test_a_broken_file_is_found_before_training(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(LilyError, match=r"x\.png: not a readable image \(no format of images\); remove or replace it"):
        images.digest(str(tmp_path / "x.png"))


def test_the_protocol_writes_the_public_layout(folder, tmp_path):
    chosen = vtab.build(folder, tmp_path / "out", train=8, validation=4)
    lists = {name: pairs(tmp_path / "out" / name) for name in ("train8.txt", "val4.txt", "train8val4.txt", "test.txt")}
    assert [len(rows) for rows in lists.values()] == [8, 4, 12, 3]
    assert lists["train8val4.txt"] == lists["train8.txt"] + lists["val4.txt"]
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["cat", "dog", "emu"]
    assert [label for _, label in lists["train8.txt"]] == ["0"] * 4 + ["1"] * 3 + ["2"] * 1
    files = [file for part in (chosen.train, chosen.validation, chosen.test) for file, _ in part]
    assert len(set(files)) == 15
    first = next(iter(read_images(tmp_path / "out" / "train8.txt")))
    assert Path(first["image"]).read_bytes() == Path(chosen.train[0][0]).read_bytes()
    with pytest.raises(LilyError, match="exists"):
        vtab.build(folder, tmp_path / "out", train=8, validation=4)


def test_a_test_class_that_was_never_trained_on_is_refused(folder, tmp_path):
    (tmp_path / "more" / "yak").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "more" / "yak" / "0.png")
    with pytest.raises(LilyError, match="class 'yak'"):
        vtab.build(folder, tmp_path / "out", test=tmp_path / "more", train=8, validation=4)
    assert not (tmp_path / "out").exists()


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 60), min_size=1, max_size=9),
    st.integers(0, 5),
    st.data(),
)
def test_a_choice_is_exact_disjoint_and_independent_of_order(sizes, seed, data):
    pool = [(f"{label}/{i}", label) for label, size in sizes.items() for i in range(size)]
    train = data.draw(st.integers(min(len(sizes), len(pool)), len(pool)))
    validation = data.draw(st.integers(0, len(pool) - train))
    chosen = vtab.choose(pool, train, validation, seed)
    assert (len(chosen.train), len(chosen.validation)) == (train, validation)
    assert sorted([*chosen.train, *chosen.validation, *chosen.test]) == sorted(pool)
    random.Random(seed).shuffle(pool)
    assert vtab.choose(pool, train, validation, seed) == chosen
    assert {label for _, label in chosen.train} == set(sizes)


def test_too_few_images_or_too_many_classes_are_refused():
    with pytest.raises(LilyError, match="too few"):
        vtab.choose([("a", "x")] * 5, 4, 2)
    with pytest.raises(LilyError, match="6 classes"):
        vtab.choose([(str(i), str(i)) for i in range(6)], 3, 1)
