"""Archives: only files of the language are unpacked, whatever else they contain."""

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from voxray.core.errors import RunError
from voxray.corpora import unpack as unpacking
from voxray.corpora.select import clip_member_path, release_member_path
from voxray.corpora.unpack import unpack


def packed(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    """Write an archive. A (name, bytes) tuple is a regular file."""
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tuple):
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
            else:
                tar.addfile(member)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_language_of_a_release_is_unpacked_without_folders(tmp_path):
    members = [
        ("cv/ko/train.tsv", b"table"),
        ("cv/ko/clips/a.mp3", b"sound"),
        ("cv/ko/clips/._a.mp3", b"of a Mac"),
        ("cv/ko/clips/run.sh", b"no clip"),
        ("cv/en/train.tsv", b"other table"),
        ("cv/en/clips/b.mp3", b"other sound"),
        ("cv/README", b"text"),
    ]
    languages: set[str] = set()
    count = unpack(packed(tmp_path / "cv.tar.gz", *members), tmp_path / "out", release_member_path("ko", languages))
    assert count == 2 and languages == {"ko", "en"}
    assert everything(tmp_path / "out") == {"train.tsv", "clips/a.mp3"}
    assert (tmp_path / "out" / "clips" / "a.mp3").read_bytes() == b"sound"


def test_complete_files_are_not_written_again(tmp_path):
    archive = packed(tmp_path / "a.tar.gz", ("x/a.mp3", b"sound"), ("x/b.mp3", b"other"))
    unpack(archive, tmp_path / "out", clip_member_path)
    complete, partial = tmp_path / "out" / "clips" / "a.mp3", tmp_path / "out" / "clips" / "b.mp3"
    before = complete.stat().st_mtime_ns
    partial.write_bytes(b"ot")
    assert unpack(archive, tmp_path / "out", clip_member_path) == 2
    assert complete.stat().st_mtime_ns == before and partial.read_bytes() == b"other"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("../../ko/clips/evil.mp3", b"x"), "outside"),
        (("/tmp/ko/clips/evil.mp3", b"x"), "outside its folder"),
        (special("cv/ko/clips/evil.mp3", tarfile.SYMTYPE, "/etc/passwd"), "absolute path"),
        (special("cv/ko/clips/evil.mp3", tarfile.SYMTYPE, "other.mp3"), "a link or a device"),
        (special("cv/ko/clips/evil.mp3", tarfile.LNKTYPE, "../../../etc/passwd"), "outside"),
        (special("cv/ko/clips/evil.mp3", tarfile.CHRTYPE), "special file"),
        (special("cv/ko/clips/evil.mp3", tarfile.FIFOTYPE), "special file"),
    ],
    ids=["dots", "absolute", "link-out", "link", "hard-link", "device", "pipe"],
)
def test_hostile_members_are_refused(tmp_path, member, message):
    archive = packed(tmp_path / "evil.tar.gz", ("cv/ko/train.tsv", b"table"), member)
    inside = tmp_path / "a" / "b" / "out"
    with pytest.raises(RunError, match=f"evil.tar.gz: refused, .*{message}"):
        unpack(archive, inside, release_member_path("ko", set()))
    assert everything(tmp_path) == {"evil.tar.gz", "a/b/out/train.tsv"}


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "SLACK_BYTES", 1 << 20)
    archive = packed(tmp_path / "bomb.tar.gz", ("ko/clips/a.mp3", bytes(8 << 20)))
    assert archive.stat().st_size < 100_000
    with pytest.raises(RunError, match="refused, over 1 MiB come out of 0 MiB"):
        unpack(archive, tmp_path / "out", release_member_path("ko", set()))
    assert not (tmp_path / "out").exists()


def test_a_lack_of_disk_space_is_detected_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda folder: unpacking.shutil._ntuple_diskusage(9, 9, 9))
    archive = packed(tmp_path / "a.tar.gz", ("ko/clips/a.mp3", bytes(2 << 20)))
    with pytest.raises(RunError, match=r"the disk is full: 'ko/clips/a.mp3' needs 2 MiB"):
        unpack(archive, tmp_path / "out", release_member_path("ko", set()))


@pytest.mark.parametrize("damage", ["cut", "garbage", "broken", "no tar"])
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    sound = bytes(range(256)) * 40
    raw = packed(tmp_path / "a.tar.gz", ("ko/clips/a.mp3", sound), ("ko/clips/b.mp3", sound[::-1])).read_bytes()
    middle = len(raw) // 2
    changed = {
        "cut": raw[:middle],
        "garbage": b"no archive at all" * 100,
        "broken": raw[:middle] + bytes(40) + raw[middle + 40 :],
        "no tar": gzip.compress(b"text" * 1000),
    }
    (tmp_path / "a.tar.gz").write_bytes(changed[damage])
    with pytest.raises(RunError, match=r"a\.tar\.gz: damaged, so nothing of it is taken: ."):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out", release_member_path("ko", set()))
    assert everything(tmp_path) == {"a.tar.gz"}


def named(kind: bytes, size: int, count: int = 1) -> bytes:
    """Members of a kind that hold the name of the next one, and that one."""
    head = tarfile.TarInfo("././@LongLink")
    head.size, head.type = size, kind
    name = head.tobuf(tarfile.GNU_FORMAT) + b"a" * (size + -size % 512)
    return name * count + tarfile.TarInfo("cv/ko/clips/a.mp3").tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
def test_a_name_of_many_bytes_is_refused_before_it_is_read(tmp_path, kind):
    """tarfile reads names into memory as a whole: 1 GiB of them compresses to 1 MiB."""
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(named(kind, 40 << 20), 1))
    tracemalloc.start()
    with pytest.raises(RunError, match=r"a\.tar\.gz: damaged, so nothing of it is taken: a name of 40 MiB"):
        unpack(path, tmp_path / "out", clip_member_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_headers_count_as_unpacked_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "SLACK_BYTES", 1 << 20)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(named(b"L", 100_000, count=20)))
    with pytest.raises(RunError, match="refused, over 1 MiB come out of 0 MiB"):
        unpack(path, tmp_path / "out", clip_member_path)


def test_a_name_within_a_name_without_end_is_one_line(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(named(b"L", 0, count=5000)))
    with pytest.raises(RunError, match=r"a\.tar\.gz: damaged"):
        unpack(path, tmp_path / "out", clip_member_path)


def test_two_members_for_one_file_are_refused(tmp_path):
    """Otherwise the second is taken for a copy that is there already, and two rows have one clip."""
    train, test = ("x/train/a.mp3", b"sound"), ("x/test/a.mp3", b"other")
    with pytest.raises(RunError, match=r"a\.tar\.gz:x/train/a\.mp3 and a\.tar\.gz:x/test/a\.mp3 are two files"):
        unpack(packed(tmp_path / "a.tar.gz", train, test), tmp_path / "out", clip_member_path)
    archives = [packed(tmp_path / "b.tar.gz", train), packed(tmp_path / "c.tar.gz", test)]
    shared: dict[str, str] = {}
    unpack(archives[0], tmp_path / "two", clip_member_path, members_by_target=shared)
    with pytest.raises(RunError, match=r"b\.tar\.gz:x/train/a\.mp3 and c\.tar\.gz:x/test/a\.mp3 are two files"):
        unpack(archives[1], tmp_path / "two", clip_member_path, members_by_target=shared)
    repeated = packed(tmp_path / "d.tar.gz", train, train)
    assert unpack(repeated, tmp_path / "three", clip_member_path) == 2
