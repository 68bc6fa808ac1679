"""prepare: every row is accounted for, texts are clean, leaks are detected, and workers do not change the order."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_rows
from helpers.corpora import prepare, save_to_disk

from voxray.audio.quality import QualityLimits, check, measure
from voxray.core.errors import BadRow, RunError

RATE = 16_000


def tone(path: Path, sec: float = 4.0, level: float = 0.3, seed: int = 0) -> str:
    """A clip with energy in all bands, different for every seed."""
    noise = np.random.default_rng(seed).normal(0, level / 4, round(sec * RATE)).clip(-0.9, 0.9)
    soundfile.write(path, noise, RATE)
    return path.name


@pytest.fixture
def corpus(tmp_path: Path) -> list[dict]:
    """Twelve good rows of four speakers with different texts."""
    return [
        {
            "audio_path": tone(tmp_path / f"{number}.wav", seed=number),
            "transcript": f"환자 번호 {number} 혈압이 120/80 이고요",
            "language": "ko",
            "speaker": f"s{number % 4}",
        }
        for number in range(12)
    ]


def test_good_and_quarantined_add_up_and_speakers_stay_together(tmp_path, corpus):
    rows = [*corpus, {"audio_path": "none.wav", "transcript": "x"}, {"nothing": 1}]
    rows += [{"audio_path": tone(tmp_path / "short.wav", sec=1.0, seed=99), "transcript": "짧은 것", "speaker": "s0"}]
    rows += [dict(corpus[0])]
    train, val, ledger, summary = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows))
    assert len(train) + len(val) + len(ledger) == len(rows) == summary["input"]["rows"]
    assert (len(train), len(val)) == (9, 3)
    assert not {row["speaker"] for row in train} & {row["speaker"] for row in val}
    assert [(line["line"], line["reason"]) for line in ledger[1:]] == [
        (14, ledger[1]["reason"]),
        (15, "too_short"),
        (16, "duplicate"),
    ]
    assert ledger[0]["line"] == 13 and all(line["source_file"].endswith("m.jsonl") for line in ledger)
    parts = [summary["train"], summary["val"], *summary["quarantined"].values()]
    assert sum(part["rows"] for part in parts) == summary["input"]["rows"]
    assert sum(part["hours"] for part in parts) == pytest.approx(summary["input"]["hours"], abs=1e-3)
    assert not list((tmp_path / "out").glob(".prepare-*")), "no work folder is left"


def test_one_clip_may_have_translations_into_several_languages(tmp_path, corpus):
    first, *others = corpus
    translations = [{**first, "translation": "High.", "target_language": target} for target in ("en", "German", "xx")]
    rows = [*translations, translations[0], *others]
    train, val, ledger, _ = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows))
    assert [row["target_language"] for row in (*train, *val) if "translation" in row] == ["en", "German"]
    assert [(line["line"], line["reason"]) for line in ledger] == [(3, "bad_language"), (4, "duplicate")]


@pytest.mark.ray
def test_order_and_content_do_not_depend_on_the_workers(local_ray, tmp_path, corpus):
    manifest = write_rows(tmp_path / "m.jsonl", corpus)
    one = prepare(tmp_path, manifest, rows_per_chunk=5)
    two = prepare(tmp_path, manifest, use_ray=True, num_actors=2, rows_per_chunk=1)
    assert one[:3] == two[:3]
    other = prepare(tmp_path, manifest, seed=1)
    assert other[1] != one[1], "the seed decides the split"


def test_leaks_are_refused_with_numbers_dropped_or_allowed(tmp_path, corpus):
    for row in corpus:
        row["transcript"] = "모두 같은 말"
    manifest = write_rows(tmp_path / "m.jsonl", corpus)
    with pytest.raises(RunError, match=r"0 training rows by audio, 9 by text, 0 speakers.*--leaks drop"):
        prepare(tmp_path, manifest)
    assert not (tmp_path / "out" / "train.jsonl").exists(), "nothing is written that leaks"
    train, val, ledger, _ = prepare(tmp_path, manifest, leaks="allow")
    assert (len(train), len(val), len(ledger)) == (9, 3, 0)
    with pytest.raises(RunError, match="no usable row"):
        prepare(tmp_path, manifest, leaks="drop")


def test_the_corpus_own_split_is_used(tmp_path, corpus):
    for number, row in enumerate(corpus):
        row |= {"split": ("train", "dev", "test")[number % 3], "speaker": f"s{number}"}
    train, val, ledger, _ = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", corpus))
    assert [len(train), len(val), len(ledger)] == [4, 4, 4]
    assert {line["reason"] for line in ledger} == {"other_split"}


SPLITS = {"train": 4, "validation": 3, "test": 2}


@pytest.mark.parametrize("own", [("train", "test"), ("train", "validation"), ("train", "validation", "test")])
@pytest.mark.parametrize("outputs", [(), ("val",), ("test",), ("val", "test")])
def test_held_out_rows_never_train(tmp_path, capsys, own, outputs):
    """Rows of the corpus's validation and test splits go to their manifest or into the ledger."""
    rows = {
        split: [
            {"audio": str(tmp_path / tone(tmp_path / f"{split}{n}.wav", seed=10 * at + n)), "text": f"{split} {n}"}
            for n in range(SPLITS[split])
        ]
        for at, split in enumerate(own)
    }
    corpus = save_to_disk(tmp_path / "saved", rows)
    paths = {f"{name}_output": str(tmp_path / "out" / f"{name}.jsonl") for name in outputs}
    train, val, ledger, summary = prepare(tmp_path, str(corpus), **{"val_output": "", **paths})
    text = capsys.readouterr().out
    assert {row["transcript"].split()[0] for row in train} == {"train"}
    assert summary.get("test", {}).get("rows", 0) == ("test" in own and "test" in outputs) * SPLITS["test"]
    if "val" in outputs:
        from_corpus = "validation" in own
        assert {row["transcript"].split()[0] for row in val} == {"validation" if from_corpus else "train"}
        assert len(val) == (SPLITS["validation"] if from_corpus else 1)
    left_out = {name for name, output in (("validation", "val"), ("test", "test")) if output not in outputs} & set(own)
    assert {line["source_file"].split("/")[-2] for line in ledger} == left_out
    assert {line["reason"] for line in ledger} <= {"other_split"}
    for split in ("validation", "test"):
        flag = {"validation": "--val_output", "test": "--test_output"}[split]
        sentence = f"{SPLITS[split]} rows of the corpus's {split} split are left out; {flag} FILE writes them"
        assert (sentence in text) == (split in left_out)


