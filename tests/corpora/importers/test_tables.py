"""Common Voice, KsponSpeech and Hugging Face: tables, text beside audio, and audio inside Parquet."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import clip, lines, read, reasons

from voxray.audio.decode import decode
from voxray.core.errors import BadRow, RunError
from voxray.corpora.importers import embedded, ksponspeech
from voxray.corpora.importers.embedded import embedded_audio

CV_HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"


def test_common_voice(tmp_path):
    first, second = clip(tmp_path / "clips" / "ko_1.mp3"), clip(tmp_path / "clips" / "ko_2.mp3")
    lines(
        tmp_path / "train.tsv",
        CV_HEADER,
        'aa\tko_1.mp3\t"네" 그래요, "네\t2\t0\t\tfemale\t\tko\t',
        "bb\tko_2\t둘\t2\t0\t\t\t\tko\t",
        "cc\tgone.mp3\t둘\t2\t0\t\t\t\tko\t",
        "cc\tko_1.mp3\t둘",
        b"cc\tko_1.mp3\t\t2\t0\t\t\t\tko\t" + b"\xff",
        "cc\t\t둘\t2\t0\t\t\t\tko\t",
        bom=True,
        end="\r\n",
    )
    lines(tmp_path / "validated.tsv", CV_HEADER, "dd\tko_1.mp3\t셋\t2\t0\t\t\t\tko\t")
    rows, faults = read("commonvoice", tmp_path)
    shared = {"language": "ko", "split": "train"}
    assert [row.values for row in rows] == [
        {"audio_path": first, "transcript": '"네" 그래요, "네', "speaker": "aa", "gender": "female"} | shared,
        {"audio_path": second, "transcript": "둘", "speaker": "bb"} | shared,
    ]
    assert [row.id for row in rows] == ["ko_1", "ko_2"]
    assert reasons(faults) == [(4, "audio_missing"), (5, "bad_row"), (6, "bad_encoding"), (7, "audio_missing")]
    rows, _ = read("commonvoice", tmp_path / "validated.tsv")
    assert rows[0].values["speaker"] == "dd" and "split" not in rows[0].values
    (tmp_path / "train.tsv").unlink()
    assert [row.values["speaker"] for row in read("commonvoice", tmp_path)[0]] == ["dd"]
    (tmp_path / "validated.tsv").unlink()
    with pytest.raises(RunError, match=r"no train\.tsv"):
        read("commonvoice", tmp_path)


def test_kspon_lists(tmp_path):
    sound = clip(tmp_path / "KsponSpeech_01" / "K_1.pcm")
    lines(
        tmp_path / "scripts" / "train.trn",
        "KsponSpeech_01/K_1.pcm :: b/ (70%)/(칠 십 퍼센트) 확률로 u/",
        "KsponSpeech_01/K_1.pcm :: 혈압이 120/80 이고요".encode("cp949"),
        "KsponSpeech_01/K_1.pcm 네",
        "KsponSpeech_01/K_9.pcm :: 네",
        b"KsponSpeech_01/K_1.pcm :: \xff\xff",
        end="\r\n",
        bom=True,
    )
    lines(tmp_path / "scripts" / "dev.trn", "KsponSpeech_01/K_1.pcm :: 네")
    rows, faults = read("ksponspeech", tmp_path / "scripts")
    assert [row.id for row in rows] == ["K_1"] * 3
    assert [row.values["split"] for row in rows] == ["validation", "train", "train"]
    assert rows[1].values == {
        "audio_path": sound,
        "transcript": "70% 확률로",
        "transcript_phonetic": "칠 십 퍼센트 확률로",
        "transcript_raw": "b/ (70%)/(칠 십 퍼센트) 확률로 u/",
        "transcript_notes": ["noise", "unk"],
        "language": "ko",
        "sample_rate": 16000,
        "split": "train",
    }
    assert rows[2].values["transcript"] == "혈압이 120/80 이고요"
    assert reasons(faults) == [(3, "bad_row"), (4, "audio_missing"), (5, "bad_encoding")]


def test_kspon_folders(tmp_path):
    for name, text in {"가 1": "짙".encode("cp949"), "b": "아/ 네\n".encode(), "c": b"\xff\xff", "d": b""}.items():
        clip(tmp_path / "KsponSpeech_0001" / f"{name}.pcm")
        lines(tmp_path / "KsponSpeech_0001" / f"{name}.txt", text, end="", bom=name == "b")
    clip(tmp_path / "KsponSpeech_0002" / "e.pcm")
    lines(tmp_path / "KsponSpeech_0002" / "f.txt", "네")
    rows, faults = read("ksponspeech", tmp_path)
    assert [(row.id, row.values["transcript"]) for row in rows] == [
        ("b", "네".join(["아 ", ""])),
        ("d", ""),
        ("가 1", "짙"),
    ]
    assert [(fault.id, fault.reason) for fault in faults] == [
        ("c", "bad_encoding"),
        ("e", "missing_text"),
        ("f", "missing_audio_entry"),
    ]


def test_kspon_lists_and_folders_of_held_out_rows(tmp_path):
    for name in ("train", "test", "other"):
        clip(tmp_path / name / "x.pcm")
        lines(tmp_path / name / "x.txt", "네")
    rows, _ = read("ksponspeech", tmp_path)
    assert [row.values.get("split") for row in rows] == [None, "test", "train"]
    for name in ("all", "eval_clean", "eval_other"):
        lines(tmp_path / "other" / f"{name}.trn", "x.pcm :: 네")
    rows, _ = read("ksponspeech", tmp_path / "other")
    assert [row.values.get("split") for row in rows] == [None, "test", "test"]


def test_kspon_folders_that_are_links_are_faults(tmp_path):
    for folder in ("a", "elsewhere"):
        clip(tmp_path / folder / "x.pcm")
        lines(tmp_path / folder / "x.txt", "네")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    rows, faults = read("ksponspeech", tmp_path / "a")
    assert len(rows) == 1
    assert [(Path(fault.source_file).name, fault.reason) for fault in faults] == [
        ("linked", "linked_folder"),
        ("loop", "linked_folder"),
    ]


def test_kspon_text_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(ksponspeech, "MAX_TEXT_BYTES", 100)
    clip(tmp_path / "a.pcm")
    lines(tmp_path / "a.txt", "x" * 101)
    assert reasons(read("ksponspeech", tmp_path)[1]) == [(1, "line_too_long")]


def test_audiofolder_csv(tmp_path):
    first = clip(tmp_path / "train" / "a b.wav")
    lines(
        tmp_path / "train" / "metadata.csv",
        "file_name,transcription,speaker_id",
        '"a b.wav","네, ""그래요""\n둘",s1',
        "a b.wav,하나,",
        "gone.wav,둘,s1",
        "a b.wav,하나",
        "",
        b"a b.wav," + b"\xff,s",
        "a b.wav,셋,s3",
        'a b.wav,"열린 따옴표,s1',
        "a b.wav,넷,s4",
        bom=True,
    )
    rows, faults = read("huggingface", tmp_path)
    assert [(row.line, row.values) for row in rows] == [
        (2, {"split": "train", "audio_path": first, "transcript": '네, "그래요"\n둘', "speaker": "s1"}),
        (4, {"split": "train", "audio_path": first, "transcript": "하나"}),
        (9, {"split": "train", "audio_path": first, "transcript": "셋", "speaker": "s3"}),
    ]
    assert sorted(reasons(faults)) == [
        (5, "audio_missing"),
        (6, "bad_row"),
        (8, "bad_encoding"),
        (10, "bad_csv"),
        (11, "bad_csv"),
    ]


def test_audiofolder_jsonl_and_parquet(tmp_path):
    sound = clip(tmp_path / "a" / "x.flac")
    table = [
        {"file_name": "x.flac", "text": "네", "language": "ko"},
        {"file_name": "x.flac", "question": "몇?", "answer": "둘"},
        {"file_name": "x.flac"},
        {"text": "네"},
    ]
    lines(tmp_path / "a" / "metadata.jsonl", *table)
    pq.write_table(
        pa.Table.from_pylist(table, schema=pa.schema({key: pa.string() for row in table for key in row})),
        (tmp_path / "a" / "metadata.parquet"),
    )
    rows, faults = read("huggingface", tmp_path)
    asr = {"audio_path": sound, "transcript": "네", "language": "ko"}
    sqa = {"audio_path": sound, "question": "몇?", "answer": "둘"}
    assert [row.values for row in rows] == [asr, sqa] * 2
    assert reasons(faults) == [(3, "missing_key"), (4, "missing_key")] * 2


AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize("statistics", [True, False])
def test_parquet_with_audio_inside(tmp_path, statistics, monkeypatch):
    raw = Path(clip(tmp_path / "x.wav")).read_bytes()
    clips = [{"bytes": raw + bytes([number]), "path": f"{number}.wav"} for number in range(5)]
    clips += [{"bytes": None, "path": "x.wav"}, {"bytes": None, "path": None}, None]
    texts = ["영", "일", "이", "삼", None, "오", "육", "칠"]
    table = pa.table({"audio": pa.array(clips, AUDIO), "sentence": texts})
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(table, path, row_group_size=3, write_statistics=statistics)
    rows, faults = read("huggingface", tmp_path)
    assert [row.line for row in rows] == [1, 2, 3, 4, 6]
    assert rows[1].values == {
        "split": "train",
        "audio_path": "",
        "transcript": "일",
        "audio_bytes_from": {"file": str(path), "row": 1, "audio_name": "1.wav"},
    }
    assert rows[4].values == {"split": "train", "audio_path": str(tmp_path / "x.wav"), "transcript": "오"}
    assert reasons(faults) == [(5, "missing_key"), (7, "audio_missing"), (8, "audio_missing")]
    for limit in (embedded.MAX_CACHED_BYTES, 0):
        monkeypatch.setattr(embedded, "MAX_CACHED_BYTES", limit)
        assert [embedded_audio({"file": str(path), "row": row}) for row in (3, 0, 2)] == [
            raw + b"\3",
            raw + b"\0",
            raw + b"\2",
        ]
        for row in (5, 7, 8, -1):
            with pytest.raises(BadRow, match=r"no audio bytes|no row"):
                embedded_audio({"file": str(path), "row": row})
    assert len(decode("1.wav", 16_000, raw)) == 1600


def test_a_replaced_parquet_file_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    for content in (b"one", b"three"):
        pq.write_table(pa.table({"audio": pa.array([{"bytes": content, "path": "a"}], AUDIO), "text": ["네"]}), path)
        assert embedded_audio({"file": str(path), "row": 0}) == content


def test_damaged_and_foreign_parquet(tmp_path):
    lines(tmp_path / "a.parquet", "PAR1 no")
    assert reasons(read("huggingface", tmp_path / "a.parquet")[1]) == [(1, "damaged_file")]
    with pytest.raises(BadRow) as error:
        embedded_audio({"file": str(tmp_path / "a.parquet"), "row": 0})
    assert error.value.reason == "audio_unreadable"
    raw = bytes(range(256)) * 40
    clips = pa.array([{"bytes": raw, "path": "a"}] * 4, AUDIO)
    texts = [f"{number} " + "네" * 50 for number in range(4)]
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table({"audio": clips, "text": texts}), path, row_group_size=2, use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    offset = damaged.index("1 네".encode())
    damaged[offset - 60 : offset + 60] = b"\xff" * 120
    path.write_bytes(damaged)
    rows, faults = read("huggingface", path)
    assert [fault.reason for fault in faults] == ["damaged_file"] * 2
    assert [row.line for row in rows] == [3, 4]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "c.parquet")
    with pytest.raises(RunError, match="neither a column file_name"):
        read("huggingface", tmp_path / "c.parquet")


def test_invalid_parquet_values_are_faults_of_their_row(tmp_path):
    """Arrow does not validate text columns, and a speaker may have any type."""
    sound = clip(tmp_path / "a.wav")
    texts = pa.array([b"one", b"\xb3\xd7", b"three", b"four"], pa.binary()).view(pa.string())
    far = pa.array([0, 1, 2, 1 << 62], pa.int64()).view(pa.timestamp("us"))
    table = {"file_name": [sound] * 4, "text": texts, "taken_at": far, "speaker_id": [1, 2, 3, 4]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    rows, faults = read("huggingface", tmp_path / "a.parquet")
    assert [(row.line, row.values["speaker"]) for row in rows] == [(1, 1), (3, 3), (4, 4)]
    assert reasons(faults) == [(2, "bad_encoding")]
    for speakers in (far, pa.array([b"x"] * 4), pa.array([["a"]] * 4)):
        pq.write_table(pa.table(table | {"speaker_id": speakers}), tmp_path / "a.parquet")
        rows, faults = read("huggingface", tmp_path / "a.parquet")
        assert not rows and {fault.reason for fault in faults} <= {"bad_type", "bad_encoding"}
        assert [fault.line for fault in faults] == [1, 2, 3, 4]


def test_a_parquet_file_with_fewer_rows_than_in_its_metadata(tmp_path, monkeypatch):
    sound = clip(tmp_path / "a.wav")
    pq.write_table(pa.table({"file_name": [sound] * 4, "text": ["네"] * 4}), tmp_path / "a.parquet", row_group_size=2)
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, row_groups, columns: (
            whole(self, size, row_groups=[0], columns=columns) if row_groups == [0] else iter([])
        ),
    )
    rows, faults = read("huggingface", tmp_path / "a.parquet")
    assert [row.line for row in rows] == [1, 2] and reasons(faults) == [(3, "damaged_file")]
