"""Hashes by content: what changes them, when they are remembered, and checksums of folders."""

import os
import time
from pathlib import Path

import pytest

from voxray.core import content_hash
from voxray.core.content_hash import CHECKSUMS, damaged_files, file_hash, folder_hash, write_checksums
from voxray.core.storage import checksum

LARGE = 1 << 20


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that are read in full."""
    paths: list[Path] = []

    def count(path: Path) -> str:
        paths.append(path)
        return checksum(path)

    monkeypatch.setattr(content_hash, "checksum", count)
    monkeypatch.setattr(content_hash, "HASHES", tmp_path / "hashes")
    return paths


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file large enough for its hash to be stored."""
    path = tmp_path / "weights"
    path.write_bytes(b"a" * LARGE)
    return path


@pytest.fixture
def any_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes are stored however young the file is."""
    monkeypatch.setattr(content_hash, "SETTLED_SEC", -1.0)


def settle(path: Path) -> None:
    """Give a file a time long ago."""
    os.utime(path, (1, 1))


def test_a_settled_file_is_read_once(weights: Path, reads: list[Path], any_age: None) -> None:
    assert file_hash(weights) == file_hash(weights) == checksum(weights)
    assert len(reads) == 1
    weights.write_bytes(b"b" * LARGE)
    assert file_hash(weights) == checksum(weights)
    assert len(reads) == 2


def test_the_same_size_and_time_do_not_hide_a_change(weights: Path, reads: list[Path], any_age: None) -> None:
    settle(weights)
    file_hash(weights)
    time.sleep(0.05)
    weights.write_bytes(b"b" * LARGE)
    settle(weights)
    assert file_hash(weights) == checksum(weights)


def test_a_file_that_changed_just_now_is_read_again(weights: Path, reads: list[Path]) -> None:
    file_hash(weights)
    file_hash(weights)
    assert len(reads) == 2


def test_a_cache_that_cannot_be_used_changes_nothing(
    tmp_path: Path, weights: Path, any_age: None, reads: list[Path]
) -> None:
    (tmp_path / "hashes").write_text("not a folder")
    assert file_hash(weights) == checksum(weights)
    (tmp_path / "hashes").unlink()
    file_hash(weights)
    [stored] = (tmp_path / "hashes").iterdir()
    for damaged in ("", "[]", "{}", "nonsense"):
        stored.write_text(damaged)
        assert file_hash(weights) == checksum(weights)


def test_names_and_contents_decide_a_folders_hash(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    hashes = [folder_hash(folder)]
    for name, text in (("a", "1"), ("a", "2"), ("sub/b", "2")):
        (folder / name).write_text(text)
        hashes.append(folder_hash(folder))
    (folder / "a").rename(folder / "c")
    hashes.append(folder_hash(folder))
    assert len(set(hashes)) == len(hashes)
    for name in (".lock", "README.md", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert folder_hash(folder) == hashes[-1]


def test_checksums_name_the_damaged_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    assert damaged_files(tmp_path) == []
    write_checksums(tmp_path)
    assert damaged_files(tmp_path) == []
    (tmp_path / "a").write_text("x")
    (tmp_path / "c").unlink()
    assert damaged_files(tmp_path) == ["a", "c"]
    assert damaged_files(tmp_path, ["b"]) == []
    (tmp_path / "README.md").write_text("a card")
    write_checksums(tmp_path)
    before = folder_hash(tmp_path)
    (tmp_path / "README.md").write_text("another card")
    assert damaged_files(tmp_path) == [] and folder_hash(tmp_path) == before
    for damaged in ("", "[]", "nonsense"):
        (tmp_path / CHECKSUMS).write_text(damaged)
        assert damaged_files(tmp_path) == [CHECKSUMS]