def test_rows_of_unknown_splits_do_not_train_and_a_test_set_alone_is_written(tmp_path, corpus, capsys):
    for row, split in zip(corpus, (*["holdout"] * 2, *["train_dev"] * 2, *[""] * 8), strict=True):
        row |= {"split": split}
    train, val, _, _ = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", corpus), leaks="allow")
    assert (len(train), len(val)) == (8, 2)
    assert "2 rows are left out because the corpus puts them into other splits: holdout" in capsys.readouterr().out
    test = write_rows(tmp_path / "t.jsonl", [{**row, "split": "test"} for row in corpus])
    with pytest.raises(RunError, match="no usable row"):
        prepare(tmp_path, test)
    assert "12 rows of the corpus's test split" in capsys.readouterr().out
    _, _, ledger, summary = prepare(tmp_path, test, test_output=str(tmp_path / "out" / "test.jsonl"))
    assert summary["test"]["rows"] == 12 and not ledger and "next:" not in capsys.readouterr().out


def test_notes_on_transcripts_are_counted(tmp_path, corpus):
    corpus[0]["transcript"], corpus[1]["transcript"] = "b/ (CT)(흉부) 촬영할게요", "/(noise) 그 + 그 사람이 왔어요"
    train, val, _, summary = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", corpus))
    texts = {row["transcript"] for row in (*train, *val)}
    assert summary["transcript_notes"] == {"noise": 2, "odd_pair": 1}
    assert {"(CT)(흉부) 촬영할게요", "그 그 사람이 왔어요"} <= texts


MARKED = "b/ (70%)/(70 percent) of group C* with plus+ signs"


@pytest.mark.parametrize("language", ["", "en"])
def test_notation_of_korean_corpora_stays_in_other_languages(tmp_path, language):
    """Rows without a language are cleaned only if they have Hangul, also as macOS writes it."""
    hangul = unicodedata.normalize("NFD", "b/ 혈압이 그+ 높아요")
    rows = [
        {"audio_path": tone(tmp_path / f"{n}.wav", seed=n), "transcript": text, "speaker": f"s{n}"}
        for n, text in enumerate((MARKED, hangul))
    ]
    rows[0] |= {"language": language, "transcript_raw": f"{MARKED} [sic]"} if language else {}
    train, _, _, _ = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows), val_output="")
    assert train[0]["transcript"] == MARKED and train[1]["transcript"] == "혈압이 그 높아요"
    assert train[0].get("transcript_raw") == rows[0].get("transcript_raw") and "transcript_notes" not in train[0]
    (tmp_path / "pairs").mkdir()
    tone(tmp_path / "pairs" / "a.wav")
    (tmp_path / "pairs" / "a.txt").write_text(MARKED)
    [row], _, _, _ = prepare(tmp_path, str(tmp_path / "pairs"), val_output="", language=language)
    assert row["transcript"] == MARKED and row.get("language", "") == language and "transcript_raw" not in row


def test_language_is_written_to_rows_that_name_none(tmp_path, corpus):
    for number, row in enumerate(corpus):
        row |= {"language": ("", "ja")[number % 2], "speaker": f"s{number}"}
    settings = {"val_output": "", "language": "English"}
    train, _, _, _ = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", corpus), **settings)
    assert [row["language"] for row in train] == ["en", "ja"] * 6
    table = ["file,text", *(f"{row['audio_path']},{row['transcript']}" for row in corpus)]
    (tmp_path / "t.csv").write_text("\n".join(table))
    train, _, _, _ = prepare(tmp_path, str(tmp_path / "t.csv"), **settings)
    assert {row["language"] for row in train} == {"en"}, "it replaces the guess by the script of the texts"
    with pytest.raises(ValueError, match="language 'klingon' is not known"):
        prepare(tmp_path, str(tmp_path / "t.csv"), language="klingon")


