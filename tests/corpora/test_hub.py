"""Repositories on a real server with the hub's API, in folders and in a hub cache."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY
from helpers.prefetching import COMMIT, DATASET, MODEL, HubServer, hub, serving
from helpers.running import environment

from voxray.core.errors import RunError, SettingsError
from voxray.corpora.hub import model_files, open_repository
from voxray.corpora.select import same_language

NEEDED = {path.name for path in Path(TINY).iterdir()}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def server(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(hub_folder) as server:
        yield server


def fetch_all(repository, target: Path) -> list[int]:
    num_bytes: list[int] = []
    for file in model_files(repository):
        repository.fetch(file, target / file.path, num_bytes.append)
    return num_bytes


def test_only_the_needed_files_of_a_model_are_fetched(server, tmp_path):
    repository = open_repository(MODEL, "model", "", server.url)
    assert repository.commit == COMMIT and repository.folder is None
    num_bytes = fetch_all(repository, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NEEDED
    assert sum(num_bytes) == sum(path.stat().st_size for path in Path(TINY).iterdir())
    for path in Path(TINY).iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert all(f"/resolve/{COMMIT}/" in path for _, path, *_ in server.requests if "resolve" in path)


def test_bin_weights_are_used_without_safetensors(tmp_path):
    for name in ("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    paths = [file.path for file in model_files(open_repository(str(tmp_path), "model", "", ""))]
    assert paths == ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(RunError, match=r"neither model\.safetensors nor"):
        model_files(open_repository(str(tmp_path), "model", "", ""))


def test_a_download_resumes_after_kill_9(server, tmp_path):
    """The process is killed after half of the weights. The next one requests only the other half."""
    server.stop_after[WEIGHTS] = 3_000_000
    program = (
        "from pathlib import Path; from huggingface_hub import constants\n"
        "from voxray.corpora.hub import open_repository, model_files\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 1 << 18\n"  # the default is 10 MB, more than the size of this model
        f"repository = open_repository({MODEL!r}, 'model', '', {server.url!r})\n"
        f"for file in model_files(repository): repository.fetch(file, Path({str(tmp_path)!r}, file.path), int)\n"
    )
    env = {**environment(), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, "-c", program], env=env)
    partial, deadline = tmp_path / f".{WEIGHTS}.{COMMIT[:12]}.part", time.monotonic() + 60
    while not partial.is_file() or partial.stat().st_size < 1_000_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait(30)
    num_bytes = partial.stat().st_size
    assert not (tmp_path / WEIGHTS).exists()
    server.stop_after.clear()
    server.requests.clear()
    repository = open_repository(MODEL, "model", "", server.url)
    weights = next(file for file in repository.files if file.path == WEIGHTS)
    repository.fetch(weights, tmp_path / WEIGHTS, int)
    assert server.downloads(WEIGHTS) == [f"bytes={num_bytes}-"]
    assert (tmp_path / WEIGHTS).read_bytes() == Path(TINY, WEIGHTS).read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_damaged_download_is_refused(name, server, tmp_path):
    """Large files are checked by SHA-256, small ones by Git's id. The size is right in both cases."""
    server.damaged.add(name)
    repository = open_repository(MODEL, "model", "", server.url)
    file = next(file for file in repository.files if file.path == name)
    assert bool(file.sha256) == (name == WEIGHTS)
    with pytest.raises(RunError, match=f"{name} arrived damaged"):
        repository.fetch(file, tmp_path / name, int)
    assert not list(tmp_path.iterdir()), "the next attempt starts from zero"


def test_the_token_is_not_sent_to_other_servers(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    fetch_all(open_repository(MODEL, "model", "", server.url), tmp_path)
    assert server.requests and not any(authorization for *_, authorization in server.requests)


def test_missing_repositories_are_one_line(server, hub_folder, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"--model_id no/such: http://.* has no such model"):
        open_repository("no/such", "model", "", server.url)
    with pytest.raises(RunError, match=f"--dataset {DATASET}: .* has no such revision"):
        open_repository(DATASET, "dataset", "v9", server.url)
    with pytest.raises(RunError, match=r"--model_id no/such: neither .*no/such nor .*models--no--such has it"):
        open_repository("no/such", "model", "", str(hub_folder))
    with pytest.raises(RunError, match="neither a folder nor a hub id"):
        open_repository("a/b/c/d", "model", "", server.url)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="has to be fetched, but HF_HUB_OFFLINE is set"):
        open_repository(MODEL, "model", "", server.url)


def test_ids_outside_the_hub_folder_are_refused(hub_folder, tmp_path):
    (hub_folder / "datasets" / "x").mkdir()
    with pytest.raises(SettingsError, match="neither a folder nor a hub id"):
        open_repository("x/../../openai", "dataset", "", str(hub_folder))


def test_server_paths_outside_the_folder_are_refused(hub_folder, server, monkeypatch):
    from helpers.prefetching import _Handler

    entry = {"type": "file", "path": "../../evil.json", "size": 1, "oid": "0"}
    monkeypatch.setattr(_Handler, "_entry", lambda *args: entry)
    with pytest.raises(RunError, match=r"refused, it holds a file outside its folder: '\.\./\.\./evil\.json'"):
        open_repository(MODEL, "model", "", server.url)


def test_a_hub_cache_is_a_hub(tmp_path):
    """The layout of huggingface_hub's cache, checked with ``snapshot_download``."""
    from huggingface_hub import constants, snapshot_download

    snapshot = tmp_path / "models--openai--whisper-small" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in Path(TINY).iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    cached = snapshot_download(MODEL, cache_dir=tmp_path, local_files_only=True)
    assert Path(cached) == snapshot and constants.REPO_ID_SEPARATOR == "--"
    for revision in ("", "main", COMMIT):
        repository = open_repository(MODEL, "model", revision, str(tmp_path))
        assert (repository.commit, {file.path for file in repository.files}) == (COMMIT, NEEDED)
    json.loads((snapshot / "config.json").read_text())


def test_rows_of_a_language_are_selected_however_it_is_written():
    assert all(same_language(*pair) for pair in (("ko", "ko-KR"), ("kor", "Korean"), ("nb", "no"), ("jw", "jv")))
    assert not same_language("zh-CN", "zh-TW") and not same_language("yue", "zh")
