"""Broken input: each case gives a row, a ledger entry with its reason, or an error with file and line."""

import http.server
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import soundfile
from conftest import TINY, write_rows
from helpers.bad_input import PREPARE_LIMITS, Case, build, noise, wav_header

from voxray.audio.decode import Part, decode, decode_native
from voxray.commands.prepare import run_prepare_job
from voxray.config.prepare import PrepareSettings
from voxray.core.errors import BadRow, RunError, job
from voxray.core.manifest import Sample, chunks, read_chunk, require_usable_row
from voxray.core.source import Source
from voxray.core.tasks import TASKS
from voxray.corpora.importers import IMPORTERS, ImportedRow, detect
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize, write_ledger
from voxray.features.reader import Features


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, dict[int, Case]]:
    return build(tmp_path_factory.mktemp("broken"))


def read(path: Path) -> list[dict]:
    """The objects of a strict JSON Lines file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def non_blank_lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))


def differences(cases: dict[int, Case], tool: str, rows: list[int], ledger: list[dict]) -> list[tuple[str, str, str]]:
    """(case, expected outcome, outcome) of every line with an unexpected outcome."""
    outcomes = {entry["line"]: entry["reason"] for entry in ledger} | dict.fromkeys(rows, "row")
    expected = {line: getattr(case, tool) for line, case in cases.items()}
    lines = sorted(expected.keys() | outcomes.keys())
    names = {line: case.name for line, case in cases.items()}
    return [
        (names.get(line, f"line {line}"), expected.get(line, "blank"), outcomes.get(line, "lost"))
        for line in lines
        if expected.get(line) != outcomes.get(line)
    ]


def test_featurize_reports_each_case(broken, tmp_path):
    manifest, cases = broken
    report = featurize([str(manifest)], Extractor(TINY), tmp_path, rows_per_shard=16, use_ray=False)
    write_ledger(tmp_path / "quarantine.jsonl", report.folders)
    ledger = read(tmp_path / "quarantine.jsonl")
    features = Features(report.folders)
    sources = [Source.parse(features.source(number)) for number in range(len(features))]
    assert {source.file for source in sources} == {entry["manifest"] for entry in ledger} == {str(manifest)}
    assert differences(cases, "featurize", [source.line for source in sources], ledger) == []
    assert report.num_rows == len(sources) and report.num_bad == len(ledger)
    assert report.num_rows + report.num_bad == len(cases) == non_blank_lines(manifest)
    messages = [entry["message"] for entry in ledger]
    assert all(
        message and len(message) <= 1000 and "\n" not in message and " object at 0x" not in message
        for message in messages
    )
    ids = [features.ids([number])[0] for number in range(len(features))]
    assert ids.count("same") == 3, "featurize does not change ids"


def test_prepare_reports_each_case(broken, tmp_path):
    manifest, cases = broken
    train, val, ledger, summary = prepare(manifest, tmp_path, leaks="allow", val_share=0.3)
    assert all(entry["source_file"] == str(manifest) and len(entry["message"]) <= 1000 for entry in ledger)
    bad = {entry["line"] for entry in ledger}
    assert differences(cases, "prepare", [line for line in cases if line not in bad], ledger) == []
    assert len(train) + len(val) == sum(case.prepare == "row" for case in cases.values()) and train and val
    assert len(train) + len(val) + len(ledger) == len(cases) == non_blank_lines(manifest) == summary["input"]["rows"]
    parts = [summary["train"], summary["val"], *summary["quarantined"].values()]
    assert sum(part["rows"] for part in parts) == summary["input"]["rows"]
    assert {name: part["rows"] for name, part in summary["quarantined"].items()} == {
        reason: sum(entry["reason"] == reason for entry in ledger) for reason in {entry["reason"] for entry in ledger}
    }
    ids = [row["id"] for row in train + val]
    assert len(set(ids)) == len(ids) and {"same", "same#2", "same#3"} <= set(ids)
    for name in ("train", "val"):  # its output has no broken row
        parts = [read_chunk(chunk) for chunk in chunks(str(tmp_path / f"{name}.jsonl"), 1000)]
        assert [error for part in parts for error in part.bad] == []


def prepare(source: Path, out: Path, **changes) -> tuple[list[dict], list[dict], list[dict], dict]:
    """Run the job with limits that accept bad audio. Returns training rows, validation rows, ledger and summary."""
    values = {"input": str(source), "train_output": str(out / "train.jsonl"), "val_output": str(out / "val.jsonl")}
    settings = PrepareSettings(**{**values, **PREPARE_LIMITS, "rows_per_chunk": 16, **changes})
    run_prepare_job(settings, use_ray=False)
    paths = [out / f"{name}.jsonl" for name in ("train", "val", "quarantine")]
    files = [read(path) if path.is_file() else [] for path in paths]
    return *files, json.loads((out / "prepare_summary.json").read_text())


@pytest.mark.parametrize("name", ["nemo", "huggingface", "ksponspeech", "commonvoice", "kaldi"])
def test_every_importer_accepts_or_refuses_each_clip(broken, name, tmp_path):
    """Without decoding: paths that are not files are refused with their line, and nothing hangs."""
    manifest, cases = broken
    clips = [
        (json.loads(case.line), case.featurize)
        for case in cases.values()
        if case.line.startswith(b'{"audio_path"') and case.featurize not in ("bad_type", "bad_segment")
    ]
    clips = [
        (str(manifest.parent / row["audio_path"]) if row["audio_path"] else "", reason)
        for row, reason in clips
        if "\n" not in row["audio_path"] and "\0" not in row["audio_path"] and row["audio_path"].isprintable()
    ]
    json_key = {"nemo": "audio_filepath", "huggingface": "file_name"}.get(name)
    if json_key:
        path = Path(write_rows(tmp_path / "metadata.jsonl", [{json_key: clip, "text": "네"} for clip, _ in clips]))
        first = 1
    elif name == "ksponspeech":
        path, first = tmp_path / "a.trn", 1
        path.write_text("".join(f"{clip} :: 네\n" for clip, _ in clips))
    elif name == "commonvoice":
        path, first = tmp_path / "a.tsv", 2
        path.write_text("path\tsentence\n" + "".join(f"{clip}\t네\n" for clip, _ in clips))
    else:
        path, first = tmp_path / "wav.scp", 1
        path.write_text("".join(f"u{number} {clip}\n" for number, (clip, _) in enumerate(clips)))
        (tmp_path / "text").write_text("".join(f"u{number} 네\n" for number in range(len(clips))))
    items = list(IMPORTERS[name](path))
    assert sorted(item.line for item in items) == list(range(first, first + len(clips)))
    for item in items:
        clip, reason = clips[item.line - first]
        item_reason = "" if isinstance(item, ImportedRow) else item.reason
        allowed = {"audio_missing", "remote_audio", "missing_key"} if reason == "audio_missing" or not clip else {""}
        assert item_reason in allowed or reason == "old_cache", (clip, item)


# -- input that must not block


@pytest.fixture
def in_time():
    """Fail if the test took 20 s: it must not wait for the other end of a pipe or for a network."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20