def test_dual_notation_gives_both_readings(tmp_path, corpus):
    corpus[0]["transcript"] = "b/ (70%)/(칠십 퍼센트) 확률로 120/80 이고요"
    manifest = write_rows(tmp_path / "m.jsonl", corpus)
    for reading, text, other in (
        ("spelling", "70% 확률로 120/80 이고요", "칠십 퍼센트 확률로 120/80 이고요"),
        ("phonetic", "칠십 퍼센트 확률로 120/80 이고요", None),
    ):
        train, val, _, _ = prepare(tmp_path, manifest, reading=reading)
        row = next(row for row in train + val if row["audio_path"].endswith("/0.wav"))
        assert row["transcript"] == text and row.get("transcript_phonetic") == other
        assert row["transcript_raw"] == corpus[0]["transcript"]


def test_segments_are_cleaned_like_the_transcript(tmp_path, corpus):
    rows = [{**row, "split": ""} for row in corpus[:3]]
    texts = ["b/ (70%)/(칠십 퍼센트)", "그거+ 맞아요"]
    segments = [{"start": 2 * index, "end": 2 * index + 1.5, "text": text} for index, text in enumerate(texts)]
    rows[0] |= {"transcript": " ".join(texts), "segments": segments}
    train, val, bad, _ = prepare(tmp_path, write_rows(tmp_path / "s.jsonl", rows))
    [row] = [row for row in [*train, *val] if "segments" in row]
    assert [part["text"] for part in row["segments"]] == ["70%", "그거 맞아요"] and not bad
    assert row["transcript"] == "70% 그거 맞아요" and row["segments"][1]["start"] == 2


def test_the_output_is_a_manifest(tmp_path, corpus):
    """Its rows, text rows included, are read back as samples."""
    from voxray.core.manifest import chunks, read_chunk

    rows = [*corpus, *({"instruction": f"물음 {n}", "input": "", "output": "답"} for n in range(4))]
    prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows))
    samples = [
        sample
        for name in ("train", "val")
        for chunk in chunks(str(tmp_path / "out" / f"{name}.jsonl"), 100)
        for sample in read_chunk(chunk).samples
    ]
    assert sorted(sample.task.name for sample in samples) == ["asr"] * 12 + ["tqa"] * 4


def clip(samples: np.ndarray, rate: int = RATE):
    return measure(samples.astype(np.float32), rate)


def white(sec: float = 2.0, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(3).normal(0, level, round(sec * RATE)).clip(-0.99, 0.99)


@pytest.mark.parametrize(
    ("reason", "samples", "limits"),
    [
        ("too_short", white(0.5), {"min_sec": 1.0}),
        ("too_long", white(3.0), {"max_sec": 2.5}),
        ("too_quiet", white(level=1e-4), {"min_peak_db": -40.0}),
        ("near_silence", np.append(white(level=1e-4), 0.5), {"min_peak_db": -40.0, "min_rms_db": -50.0}),
        ("clipping", np.concatenate([white(), np.ones(200)]), {"max_clip_share": 0.001}),
        ("dc_offset", white() + 0.05, {"max_dc": 0.01}),
        ("zero_tail", np.concatenate([white(), np.zeros(2 * RATE)]), {"max_zero_tail_sec": 1.0}),
        ("narrow_band", np.sin(np.arange(2 * RATE) / RATE * 2 * np.pi * 440) * 0.5, {"min_high_band_db": -70.0}),
    ],
)
def test_each_fault_has_its_limit(reason, samples, limits):
    with pytest.raises(BadRow) as error:
        check(clip(samples), QualityLimits(**limits))
    assert error.value.reason == reason
    check(clip(samples), QualityLimits())
    check(clip(white()), QualityLimits(**{name: value for name, value in limits.items() if name != "min_sec"}))


def test_8_khz_audio_saved_as_16_khz_is_detected(tmp_path):
    import soxr

    original = white(4.0)
    upsampled = soxr.resample(soxr.resample(original, RATE, 8_000), 8_000, RATE)
    limits = QualityLimits(min_high_band_db=-70.0)
    check(clip(original), limits)
    check(clip(soxr.resample(original, RATE, 8_000), 8_000), limits)
    with pytest.raises(BadRow) as error:
        check(clip(upsampled), limits)
    assert error.value.reason == "narrow_band"


def test_the_same_question_may_be_on_both_sides(tmp_path, corpus):
    """Clips with the same question and answer are not a leak. Rows with the same transcript are."""
    questions = [{"audio_path": row["audio_path"], "question": "무엇입니까?", "answer": "혈압"} for row in corpus]
    rows = [{**row, "split": "train" if index < 9 else "val"} for index, row in enumerate(questions)]
    train, val, _, summary = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows))
    assert (len(train), len(val)) == (9, 3)
    assert summary["leaks"] == {"audio": 0, "text": 0, "speaker": 0}
