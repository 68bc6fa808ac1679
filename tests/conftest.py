"""What many tests need: the tiny assets, small feature sets made of them, and a Ray of their own."""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ASSETS = Path(__file__).parent / "assets"
TINY = str(ASSETS / "voxtral-tiny")
WHISPER = str(ASSETS / "whisper-tiny")
SPEECH = ASSETS / "speech"
TASKS = ("asr", "sqa", "tqa")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what it sends to the background with "&"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that tests start and interrupt would inherit it


SHARED_RAY = pytest.StashKey[set[Path]]()
"""The modules with tests that use ``local_ray``."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Modules that start Ray take longest: they come first, so that two test processes end at the same time.

    Those that use ``local_ray`` come before the others, so that they share one Ray.
    """
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    shared = {item.path for item in items if "local_ray" in getattr(item, "fixturenames", ())}
    config.stash[SHARED_RAY] = shared
    items.sort(key=lambda item: (item.path not in shared, item.path not in with_ray))


def manifest(name: str) -> str:
    """Absolute path of one of the assets' manifests, such as ``asr.train``."""
    return str(SPEECH / f"{name}.jsonl")


def read_rows(path: str) -> list[dict]:
    """Rows of a manifest, with absolute audio paths."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if "audio_path" in row:
            row["audio_path"] = str(Path(path).parent / row["audio_path"])
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write a manifest; returns its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pytest_collection_finish() -> None:
    """Take the imported libraries out of the garbage collector's sight, which would look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Manifests with a few rows of each task: ``asr.train``, ``tqa.val`` and so on -> path."""
    folder, sizes = tmp_path_factory.mktemp("small"), {"train": 12, "val": 4}
    names = [f"{task}.{part}" for task in TASKS for part in sizes]
    return {
        name: write_rows(folder / f"{name}.jsonl", read_rows(manifest(name))[: sizes[name.partition(".")[2]]])
        for name in names
    }


@pytest.fixture(scope="session")
def salmonn_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Parts of a tiny SALMONN, by the training job's flags."""
    from helpers.salmonn_tiny import write_parts

    return write_parts(tmp_path_factory.mktemp("salmonn-parts"))


@pytest.fixture(scope="session")
def salmonn(salmonn_parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny SALMONN, whose weights between the encoders and the language model are new."""
    from helpers.salmonn_tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("salmonn"), salmonn_parts)


@pytest.fixture(scope="session")
def make_features(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, ...]]:
    """Featurize manifests with a tiny model in this process; returns their feature sets."""
    from voxray.features.extract import Extractor, FeatureSpec
    from voxray.features.featurize import featurize

    shared = tmp_path_factory.mktemp("features")

    def make(*manifests: str, folder: Path = shared, model_id: str = TINY, **storing: Any) -> tuple[Path, ...]:
        extractor = Extractor(model_id, FeatureSpec(**storing))
        return featurize(manifests, extractor, folder, rows_per_shard=8, use_ray=False).folders

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores the threads of one small matrix product spend most of their time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def local_ray() -> None:
    """A Ray of this test process. The modules that use it share it, because Ray takes seconds to start and to stop."""
    from voxray.cluster.session import RAY_SETTINGS

    os.environ.update(RAY_SETTINGS)
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=False)


@pytest.fixture(scope="module", autouse=True)
def no_shared_ray_elsewhere(request: pytest.FixtureRequest) -> None:
    """Stop the shared Ray before a module that does not use it: some code behaves differently while Ray runs."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and request.path not in request.config.stash[SHARED_RAY]:
        ray.shutdown()


@pytest.fixture
def by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the classes of a test's module travel to Ray's processes, which cannot import it."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture
def evaluation_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the evaluate job do everything in this process, without Ray."""
    from voxray.commands import evaluate as job

    monkeypatch.setattr(job, "ray_session", lambda *args: nullcontext())
    for name in ("make_features", "answer_rows", "check_invariance"):
        monkeypatch.setattr(job, name, partial(getattr(job, name), use_ray=False))
