"""Feature sets on other file systems, and the local cache through which they are read."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import TINY, manifest, read_rows, write_rows
from helpers.running import start

from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import CacheLimits, RemotePath, checksum, remote_path
from voxray.features import shard_cache
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.from_settings import open_features_dir
from voxray.features.reader import Features
from voxray.features.shard_cache import fetch

EXTRACTOR_OPTIONS: dict[str, Any] = {"rows_per_shard": 8, "use_ray": False}


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a folder on fsspec's file system in memory."""
    yield "memory://voxray-test"
    fsspec.filesystem("memory").rm("/voxray-test", recursive=True)


@pytest.fixture
def speech(tmp_path: Path) -> str:
    return write_rows(tmp_path / "asr.jsonl", read_rows(manifest("asr.train"))[:24])


def make_remote(url: str, folder: Path, max_bytes: int = 10**9) -> RemotePath:
    return remote_path(url, "--features_dir", CacheLimits(str(folder), max_bytes))


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in shard_cache.SUFFIXES)


def test_remote_sets_hold_what_local_ones_hold(memory, speech, tmp_path):
    extractor = Extractor(TINY)
    local = featurize([speech], extractor, tmp_path / "f", **EXTRACTOR_OPTIONS)
    remote = featurize([speech], extractor, make_remote(memory, tmp_path / "cache"), **EXTRACTOR_OPTIONS)
    assert (remote.num_rows, remote.num_made) == (local.num_rows, 24)
    for path in sorted(local.folders[0].rglob("*.*")):
        inner = str(path.relative_to(local.folders[0]))
        assert (remote.folders[0] / inner).read_bytes() == path.read_bytes(), inner
    here, there = Features(local.folders), Features(remote.folders)
    assert here.fingerprint() == there.fingerprint() and here.num_tokens.tolist() == there.num_tokens.tolist()
    for number in (23, 0, 11, 8):
        assert here.row(number).audio.tobytes() == there.row(number).audio.tobytes()
    again = featurize([speech], extractor, make_remote(memory, tmp_path / "cache"), **EXTRACTOR_OPTIONS)
    assert again.num_made == 0


def test_a_remote_set_is_mended_like_a_local_one(memory, speech, tmp_path):
    remote_dir = make_remote(memory, tmp_path / "cache")
    [folder] = featurize([speech], Extractor(TINY), remote_dir, **EXTRACTOR_OPTIONS).folders
    (folder / "shards" / "00001.arrow").unlink()
    assert featurize([speech], Extractor(TINY), remote_dir, **EXTRACTOR_OPTIONS).num_made == 8
    shard = folder / "shards" / "00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" * 9)
    assert featurize([speech], Extractor(TINY), remote_dir, **EXTRACTOR_OPTIONS).num_made == 0, "nobody looked"
    with pytest.raises(RunError, match=r"00002\.arrow: damaged: .* run featurize --verify"):
        Features([folder]).row(20)
    assert featurize([speech], Extractor(TINY), remote_dir, verify=True, **EXTRACTOR_OPTIONS).num_made == 8
    assert Features([folder]).row(20).num_samples


def test_shards_json_is_a_manifest_with_checksums(speech, tmp_path):
    [folder] = featurize([speech], Extractor(TINY), tmp_path / "f", **EXTRACTOR_OPTIONS).folders
    shards = json.loads((folder / "shards.json").read_text())
    assert len(shards) == 3
    for number, shard in enumerate(shards):
        path = folder / "shards" / f"{number:05d}.arrow"
        assert [end for end, _ in shard.pop("parts")][-1] == path.stat().st_size
        assert shard == {"rows": 8, "bytes": path.stat().st_size, "sha256": checksum(path)}
    damaged = folder / "shards" / "00000.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert featurize([speech], Extractor(TINY), tmp_path / "f", **EXTRACTOR_OPTIONS).num_made == 0
    assert featurize([speech], Extractor(TINY), tmp_path / "f", verify=True, **EXTRACTOR_OPTIONS).num_made == 8
    assert checksum(damaged) == shards[0]["sha256"]