def odd_file(kind: str, folder: Path) -> str:
    path = folder / f"odd_{kind}.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        return "/dev/zero"
    elif kind == "link to a device":
        os.symlink("/dev/zero", path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        os.symlink(path, path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    return str(path)


ODD = ["pipe", "device", "link to a device", "folder", "loop", "socket"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ODD)
def test_a_manifest_or_corpus_that_is_not_a_file_is_refused_at_once(tmp_path, kind, in_time):
    path = odd_file(kind, tmp_path)
    with pytest.raises(RunError, match="cannot read the manifest"):
        require_usable_row((path,))
    for name in IMPORTERS:
        with pytest.raises(RunError):
            faults = list(IMPORTERS[name](Path(path)))
            assert all(not isinstance(item, ImportedRow) for item in faults)
            raise RunError("only faults")
    if kind != "loop":
        with pytest.raises(RunError):
            detect(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ODD)
def test_a_clip_that_is_not_a_file_is_refused_at_once(tmp_path, kind, in_time):
    """Also without the check of the manifest, as in ``infer --audio_path``, or if the file has changed since."""
    path = odd_file(kind, tmp_path)
    for part in (Part(), Part(0.5, 1.0)):
        with pytest.raises(BadRow, match="cannot"):
            decode_native(path, part=part)
        sample = Sample("a", TASKS["asr"], "", "네", path, "ko", "m:1", part.start_sec, part.duration_sec)
        with pytest.raises(BadRow) as error:
            Extractor(TINY).sample_rows(sample)
        assert error.value.reason == "audio_unreadable"


@pytest.mark.timeout(30)
def test_pipes_in_a_corpus_folder_are_faults(tmp_path, in_time):
    noise(tmp_path / "kspon" / "a.wav")
    os.mkfifo(tmp_path / "kspon" / "a.txt")
    os.mkfifo(tmp_path / "kspon" / "b.wav")
    (tmp_path / "kspon" / "b.txt").write_text("네")
    faults = list(IMPORTERS["ksponspeech"](tmp_path / "kspon"))
    assert [fault.reason for fault in faults] == ["text_unreadable", "audio_missing"]
    (tmp_path / "parquet").mkdir()
    os.mkfifo(tmp_path / "parquet" / "a.parquet")
    assert [fault.reason for fault in IMPORTERS["huggingface"](tmp_path / "parquet")] == ["damaged_file"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "session"])
def test_text_with_a_url_opens_no_connection(tmp_path, kind, in_time):
    """FFmpeg reads playlists and session descriptions as media: it would download, or listen on a port and wait."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.mp4"
    text = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{url}'\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
        f'mimeType="audio/mp4"><Representation id="1"><BaseURL>{url}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>",
        "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    }[kind]
    for suffix in ("wav", "m4a", "m3u8", "sdp", "mpd"):
        path = tmp_path / f"a.{suffix}"
        path.write_text(text)
        for raw in (None, path.read_bytes()):
            with pytest.raises(BadRow, match=f"cannot decode {path}"):
                decode_native(str(path), raw)
    server.shutdown()
    assert requests == []


def test_a_huge_file_is_read_only_in_part(tmp_path):
    """A sparse file of 1 TiB with a valid header: only as much as the longest clip needs is read."""
    for name, head in (("a.wav", wav_header(2**32 - 45)), ("a.pcm", b"")):
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            file.truncate(1 << 40)
        sample = Sample("a", TASKS["asr"], "", "네", str(tmp_path / name), "ko", "m:1")
        with pytest.raises(BadRow) as error:
            Extractor(TINY).sample_rows(sample)
        assert error.value.reason == "audio_too_long"
        assert len(decode(str(tmp_path / name), 16_000, part=Part(3600, 2.0))) == 32_000


def test_a_segment_may_end_slightly_after_its_file(tmp_path):
    path = noise(tmp_path / "a.wav", sec=2.0)
    assert len(decode(path, 16_000, part=Part(1.0, 1.4))) == 16_000
    with pytest.raises(BadRow, match=r"ends at 2\.00 s, within the segment from 1 s for 1\.6 s") as error:
        decode(path, 16_000, part=Part(1.0, 1.6))
    assert error.value.reason == "audio_too_short"


def test_an_endless_line_is_refused_and_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("voxray.core.manifest.MAX_LINE_BYTES", 1000)
    path = tmp_path / "m.jsonl"
    path.write_text('{"instruction": "i", "output": "o"}\n' + "x" * 1001)
    with pytest.raises(RunError, match=r"m\.jsonl:2: a line of over"):
        list(chunks(str(path), 10))


# -- names that are not UTF-8


def test_names_in_an_old_code_page(tmp_path):
    """A Korean corpus unpacked without converting its code page: files are refused and the ledger is readable."""
    folder = os.fsencode(tmp_path) + b"/kspon"
    os.mkdir(folder)
    for name in (b"\xb0\xa1", b"good"):
        soundfile.write(noise(tmp_path / "x.wav"), soundfile.read(noise(tmp_path / f"{name!r}.wav"))[0], 16_000)
        os.rename(tmp_path / "x.wav", folder + b"/" + name + b".wav")
        Path(os.fsdecode(folder + b"/" + name + b".txt")).write_text("네")
    train, _, ledger, _ = prepare(Path(os.fsdecode(folder)), tmp_path / "out", val_output="")
    assert [row["id"] for row in train] == ["good"]
    assert [(entry["reason"], os.fsencode(entry["source_file"])) for entry in ledger] == [
        ("bad_encoding", folder + b"/\xb0\xa1.txt")
    ]
    manifest = os.fsdecode(os.fsencode(tmp_path) + b"/\xb0.jsonl")
    Path(manifest).write_text('{"instruction": "i", "output": "o"}\n')
    with pytest.raises(RunError, match="its path is not UTF-8"):
        require_usable_row((manifest,))


# -- old feature caches


def old_caches(folder: Path) -> dict[str, str]:
    """Manifests whose rows point to a .pt file that must not be loaded."""
    (folder / "c").mkdir()
    (folder / "c" / "1.pt").write_bytes(b"not to be loaded")
    rows = {
        "audio": {"audio_path": "c/1.pt", "transcript": "네"},
        "null": {"audio_path": None, "mel_path": "c/1.pt", "transcript": "네"},
        "key": {"features": "c/1.pth", "text": "네", "task": "asr"},
        "gone": {"input_features_path": "/gone/1.PT", "labels": [1, 2]},
    }
    return {name: write_rows(folder / f"{name}.jsonl", [row] * 2) for name, row in rows.items()}


COMMAND = (
    r"\.(pt|pth|PT) is of an old feature cache, .*: python jobs/featurize\.py --manifest <the JSONL with audio_path>"
)


@pytest.mark.parametrize("name", ["audio", "null", "key", "gone"])
def test_rows_of_an_old_cache_are_refused(tmp_path, name):
    manifest = old_caches(tmp_path)[name]
    with pytest.raises(RunError, match=rf"{name}\.jsonl:1: .*{COMMAND}$"):
        require_usable_row((manifest,))
    items = list(IMPORTERS[detect(manifest)](Path(manifest)))
    assert [(getattr(item, "reason", "row"), item.line) for item in items] == [("old_cache", 1), ("old_cache", 2)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["audio", "key"])
def test_an_old_cache_ends_every_job_with_one_line(local_ray, tmp_path, name, monkeypatch, capsys):
    import torch

    from voxray.commands.featurize import run_featurize_job
    from voxray.commands.train import run_training
    from voxray.config.featurize import FeaturizeSettings
    from voxray.config.train import MultitaskSettings

    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("an old cache was loaded"))
    manifest = old_caches(tmp_path)[name]
    out = str(tmp_path / "out")
    featurizing = FeaturizeSettings(manifest=manifest, model_id=TINY, output_dir=out)
    training = MultitaskSettings(train_jsonl=manifest, model_id=TINY, output_dir=out)
    preparing = PrepareSettings(input=manifest, train_output=f"{out}/train.jsonl")
    for run, job_settings in (
        (run_featurize_job, featurizing),
        (run_training, training),
        (run_prepare_job, preparing),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            job(lambda _, run=run, job_settings=job_settings: run(job_settings))()
        assert end.value.code == 1
        # A Ray cluster that runs already prints messages of its own.
        [message] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(rf"error: .*{name}\.jsonl:1: .*{COMMAND}", message)
    assert [entry["reason"] for entry in read(tmp_path / "out" / "quarantine.jsonl")] == ["old_cache"] * 2


def test_rows_with_audio_or_text_are_not_old_caches(tmp_path):
    row = {"audio_path": noise(tmp_path / "a.wav"), "transcript": "네", "cache_path": "c/1.pt"}
    text = {"instruction": "i", "output": "the weights are in model.pt"}
    manifest = write_rows(tmp_path / "m.jsonl", [row, text, {"other": "notes.ptx"}])
    (chunk,) = chunks(manifest, 10)
    rows = read_chunk(chunk)
    assert [sample.task.name for sample in rows.samples] == ["asr", "tqa"]
    assert [error.reason for _, error in rows.bad] == ["unknown_task"]
    assert [type(item).__name__ for item in IMPORTERS["jsonl"](Path(manifest))][:2] == ["ImportedRow"] * 2
