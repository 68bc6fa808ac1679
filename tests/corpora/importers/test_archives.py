"""Clips inside archives and data sets: NeMo's tar files, lhotse's Shar, and what datasets' save_to_disk writes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from helpers.bad_input import RATE, noise
from helpers.corpora import AUDIO, clip, lines, prepare, read, reasons, save_to_disk

from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.corpora.importers import detect, huggingface
from voxray.corpora.importers.embedded import embedded_audio

LIMITS = {"min_sec": 0.5, "val_output": "", "max_chars_per_sec": 100}


def write_tar(path: Path, *files: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)


def test_tarred_nemo(tmp_path: Path) -> None:
    clips = [Path(noise(tmp_path / "clips" / f"utt{n}.wav", 1.5)) for n in range(3)]
    write_tar(tmp_path / "audio_0.tar", *clips[:2])
    write_tar(tmp_path / "audio_1.tar", clips[2])
    entries = [{"audio_filepath": f"utt{n}.wav", "text": f"글 {n}", "shard_id": n // 2} for n in range(3)]
    others = [{"audio_filepath": "gone.wav", "text": "글", "shard_id": 0}, {**entries[0], "shard_id": 7}]
    path = lines(tmp_path / "tarred_audio_manifest.json", *entries, *others)
    rows, faults = read("nemo", path)
    assert [embedded_audio(row.values["audio_bytes_from"]) for row in rows] == [clip.read_bytes() for clip in clips]
    assert reasons(faults) == [(4, "audio_missing"), (5, "audio_missing")]
    train, _, ledger, _ = prepare(tmp_path, str(path), **LIMITS)
    assert [row["transcript"] for row in train] == ["글 0", "글 1", "글 2"] and len(ledger) == 2
    assert [Path(row["audio_path"]).read_bytes() for row in train] == [clip.read_bytes() for clip in clips]


def test_damaged_archives(tmp_path: Path) -> None:
    whole = Path(noise(tmp_path / "utt0.wav", 1.5))
    write_tar(tmp_path / "audio_0.tar", whole)
    path = lines(tmp_path / "m.json", {"audio_filepath": "utt0.wav", "text": "글", "shard_id": 0})
    [row], _ = read("nemo", path)
    place = row.values["audio_bytes_from"]
    raw = (tmp_path / "audio_0.tar").read_bytes()
    (tmp_path / "audio_0.tar").write_bytes(raw[: place["offset"] + 100])
    with pytest.raises(BadRow, match="ends before the clip"):
        embedded_audio(place)
    (tmp_path / "audio_0.tar").write_bytes(b"no archive" * 100)
    assert reasons(read("nemo", path)[1]) == [(1, "audio_unreadable")]


def test_shar_holds_what_lhotse_loads(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    cuts, texts = [], iter(range(9))
    for number in range(3):
        recording = lhotse.Recording.from_file(noise(tmp_path / f"r{number}.wav", 4.0))
        times = [(0.0, 1.0), (1.0, 1.5)] if number == 2 else [(0.0, 2.5)]
        said = [
            lhotse.SupervisionSegment(
                id=f"s{number}{start}",
                recording_id=recording.id,
                start=start,
                duration=duration,
                text=f"글 {next(texts)}",
            )
            for start, duration in times
        ]
        cuts.append(lhotse.MonoCut(f"c{number}", 0.5 * number, 2.5, channel=0, recording=recording, supervisions=said))
    cut_set, folder = lhotse.CutSet.from_cuts(cuts), tmp_path / "shar"
    folder.mkdir()
    cut_set.to_shar(folder, fields={"recording": "flac"}, shard_size=2)
    cut_set.to_file(tmp_path / "cuts.json")
    expected = {}
    for cut in lhotse.CutSet.from_shar(in_dir=folder):
        for part in cut.supervisions:
            samples = cut.load_audio()[0]
            expected[part.text] = samples[round(part.start * RATE) : round(part.end * RATE)]
    assert detect(folder) == detect(tmp_path / "cuts.json") == "lhotse"
    for path in (folder, tmp_path / "cuts.json"):
        rows, faults = read("lhotse", path)
        assert not faults and {row.values["transcript"] for row in rows} == set(expected)
        for row in rows:
            values = row.values
            file = io.BytesIO(embedded_audio(values["audio_bytes_from"])) if path == folder else values["audio_path"]
            samples, _ = soundfile.read(file, dtype="float32")
            start = round(values.get("start", 0.0) * RATE)
            samples = samples[start : start + round(values["duration"] * RATE)]
            np.testing.assert_allclose(samples, expected[values["transcript"]], atol=1e-4)


def test_a_multi_cut_is_a_row_for_each_channel(tmp_path: Path) -> None:
    source = {"type": "file", "channels": [0, 1], "source": clip(tmp_path / "call.wav")}
    recording = {"id": "call", "sources": [source], "duration": 1.0}
    said = [{"id": f"s{n}", "start": 0.0, "duration": 1.0, "channel": n, "text": f"글 {n}"} for n in range(2)]
    cut = {"id": "c", "type": "MultiCut", "start": 0, "duration": 1.0, "channel": [0, 1], "recording": recording}
    both = {**said[0], "channel": [0, 1]}
    cuts = [{**cut, "supervisions": said}, {**cut, "supervisions": [both]}]
    rows, faults = read("lhotse", lines(tmp_path / "cuts.jsonl", *cuts))
    assert [(row.values["channel"], row.values["transcript"]) for row in rows] == [(0, "글 0"), (1, "글 1")]
    assert reasons(faults) == [(2, "audio_channel")]


def test_save_to_disk(tmp_path: Path) -> None:
    paths = [noise(tmp_path / f"{n}.wav", 1.5) for n in range(3)]
    audio = [{"bytes": Path(paths[0]).read_bytes(), "path": "0.wav"}, {"bytes": None, "path": paths[1]}, None]
    table = pa.table({"audio": pa.array(audio, AUDIO), "sentence": ["영", "일", "이"]})
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    file = folder / "data-00000-of-00001.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name}]}))
    assert detect(tmp_path / "saved") == "huggingface"
    rows, faults = read("huggingface", tmp_path / "saved")
    assert embedded_audio(rows[0].values["audio_bytes_from"]) == Path(paths[0]).read_bytes()
    assert rows[1].values == {"audio_path": paths[1], "transcript": "일", "split": "train"}
    assert [fault.reason for fault in faults] == ["audio_missing"]
    [state] = (tmp_path / "saved").rglob("state.json")
    state.write_text(json.dumps({"_data_files": [{}]}))
    assert reasons(read("huggingface", tmp_path / "saved")[1]) == [(1, "damaged_file")]


SAVED = [{"audio": "", "utterance": "하나", "sentence": "no", "who": "가", "client_id": "no"}]
CHOSEN = {"audio_column": "clip", "text_column": "utterance", "speaker_column": "who", "language_column": "lang"}


@pytest.mark.parametrize("is_parquet", [False, True])
def test_the_users_columns_of_a_data_set(tmp_path: Path, is_parquet: bool) -> None:
    """Flags of prepare replace the columns that are read by default. A missing one is named with the columns."""
    paths = [noise(tmp_path / f"{n}.wav", 3.0) for n in range(2)]
    other = pa.array([{"bytes": b"no audio", "path": "no.wav"}], AUDIO)
    rows = [{**SAVED[0], "audio": paths[0], "lang": "ko", "locale": "en", "part": "train"}]
    folder = save_to_disk(tmp_path / "saved", {"data": rows}, audio="clip", audio_between=other)
    if is_parquet:
        with pa.OSFile(str(next(folder.rglob("*.arrow")))) as source:
            pq.write_table(pa.ipc.open_stream(source).read_all(), tmp_path / "a.parquet")
        folder = tmp_path / "a.parquet"
    flags = {**CHOSEN, "split_column": "part", "val_output": "", "min_chars_per_sec": 0}
    [row], _, ledger, _ = prepare(tmp_path, str(folder), **flags)
    assert not ledger and Path(row["audio_path"]).read_bytes() == Path(paths[0]).read_bytes()
    assert (row["transcript"], row["speaker"], row["language"]) == ("하나", "가", "ko")
    with pytest.raises(
        RunError, match=r"--text_column words: .* has the columns clip, audio, utterance, sentence, who"
    ):
        prepare(tmp_path, str(folder), **{**flags, "text_column": "words"})
    with pytest.raises(SettingsError, match=r"--channel_column --encoding: only for tables"):
        prepare(tmp_path, str(folder), channel_column="who", encoding="cp949")


def test_the_users_columns_of_metadata_files(tmp_path: Path) -> None:
    clip(tmp_path / "a.wav")
    lines(
        tmp_path / "metadata.jsonl", {"file": "a.wav", "sentence": "no", "words": "글", "question": "q", "answer": "a"}
    )
    columns = {"audio": "file", "text": "words", "speaker": ""}
    [row] = huggingface.rows(tmp_path, columns)
    assert row.values == {"audio_path": str(tmp_path / "a.wav"), "transcript": "글"}
    with pytest.raises(RunError, match=r"--text_column no: .*metadata.jsonl has the columns file, sentence, words"):
        list(huggingface.rows(tmp_path, {"text": "no"}))


def test_a_data_set_without_a_column_of_texts_names_its_columns(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", {"train": [{"audio": noise(tmp_path / "a.wav", 1.0), "words": "글"}]})
    with pytest.raises(RunError, match=r"no column transcript, .*; its columns are audio, words; .* --text_column"):
        read("huggingface", folder)


def test_ids_carry_the_split(tmp_path: Path) -> None:
    """All splits have shards of one name, and metadata files of all folders too."""
    path = noise(tmp_path / "a.wav", 1.0)
    splits = {split: [{"audio": path, "text": "글"}] for split in ("test", "train")}
    rows, _ = read("huggingface", save_to_disk(tmp_path / "saved", splits))
    assert [row.id for row in rows] == [f"{split}/data-00000-of-00001.arrow:1" for split in splits]
    for split in splits:
        clip(tmp_path / "files" / split / "a.wav")
        lines(tmp_path / "files" / split / "metadata.jsonl", {"file_name": "a.wav", "text": "글"})
    rows, _ = read("huggingface", tmp_path / "files")
    assert [row.id for row in rows] == ["test/metadata.jsonl:1", "train/metadata.jsonl:1"]


def test_librispeech(tmp_path: Path) -> None:
    folder = tmp_path / "84" / "121123"
    for name in ("84-121123-0000.flac", "84-121123-0001.wav"):
        clip(folder / name)
    texts = ["84-121123-0000 GO DO YOU HEAR", "84-121123-0001 네 그래요", "84-121123-0002 GONE"]
    lines(folder / "84-121123.trans.txt", *texts)
    assert detect(tmp_path) == "librispeech"
    rows, faults = read("librispeech", tmp_path)
    assert [row.values["speaker"] for row in rows] == ["84", "84"]
    assert [row.values.get("language") for row in rows] == [None, "ko"]
    assert reasons(faults) == [(3, "audio_missing")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no \*\.trans\.txt"):
        read("librispeech", tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio_path": "a", "transcript": "b"}\n'.encode("utf-16"), "UTF-16 .* iconv"),
        (b'[{"audio_path": "a", "transcript": "b"}]', r"a JSON list.* jq -c '\.\[\]'"),
        (b'{"audio_path": "a", "transcript": "b"},\n', "commas behind the objects.* sed"),
        (b'{\n "audio_path": "a",\n "transcript": "b"\n}\n', "over several lines.* jq -c"),
        (b'{"id": "s", "recording_id": "r", "start": 0, "text": "x"}\n', "lhotse cut simple"),
        (b'{"id": "r", "sources": [], "sampling_rate": 16000}\n', "lhotse cut simple"),
        (b'{"wave": "a", "words": "b"}\n', "objects with the keys wave, words; rename them to audio_path"),
        (b"what is this\n", "neither JSON nor a table: 'what is this'"),
        (b" \n", "the file is empty"),
    ],
)
def test_unknown_files_say_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=message):
        detect(tmp_path / "rows.jsonl")


def test_unknown_folders_say_what_is_in_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the folder has no files"):
        detect(tmp_path)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(RunError, match=r"no corpus is in the folder \(1 .pdf\)"):
        detect(tmp_path)
    clip(tmp_path / "a.m4a")
    with pytest.raises(RunError, match=r"1 clips .* and no transcripts: .*--audio_dir"):
        detect(tmp_path)