def files(folder: Path, memory: str, count: int, size: int, max_bytes: int) -> list[tuple[RemotePath, str]]:
    remote_dir = make_remote(memory, folder, max_bytes)
    entries = []
    for number in range(count):
        path = remote_dir / f"{number}.arrow"
        path.write_bytes(bytes([number]) * size)
        (folder.parent / "one").write_bytes(bytes([number]) * size)
        entries.append((path, checksum(folder.parent / "one")))
    return entries


def test_the_cache_keeps_what_was_used_last_and_never_more_than_its_budget(memory, tmp_path):
    cache = tmp_path / "cache"
    uploaded = files(cache, memory, 5, 1000, 3500)
    paths = {}
    for turn, number in enumerate((0, 1, 2, 0, 3, 4)):
        paths[number] = fetch(*uploaded[number], 1000)
        os.utime(paths[number], (turn, turn))  # the clock of a test is too coarse
        assert cached_bytes(cache) <= 3500
    assert {number for number, path in paths.items() if path.is_file()} == {0, 3, 4}
    assert paths[4].read_bytes() == b"\x04" * 1000


def test_files_that_cannot_be_cached_are_one_line(memory, tmp_path):
    (path, sha256), *_ = files(tmp_path / "cache", memory, 1, 1000, 999)
    with pytest.raises(RunError, match=r"--features_cache_gib: memory://voxray-test/0\.arrow: .* do not fit"):
        fetch(path, sha256, 1000)
    with pytest.raises(RunError, match=r"0\.arrow: damaged"):
        fetch(replace(path, cache=CacheLimits(str(tmp_path / "cache"), 5000)), "0" * 64, 1000)
    assert cached_bytes(tmp_path / "cache") == 0
    with pytest.raises(RunError, match=r"gone\.arrow: cannot be read"):
        fetch(make_remote(memory, tmp_path / "cache") / "gone.arrow", sha256, 1000)


def test_what_dead_downloads_left_makes_room(memory, tmp_path):
    cache = tmp_path / "cache"
    [(path, sha256)] = files(cache, memory, 1, 1000, 1500)
    cache.mkdir()
    left = cache / "abc.123.part"
    left.write_bytes(b"x" * 900)
    with pytest.raises(RunError, match="full of downloads"):
        fetch(path, sha256, 1000)
    os.utime(left, (0, 0))
    assert fetch(path, sha256, 1000).is_file() and not left.exists()


def test_many_threads_share_a_small_cache(memory, speech, tmp_path):
    """Shards are thrown out and fetched again while others read; every row is right, and the budget holds."""
    remote_dir = make_remote(memory, tmp_path / "cache")
    [folder] = featurize([speech], Extractor(TINY), remote_dir, rows_per_shard=2, use_ray=False).folders
    sizes = [shard["bytes"] for shard in json.loads((folder / "shards.json").read_text())]
    small = replace(folder, cache=CacheLimits(str(tmp_path / "cache"), 3 * max(sizes) + 20_000))
    expected = [Features([folder]).row(number).audio.tobytes() for number in range(24)]
    for path in (tmp_path / "cache").glob("*.arrow"):
        path.unlink()
    peak, stop, faults = [0], threading.Event(), []

    def look() -> None:
        while not stop.wait(0.001):
            try:
                peak[0] = max(peak[0], cached_bytes(tmp_path / "cache"))
            except FileNotFoundError:
                continue

    def read(offset: int) -> None:
        features = Features([small])
        features._max_open = 1
        for number in range(60):
            number = (number * 7 + offset) % 24
            if features.row(number).audio.tobytes() != expected[number]:
                faults.append(number)

    watcher = threading.Thread(target=look)
    watcher.start()
    read(0)
    stop.set()
    watcher.join()
    assert not faults and 0 < peak[0] <= 3 * max(sizes) + 20_000


