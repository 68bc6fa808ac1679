"""prefetch: whatever the model and the corpus come from, one folder with all that training needs, and its lock file."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import TINY
from helpers.corpora import save_to_disk
from helpers.prefetching import COMMIT, DATASET, MODEL, SIZES, archive, clips, hub, release, serving, table
from helpers.running import ROOT, environment, load_job, parse_only

from voxray.audio.decode import decode
from voxray.commands import prefetch
from voxray.config.flag_groups import ClipLimitFlags
from voxray.core.errors import RunError, SettingsError
from voxray.core.units import format_bytes
from voxray.core.version import __version__
from voxray.corpora.prepare import check_rows as prepare
from voxray.features.reader import Features
from voxray.prefetch.lock_file import LOCK_FILE_NAME

pytestmark = pytest.mark.usefixtures("here")
ROWS = {"train": SIZES["train"], "validation": SIZES["dev"], "test": SIZES["test"]}
WIDE = "--leaks allow --duplicates keep"
"""The assets' texts repeat each other, and by far."""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this process, without Ray, and with no way out of it."""
    monkeypatch.setattr(prefetch, "ray_session", lambda *args: nullcontext())
    for name in ("run_prepare_job", "make_features"):
        monkeypatch.setattr(prefetch, name, partial(getattr(prefetch, name), use_ray=False))

    def refuse(self: socket.socket, address: Any) -> None:
        assert isinstance(address, tuple) and address[0] == "127.0.0.1", f"a connection to {address}"
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def release_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = release(tmp_path_factory.mktemp("release"))
    shutil.copytree(folder / "ko", folder / "ky")
    return folder


def run(line: str, **options: Any) -> dict[str, Any]:
    """Run the job from its flags; returns the steps of the lock file."""
    return prefetch.run_prefetch(parse_only("prefetch", line.split()), **options)


def of_hub(hub_folder: Path, output: Path, more: str = "") -> str:
    return f"--model_id {MODEL} --dataset {DATASET} --hub {hub_folder} --output_dir {output} {WIDE} {more}"


def of_release(dataset: Path, output: Path, more: str = "") -> str:
    return f"--model_id {TINY} --dataset {dataset} --output_dir {output} {WIDE} {more}"


