"""Members of packages: checked before opened, unpacked whole, never installed; then offline."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from lily.errors import LilyError
from lily.recipes.data import sources
from lily.recipes.spec.data import Package, Source

METADATA = "Metadata-Version: 2.1\nName: tinypack\nVersion: 1.0\n"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A local package index with one wheel, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tinypack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinypack/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tinypack/data/rows.csv", "text,label\na,0\n")
        archive.writestr("tinypack/model/config.json", "{}")
        archive.writestr("tinypack/model/deep/x.txt", "x")
        archive.writestr("tinypack/evil/../../../escaped.txt", "x")
        archive.writestr("tinypack-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tinypack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinypack-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "cache"))
    return path


def package(wheel, member, **changes):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Source(
        package=Package(**{"name": "tinypack", "version": "1.0", "member": member, "sha256": digest, **changes})
    )


def test_a_file_and_a_folder_are_unpacked_and_nothing_else(wheel, tmp_path):
    file = sources.fetch(package(wheel, "tinypack/data/rows.csv"))
    assert file.read_text() == "text,label\na,0\n"
    folder = sources.fetch(package(wheel, "tinypack/model"))
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == ["config.json", "deep", "deep/x.txt"]
    assert not list((tmp_path / "cache").rglob("__init__.py"))
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name.startswith(".")]


def test_the_second_time_needs_no_index(wheel, monkeypatch):
    first = sources.fetch(package(wheel, "tinypack/data/rows.csv"))
    source = package(wheel, "tinypack/data/rows.csv")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert sources.fetch(source) == first


def test_a_wrong_checksum_is_refused_before_the_file_is_opened(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(LilyError, match="expected " + "0" * 64):
        sources.fetch(package(wheel, "tinypack/data/rows.csv", sha256="0" * 64))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_member_that_is_missing_names_near_ones(wheel):
    with pytest.raises(LilyError, match=r"has no member 'tinypack/data/row.csv'; did you mean tinypack/data/rows.csv"):
        sources.fetch(package(wheel, "tinypack/data/row.csv"))


def test_a_package_that_cannot_be_had_says_why(wheel):
    with pytest.raises(LilyError, match=r"package tinypack==2.0 could not be downloaded: .*tinypack==2.0"):
        sources.fetch(package(wheel, "tinypack/data/rows.csv", version="2.0"))


@pytest.mark.parametrize("member", ["../x", "/etc/passwd", "tinypack/../../../../x"])
def test_a_member_outside_the_folder_is_refused(wheel, member):
    with pytest.raises(LilyError, match="leaves"):
        sources.fetch(package(wheel, member))


def test_an_entry_that_climbs_out_is_refused_and_nothing_stays(wheel, tmp_path):
    with pytest.raises(LilyError, match="leaves its folder"):
        sources.fetch(package(wheel, "tinypack/evil"))
    assert not list(tmp_path.rglob("escaped.txt"))


def test_two_at_once_get_the_same_folder(wheel):
    source = package(wheel, "tinypack/model")
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(sources.fetch, [source, source])
    assert one == two
    assert (one / "deep" / "x.txt").read_text() == "x"


def test_variables_in_a_path_are_expanded(tmp_path, monkeypatch):
    (tmp_path / "glue").mkdir()
    monkeypatch.setenv("LILY_DATA", str(tmp_path))
    assert sources.local_path("${LILY_DATA}/glue") == tmp_path / "glue"
    assert sources.local_path("$LILY_DATA/glue") == tmp_path / "glue"
    monkeypatch.delenv("LILY_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LilyError, match="LILY_DATA is not set"):
        sources.local_path("${LILY_DATA}/glue")


@pytest.mark.network
def test_the_quickstarts_data_comes_from_the_index(tmp_path, monkeypatch):
    from lily.recipes import data, loader

    monkeypatch.setenv("LILY_CACHE", str(tmp_path))
    recipe = loader.load_recipe("quickstart")
    splits = data.load_splits(recipe)
    assert splits.labels == ("0", "1")
    assert len(splits.test) > 2000


def test_a_folder_is_whole_although_a_part_of_it_was_fetched_before(wheel):
    sources.fetch(package(wheel, "tinypack/model/deep"))
    assert (sources.fetch(package(wheel, "tinypack/model")) / "config.json").read_text() == "{}"


@pytest.mark.parametrize("member", [".", ""])
def test_a_whole_package_is_no_member(wheel, member):
    sources.fetch(package(wheel, "tinypack/model"))
    with pytest.raises(LilyError, match="name a path inside the wheel"):
        sources.fetch(package(wheel, member))


def test_a_cache_that_cannot_be_written_names_the_way_out(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LILY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LilyError, match=r"cannot be written .*; set LILY_CACHE"):
        sources.fetch(package(wheel, "tinypack/model"))


@pytest.mark.parametrize("text", ["${FOOBAR}/x", "$FOOBAR/x"])
def test_a_variable_that_is_not_set_is_named_and_none_is_taken_for_a_longer_one(monkeypatch, text):
    monkeypatch.setenv("FOO", "/foo")
    monkeypatch.delenv("FOOBAR", raising=False)
    with pytest.raises(LilyError, match="the variable FOOBAR is not set"):
        sources.local_path(text)