@pytest.mark.slow
def test_processes_share_a_cache(tmp_path):
    """Two processes fetch the same files at the same time; both get them, and one copy stays."""
    source = tmp_path / "there"
    source.mkdir()
    entries = []
    for number in range(4):
        (source / f"{number}.arrow").write_bytes(bytes([number]) * 100_000)
        entries.append((f"{number}.arrow", checksum(source / f"{number}.arrow")))
    with get_context("spawn").Pool(2) as pool:
        results = pool.starmap(fetch_all, [(str(source), str(tmp_path / "cache"), entries)] * 2)
    assert results == [400_000, 400_000] and cached_bytes(tmp_path / "cache") == 400_000


def fetch_all(source: str, cache: str, entries: list[tuple[str, str]]) -> int:
    remote_dir = remote_path(f"file://{source}", "--features_dir", CacheLimits(cache, 10**6))
    return sum(fetch(remote_dir / name, sha256, 100_000).stat().st_size for name, sha256 in entries)


def settings(**changes: Any) -> MultitaskSettings:
    return MultitaskSettings.model_validate({"train_jsonl": ("t",), "output_dir": "o", **changes})


def test_urls_that_cannot_be_used_are_one_line(tmp_path):
    for url, message in (
        ("s3://key:secret@bucket/f", "--features_dir: take the credentials out of the URL"),
        ("nosuch://bucket/f", "--features_dir nosuch://bucket/f: "),
    ):
        with pytest.raises(SettingsError, match=message) as refused:
            open_features_dir(settings(), url, "", flag="--features_dir")
        assert "secret" not in str(refused.value)
    with pytest.raises(SettingsError, match=r"--features_cache_dir s3://b: must be a folder of this machine"):
        open_features_dir(settings(features_cache_dir="s3://b"), "memory://x", "", flag="--features_dir")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--features_dir file://.*/file/f: cannot write there"):
        open_features_dir(settings(), f"file://{tmp_path}/file/f", "", flag="--features_dir")


def test_the_cache_flags_reach_the_cache(tmp_path):
    job_settings = settings(features_cache_dir=str(tmp_path / "c"), features_cache_gib=2)
    remote_dir = open_features_dir(job_settings, "memory://voxray-flags", "", flag="--features_dir")
    assert isinstance(remote_dir, RemotePath) and remote_dir.cache == CacheLimits(str(tmp_path / "c"), 2 * 2**30)


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[str]:
    """URL of a folder on an FTP server of this test's own: a file system that processes reach by the network only."""
    authorizers = pytest.importorskip("pyftpdlib.authorizers")
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    (tmp_path / "server").mkdir()
    authorizer = authorizers.DummyAuthorizer()
    authorizer.add_anonymous(str(tmp_path / "server"), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"handle_exit": False}, daemon=True)
    thread.start()
    yield f"ftp://127.0.0.1:{server.address[1]}/features"
    server.close_all()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_jobs_share_features_over_the_network(ftp, speech, tmp_path):
    """featurize writes to a URL from Ray's processes; training in another job finds everything there, and reads it."""
    common = ["--model_id", TINY, "--features_cache_dir", str(tmp_path / "cache"), "--rows_per_shard", "4"]
    began = time.monotonic()
    featurized = start("featurize", ["--manifest", speech, "--output_dir", ftp, *common], cwd=tmp_path)
    assert featurized.returncode == 0, featurized.stdout + featurized.stderr
    assert "24 of them made now" in featurized.stdout and ftp in featurized.stdout
    flags = ["--train_jsonl", speech, "--features_dir", ftp, "--output_dir", str(tmp_path / "run"), "--debug"]
    trained = start("train_multitask", [*flags, "--num_workers", "0", *common], cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "all of them already stored" in trained.stdout and (tmp_path / "run" / "adapter").is_dir()
    assert list((tmp_path / "cache").glob("*.arrow")) and time.monotonic() - began < 150