def rows_of(output: Path, name: str = "train") -> list[dict]:
    return [json.loads(line) for line in (output / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def check(output: Path, num_rows: dict[str, int] = ROWS) -> None:
    """Manifests of all splits whose clips are 16 kHz copies below them, in the corpus' order, and their features."""
    original = {name: (sentence, sound) for name, sentence, sound in clips()}
    for split, count in num_rows.items():
        rows = rows_of(output, split)
        assert len(rows) == count
        for row in rows:
            clip = output / "data" / row["audio_path"]
            assert not Path(row["audio_path"]).is_absolute() and clip.suffix == ".flac"
            info = soundfile.info(clip)
            assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
            sentence, sound = original[f"{row['id']}.mp3"]
            assert (row["transcript"], row["language"]) == (sentence, "ko")
            copied, source = decode(str(clip), 16_000), decode("x.mp3", 16_000, sound)
            assert len(copied) == len(source) and np.abs(copied - source).max() <= 0.5 / 32_768 + 1e-7
    sets = [path.parent for path in (output / "features").glob("*/set.json")]
    assert sum(len(Features([folder])) for folder in sets) == sum(num_rows.values())


def test_a_hub_in_a_folder(hub_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = run(of_hub(hub_folder, tmp_path / "D"))
    check(tmp_path / "D")
    assert {path.name for path in (tmp_path / "D" / "model").iterdir()} == {path.name for path in Path(TINY).iterdir()}
    assert steps["data"]["rows"] == ROWS
    output = capsys.readouterr().out
    command = next(line.split()[1:] for line in output.splitlines() if line.startswith("  python jobs/"))
    settings = parse_only(Path(command[0]).stem, command[1:])
    assert settings.train_jsonl == (str(tmp_path / "D" / "data" / "train.jsonl"),)
    assert settings.model_id == str(tmp_path / "D" / "model")


def test_the_lock_file_names_everything(hub_folder: Path, tmp_path: Path) -> None:
    run(of_hub(hub_folder, tmp_path / "D"))
    lock = json.loads((tmp_path / "D" / LOCK_FILE_NAME).read_text())
    assert (lock["format"], lock["voxray"]) == (1, __version__)
    steps = lock["steps"]
    assert steps["model"]["asked"] == {"model_id": MODEL, "model_revision": "", "hub": str(hub_folder)}
    for entry in (entry for name in ("model", "data", "features") for entry in steps[name]["files"]):
        raw = (tmp_path / "D" / entry["path"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest()), entry["path"]
    sources = {entry["path"] for entry in steps["corpus"]["sources"]}
    splits = ("train", "dev", "test")
    tars = {f"audio/ko/{split}/ko_{split}_0.tar" for split in splits}
    assert sources == tars | {f"transcript/ko/{split}.tsv" for split in splits}
    lines = (tmp_path / "D" / "data" / "clips.sha256").read_text()
    done = subprocess.run(["sha256sum", "-c", "--quiet"], cwd=tmp_path / "D" / "data", input=lines, text=True)
    assert done.returncode == 0 and len(lines.splitlines()) == sum(ROWS.values()) == steps["data"]["clips"]["files"]
    described = {entry["manifest"]: entry for entry in steps["features"]["sets"]}
    assert set(described) == {str(tmp_path / "D" / "data" / f"{split}.jsonl") for split in ROWS}
    assert all(len(entry["fingerprint"]) == 64 for entry in described.values())


def test_a_server_and_a_second_run_without_it(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever main is by then, the second run is of the commit in the lock file, and asks nobody."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    with serving(hub_folder) as server:
        line = f"--model_id {MODEL} --model_revision v1 --dataset {DATASET} --dataset_revision main {WIDE}"
        line += f" --hub {server.url} --output_dir {tmp_path / 'D'}"
        steps = run(line)
        check(tmp_path / "D")
        assert (steps["model"]["commit"], steps["corpus"]["commit"]) == (COMMIT, COMMIT)
        assert not server.downloads("ko_invalidated.tsv") and not server.downloads("en_train_0.tar")
        assert not (tmp_path / "D" / "raw" / "hub").exists(), "unpacked tars are not kept beside their clips"
        before = listing(tmp_path / "D")
        num_requests = len(server.requests)
        capsys.readouterr()
        assert run(line) == steps
        assert len(server.requests) == num_requests and listing(tmp_path / "D") == before
        assert "data: train 8, validation 2, test 2 rows are there" in capsys.readouterr().out
    written = [path for path in (tmp_path / "D").rglob("*.json*") if path.is_file()]
    assert written and not any("hf_secret_value" in path.read_text() for path in written)


@pytest.mark.parametrize("form", ["release", "language", "archive"])
def test_common_voice_as_it_is_downloaded(form: str, release_folder: Path, tmp_path: Path) -> None:
    if form == "archive":
        dataset = archive(release_folder, tmp_path / "cv-corpus-17.0-2024-03-15-ko.tar.gz")
    else:
        dataset = release_folder / "ko" if form == "language" else release_folder
    steps = run(of_release(dataset, tmp_path / "D"))
    check(tmp_path / "D")
    assert (tmp_path / "D" / "raw").exists() == (form == "archive"), "what lies on disk already is read there"
    if form == "archive":
        assert [entry["path"] for entry in steps["corpus"]["sources"]] == [dataset.name]
    else:
        assert steps["corpus"]["clips"]["files"] == sum(SIZES.values())


def parquet(folder: Path) -> Path:
    """A mirror in Parquet, in two languages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for language in ("ko", "en"):
        for split, start, end in (("train", 0, 8), ("validation", 8, 10), ("test", 10, 12)):
            rows = clips()[start:end]
            values = {
                "id": [name.removesuffix(".mp3") for name, _, _ in rows],
                "sentence": [sentence for _, sentence, _ in rows],
                "audio": [{"bytes": sound, "path": name} for name, _, sound in rows],
            }
            (folder / language).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(values), folder / language / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_parquet_mirror_keeps_its_splits(tmp_path: Path) -> None:
    run(of_release(parquet(tmp_path / "mirror"), tmp_path / "D"))
    check(tmp_path / "D")
    assert not list((tmp_path / "D" / "data").glob("*.clips")), "embedded clips are not written twice"
    with pytest.raises(RunError, match=r"--language fr: .*mirror does not hold it, but en, ko"):
        run(of_release(tmp_path / "mirror", tmp_path / "E", "--language fr"))


def test_what_save_to_disk_writes_is_taken(tmp_path: Path) -> None:
    rows = []
    for name, sentence, sound in clips():
        (tmp_path / name).write_bytes(sound)
        rows.append({"audio": str(tmp_path / name), "sentence": sentence})
    splits = {"train": rows[:8], "validation": rows[8:10], "test": rows[10:12]}
    run(of_release(save_to_disk(tmp_path / "saved", splits), tmp_path / "D", "--no_features"))
    for split, wanted in splits.items():
        assert [row["transcript"] for row in rows_of(tmp_path / "D", split)] == [row["sentence"] for row in wanted]


def test_a_language_that_is_not_there(hub_folder: Path, release_folder: Path, tmp_path: Path) -> None:
    packed = archive(release_folder, tmp_path / "cv.tar.gz")
    with pytest.raises(RunError, match=f"--language fr: {DATASET} does not hold it, but en, ko"):
        run(of_hub(hub_folder, tmp_path / "C", "--language fr"))
    for dataset in (release_folder, packed):
        with pytest.raises(RunError, match=r"--language fr: .* does not hold it, but ko, ky"):
            run(of_release(dataset, tmp_path / "D", "--language fr"))


def test_rows_that_cannot_be_used_are_in_the_ledger(release_folder: Path, tmp_path: Path) -> None:
    """Sound that cannot be decoded, a clip that is not there, and a row of another language."""
    folder = tmp_path / "ko"
    shutil.copytree(release_folder / "ko", folder)
    rows = clips()
    (folder / "clips" / rows[0][0]).write_bytes(b"no sound")
    (folder / "clips" / rows[1][0]).unlink()
    (folder / "dev.tsv").write_text(table(rows[8:10], "dev").replace("\tko\t", "\tja\t", 1))
    run(of_release(folder, tmp_path / "D"))
    ledger = [json.loads(line) for line in (tmp_path / "D" / "data" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {(entry["id"], entry["reason"]) for entry in ledger}
    names = [name.removesuffix(".mp3") for name, *_ in rows]
    assert reasons == {(names[0], "audio_unreadable"), (names[1], "audio_missing"), (names[8], "other_language")}
    check(tmp_path / "D", {"train": 6, "validation": 1, "test": 2})
    with pytest.raises(RunError, match=r"train\.tsv:\d: .* \(--strict\)"):
        run(of_release(folder, tmp_path / "E", "--strict"))


def test_dry_run_writes_nothing(
    hub_folder: Path, release_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (of_hub(hub_folder, tmp_path / "D"), of_release(release_folder, tmp_path / "D")):
        assert run(f"{line} --dry_run") == {}
        output = capsys.readouterr().out
        assert not list(tmp_path.iterdir()) and "nothing is written" in output and "enough" in output
        assert format_bytes(sum(path.stat().st_size for path in Path(TINY).iterdir())) in output
    seconds = sum(len(decode("x.mp3", 16_000, sound)) for *_, sound in clips()) / 16_000
    assert f"about 0:00:{round(seconds):02} h of speech" in output, "clips on disk are measured"


def test_moved_elsewhere_it_still_loads(hub_folder: Path, tmp_path: Path, make_features: Callable) -> None:
    run(of_hub(hub_folder, tmp_path / "D", "--no_features --no_keep_raw"))
    assert not (tmp_path / "D" / "features").exists() and not (tmp_path / "D" / "raw").exists()
    shutil.move(tmp_path / "D", tmp_path / "elsewhere" / "E")
    manifest = tmp_path / "elsewhere" / "E" / "data" / "train.jsonl"
    (folder,) = make_features(str(manifest), folder=tmp_path / "features")
    assert len(Features([folder])) == ROWS["train"] and not (folder / "quarantine.jsonl").read_text()
    steps = run(of_hub(hub_folder, tmp_path / "elsewhere" / "E"))
    check(tmp_path / "elsewhere" / "E")
    shutil.move(tmp_path / "elsewhere" / "E", tmp_path / "F")
    again = run(of_hub(hub_folder, tmp_path / "F"))
    check(tmp_path / "F")  # with no features of the manifests that were elsewhere
    assert again["features"]["sets"][0]["content"] == steps["features"]["sets"][0]["content"]


def test_changes_are_refused_unless_overwritten(hub_folder: Path, release_folder: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "D", tmp_path / "model"
    shutil.copytree(TINY, model)
    line = of_release(release_folder, out).replace(TINY, str(model))
    run(line)
    for more, message in (
        ("--language ky", r"--language \(was ko, now ky\)"),
        ("--max_sec 5", r"--max_sec \(was 30.0, now 5.0\)"),
        ("--splits train", r"--splits \(was train,validation,test, now train\)"),
    ):
        with pytest.raises(SettingsError, match=f"{message}; use --overwrite"):
            run(f"{line} {more}")
    check(out)
    (model / "generation_config.json").write_text("{ }" + " " * 122)
    with pytest.raises(SettingsError, match=r"generation_config\.json is not what it was; use --overwrite"):
        run(line)
    run(f"{line} --overwrite --max_sec 1.6")
    assert (out / "model" / "generation_config.json").read_text().startswith("{ }")
    assert 0 < len(rows_of(out)) < ROWS["train"]
    assert not (out / "data" / "test.jsonl").exists(), "a manifest without a row, which no job would take"
    named = {row["audio_path"] for split in ("train", "validation") for row in rows_of(out, split)}
    assert {str(path.relative_to(out / "data")) for path in (out / "data").rglob("*.flac")} == named


def test_damage_is_found_and_put_right(hub_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "D"
    run(of_hub(hub_folder, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "features" not in path.parts}
    clip = out / "data" / rows_of(out)[0]["audio_path"]
    shard = next(out.glob("features/*/shards/*.arrow"))
    features = shard.read_bytes()
    for path in (out / "model" / "model.safetensors", clip, shard):
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    run(of_hub(hub_folder, out))
    assert clip.read_bytes() != before[clip], "without --verify, the right size is enough"
    run(of_hub(hub_folder, out, "--verify"))
    changed = [path for path, raw in before.items() if path.read_bytes() != raw]
    assert set(changed) <= {out / LOCK_FILE_NAME} and shard.read_bytes() == features
    (out / "model" / "config.json").unlink()
    run(of_hub(hub_folder, out))
    assert (out / "model" / "config.json").read_bytes() == before[out / "model" / "config.json"]


def test_what_another_start_left_does_not_mix_in(
    hub_folder: Path, release_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after the model and the tables of one source, started with others: nothing of the first stays."""
    from voxray.corpora import fetch as corpus_source

    out, other = tmp_path / "D", tmp_path / "other"
    shutil.copytree(TINY, other)
    (other / "added_tokens.json").write_text("{}")
    with monkeypatch.context() as patch:

        def cut_off(*args: Any) -> int:
            raise RunError("cut off")

        patch.setattr(corpus_source, "unpack", cut_off)
        patch.setattr(prefetch, "damaged", lambda *args, **options: [])
        with pytest.raises(RunError, match="cut off"):
            run(of_hub(hub_folder, out, "--language en"))
    assert (out / "raw" / "corpus" / "train.tsv").is_file()
    lock = json.loads((out / LOCK_FILE_NAME).read_text())
    del lock["steps"]["model"]["done"]
    (out / LOCK_FILE_NAME).write_text(json.dumps(lock))
    (out / "model" / "added_tokens.json").write_text("{}")
    run(of_hub(hub_folder, out).replace(f"--model_id {MODEL}", f"--model_id {TINY}"))
    check(out)
    assert not (out / "model" / "added_tokens.json").exists()
    (tmp_path / "mine" / "data" / "audio").mkdir(parents=True)
    with pytest.raises(SettingsError, match="holds a folder data that is not of this job"):
        run(of_release(release_folder, tmp_path / "mine"))


KILLED = """
import os, signal, sys
from contextlib import nullcontext
from functools import partial
from voxray.commands import prefetch
from voxray.config.prefetch import PrefetchSettings
from voxray.config.prepare import PrepareSettings
from voxray.corpora.prepare import check_rows as prepare
from helpers.running import parse_only
prefetch.ray_session = lambda *args: nullcontext()
prefetch.run_prepare_job = partial(prefetch.run_prepare_job, use_ray=False)
prefetch.PrepareSettings = partial(PrepareSettings, rows_per_chunk=3)
left, check = [8], prepare.RowChecker.check_row
def dying(self, row):
    left[0] -= 1
    return check(self, row) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
prepare.RowChecker.check_row = dying
prefetch.run_prefetch(parse_only("prefetch", sys.argv[1:]))
"""


def test_kill_9_among_the_rows(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eighth row of twelve kills the process: the six of the first two chunks are not looked at again."""
    line = of_hub(hub_folder, tmp_path / "D")
    env = {**environment(), "PYTHONPATH": f"{environment()['PYTHONPATH']}:{ROOT}/tests"}
    done = subprocess.run([sys.executable, "-c", KILLED, *line.split()], env=env, timeout=120, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    out = tmp_path / "D"
    assert not list((out / "data").glob("*.jsonl")) and len(list((out / "data").rglob("*.flac"))) == 7
    lock = json.loads((out / LOCK_FILE_NAME).read_text())["steps"]
    assert "done" in lock["corpus"] and "done" not in lock["data"]
    stray = out / "data" / "audio" / "00" / "0.flac"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"of a row that is left out in the end")
    checked: list[str] = []
    check_row = prepare.RowChecker.check_row

    def counted(self: Any, row: dict) -> Any:
        checked.append(row["id"])
        return check_row(self, row)

    monkeypatch.setattr(prepare.RowChecker, "check_row", counted)
    monkeypatch.setattr(prefetch, "PrepareSettings", partial(prefetch.PrepareSettings, rows_per_chunk=3))
    monkeypatch.setattr(prefetch, "download_and_unpack", None)  # what is unpacked is not unpacked again
    run(line)
    assert len(checked) == 6 and not stray.exists()
    check(out)
    assert not list((out / "data").glob(".work-*"))


def test_a_damaged_archive_is_one_line(
    release_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = archive(release_folder, tmp_path / "cv.tar.gz")
    packed.write_bytes(packed.read_bytes()[:50_000])
    with pytest.raises(SystemExit) as end:
        load_job("prefetch").main(of_release(packed, tmp_path / "D").split())
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "cv.tar.gz: damaged, so nothing of it is taken" in message
    archive(release_folder, packed)
    run(of_release(packed, tmp_path / "D"))
    check(tmp_path / "D")


def test_splits_and_max_rows(hub_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(of_hub(hub_folder, tmp_path / "D", "--splits train,dev --max_rows 2"))
    check(tmp_path / "D", {"train": 2, "validation": 2})
    assert not (tmp_path / "D" / "data" / "test.jsonl").exists()
    assert "rows not asked for (--splits, --max_rows): train 6" in capsys.readouterr().out
    for words, message in (("dev", "must hold train"), ("train,both", "both is not one of train")):
        with pytest.raises(SystemExit):
            parse_only("prefetch", ["--dataset", "x", "--splits", words])
        assert message in capsys.readouterr().err


def test_rows_without_a_split_get_validation_drawn_by_speaker(release_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(release_folder / "ko", tmp_path / "ko")
    for name in ("train", "dev", "test"):
        (tmp_path / "ko" / f"{name}.tsv").unlink()
    run(of_release(tmp_path / "ko", tmp_path / "D", "--val_share 0.5 --no_features --storage_path /x"))
    train, held_out = rows_of(tmp_path / "D"), rows_of(tmp_path / "D", "validation")
    assert len(train) == len(held_out) == 6
    assert not {row["speaker"] for row in train} & {row["speaker"] for row in held_out}


def test_flags_are_handed_on(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits reach prepare, the stored form reaches featurize, and the folder is below --storage_path."""
    calls: list[Any] = []

    def stop(settings: Any, *args: Any, **options: Any) -> Any:
        calls.append(settings)
        raise RunError("seen")

    numbers = dict(zip(ClipLimitFlags.model_fields, (0.1, 30, -50, -60, 0.02, 0.03, 2, -80, 0.5), strict=True))
    own = {"min_sec": 0.1, "max_sec": 12, "max_chars": 50, "val_share": 0.3, "seed": 4, "num_actors": 3}
    words = {"duplicates": "keep", "leaks": "refuse"}
    stored = {"store": "pcm16", "cache_dtype": "float32", "cache_budget_gib": 7, "rows_per_shard": 5}
    values = {**numbers, **own, **words, **stored, "output_dir": "D", "storage_path": str(tmp_path)}
    line = " ".join(f"--{name} {value}" for name, value in values.items())
    line = f"--model_id {MODEL} --dataset {DATASET} --hub {hub_folder} --bf16 {line}"
    with monkeypatch.context() as patch:
        patch.setattr(prefetch, "run_prepare_job", stop)
        with pytest.raises(RunError, match="seen"):
            run(line)
    passed = calls.pop().model_dump()
    assert {name: passed[name] for name in (*numbers, *own, *words)} == {**numbers, **own, **words}
    assert passed["audio_output"] == str(tmp_path / "D" / "data" / "audio")
    monkeypatch.setattr(prefetch, "make_features", stop)
    with pytest.raises(RunError, match="seen"):
        run(f"{line.replace('--leaks refuse', '--leaks allow')} --verify")
    passed = calls.pop().model_dump()
    expected = {**stored, "num_actors": 3, "bf16": True, "verify": True}
    assert {name: passed[name] for name in expected} == expected


def test_credentials_in_a_url_are_refused_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_only("prefetch", ["--dataset", "x/y", "--hub", "https://me:hf_secret_value@hub.example"])
    message = capsys.readouterr().err
    assert "--hub: take the credentials out" in message and "secret" not in message


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cv-corpus.tar.gz", str(tmp_path / "cv"), "./cv"):
        with pytest.raises(RunError, match="no such file or folder"):
            run(f"--model_id {TINY} --dataset {name} --output_dir {tmp_path / 'D'} --dry_run")


def test_old_spellings() -> None:
    line = "--model_name_or_path some/model --dataset_name some/data --language_abbr sv-SE --out_dir out"
    settings = parse_only("prefetch", line.split())
    assert (settings.model_id, settings.dataset, settings.language) == ("some/model", "some/data", "sv-SE")
    assert settings.output_dir == "out"
