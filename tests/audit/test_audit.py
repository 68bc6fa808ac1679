"""audit: faults and their lines, figures, the clean part, and the report page."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import TINY, write_rows

from voxray.audit.advice import FAULTS, WARNINGS
from voxray.audit.findings import assign_splits
from voxray.audit.measure_rows import RowMeasurer, over_limit, plan_chunks
from voxray.commands.audit import run_audit_job
from voxray.config.audit import AuditSettings
from voxray.core.errors import RunError, SettingsError
from voxray.core.manifest import Chunk
from voxray.features.reader import Features
from voxray.models.registry import get_family

RATE = 16_000
SCRIPT = "<script>console.error('ran')</script>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def clip(path: Path, seed: int, sec: float = 2.0, rate: int = RATE) -> str:
    """A clip of noise, different for every seed; returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, round(sec * rate)).clip(-0.9, 0.9), rate)
    return path.name


def audit(folder: Path, *manifests: str, **changes) -> dict:
    """Run the job in this process; returns audit.json, whether or not there are faults."""
    values = {"input": manifests, "output_dir": str(folder / "audit"), "rows_per_chunk": 4, **changes}
    try:
        run_audit_job(AuditSettings(**values), use_ray=False)
    except RunError as error:
        assert "fault(s)" in str(error)
    return json.loads((folder / "audit" / "audit.json").read_text())


def findings(folder: Path, kind: str = "faults") -> list[tuple[str, int, str]]:
    entries = [json.loads(line) for line in (folder / "audit" / f"{kind}.jsonl").read_text().splitlines()]
    assert all(entry["message"] for entry in entries)
    return [(Path(entry["source_file"]).name, entry["line"], entry["reason"]) for entry in entries]


def broken_clips(folder: Path) -> list[str]:
    """Names of clips that are damaged, each in its way."""
    (folder / "garbage.wav").write_bytes(b"no sound at all" * 100)
    samples = np.full(RATE, 0.1, np.float32)
    samples[100] = np.nan
    soundfile.write(folder / "nan.wav", samples, RATE, subtype="FLOAT")
    soundfile.write(folder / "empty.wav", np.empty(0, np.float32), RATE)
    clip(folder / "half.wav", 90)
    (folder / "half.wav").write_bytes((folder / "half.wav").read_bytes()[:30_000])
    return ["garbage.wav", "nan.wav", "empty.wav", "half.wav"]


def asr(name: str, text: str, **more) -> dict:
    return {"audio_path": name, "transcript": text, "language": "ko", **more}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A training and a validation manifest with one of everything."""
    folder = tmp_path_factory.mktemp("planted")
    for seed in range(12):
        clip(folder / f"{seed}.wav", seed)
    samples, _ = soundfile.read(folder / "0.wav", dtype="int16")
    soundfile.write(folder / "copy.flac", samples, RATE)
    question = {"question": "무엇이 높습니까?", "answer": "혈압"}
    text = {"instruction": "답하시오.", "input": "혈압이 120/80 입니다", "output": "정상"}
    rows = [
        asr("0.wav", "환자 번호 일 이고요", id="a", speaker="s1"),
        {SCRIPT: 1},
        asr("none.wav", "없는 소리"),
        *(asr(name, "망가진 소리") for name in broken_clips(folder)),
        asr("copy.flac", "같은 소리"),
        text,
        {**text, "instruction": " 답하시오", "output": "정상."},
        asr("1.wav", "같은 이름", id="a"),
        asr("2.wav", f"새는 소리 {SCRIPT}"),
        asr("3.wav", "양쪽에서 하는 말"),
        asr("4.wav", "양쪽에 있는 사람", speaker="v1"),
        asr("5.wav", f"정상이고 {SCRIPT} 있는 말"),
        {**text, "input": "길고 긴 이야기 " * 60},
        {"audio_path": "6.wav", **question},
        asr("7.wav", ""),
        {"audio_path": "0.wav", "question": "몇 번입니까?", "answer": "일 번"},
    ]
    train = Path(write_rows(folder / "ASR.jsonl", rows))
    train.write_bytes(b"\xef\xbb\xbf" + train.read_bytes() + b'\n{"broken\n{"transcript": "' + b'\xb0\xa1"}')
    val = write_rows(
        folder / "ASR.dev.jsonl",
        [
            asr("2.wav", "다른 글", id="a", speaker="v1"),
            asr("8.wav", "양쪽에서 하는 말!", speaker="v2"),
            {"audio_path": "9.wav", **question},
            asr("10.wav", ""),
        ],
    )
    return folder, str(train), val


EXPECTED = [
    (2, "unknown_task"),
    (3, "audio_missing"),
    (4, "audio_unreadable"),
    (5, "audio_not_finite"),
    (6, "audio_empty"),
    (7, "audio_cut_off"),
    (8, "duplicate"),
    (10, "duplicate"),
    (11, "duplicate_id"),
    (12, "leak_audio"),
    (13, "leak_text"),
    (14, "leak_speaker"),
    (16, "over_max_len"),
    (21, "bad_json"),
    (22, "bad_utf8"),
]


def test_every_fault_is_found_at_its_line_and_nothing_else(planted, tmp_path):
    _, train, val = planted
    figures = audit(tmp_path, train, val, model_id=TINY, max_len=200)
    assert findings(tmp_path) == [("ASR.jsonl", line, reason) for line, reason in EXPECTED]
    assert figures["rows"] == 21 + 4 and figures["rows_with_faults"] == len(EXPECTED)
    assert [entry["side"] for entry in figures["files"]] == ["train", "val"]
    assert sum(figures["faults"].values()) == len(EXPECTED) and figures["clean_rows"] == 25 - len(EXPECTED)
    assert not [path for path in (tmp_path / "audit").iterdir() if path.name.startswith(".")], "no work is left"


def test_findings_say_what_to_do(planted, tmp_path):
    _, train, val = planted
    with pytest.raises(RunError, match=r"15 fault\(s\) in 15 of 25 row\(s\).*--fix writes the rest"):
        values = {"input": (train, val), "output_dir": str(tmp_path / "audit"), "model_id": TINY, "max_len": 200}
        run_audit_job(AuditSettings(**values), use_ray=False)
    entries = [json.loads(line) for line in (tmp_path / "audit" / "faults.jsonl").read_text().splitlines()]
    messages = {entry["reason"]: entry["message"] for entry in entries}
    assert messages["duplicate_id"] == f"the id 'a' is that of {train}:1"
    assert messages["leak_audio"] == f"its audio is also at {val}:1 (val)"
    assert messages["leak_speaker"] == f"its speaker v1 is also at {val}:1 (val)"
    tokens = int(re.match(r"(\d+) tokens", messages["over_max_len"])[1])
    assert f"raise --max_len to {tokens}" in messages["over_max_len"]
    assert f"shorten its texts by {tokens - 200} tokens" in messages["over_max_len"]
    assert "quarantine.jsonl" in messages["over_max_len"]
    assert {reason for _, reason in EXPECTED} <= set(FAULTS)


def test_message_about_a_row_that_is_too_long():
    """Positions of the released model: 375 for each window of 30 s; --max_len 1280 holds three windows."""
    message = over_limit(1520, 60, 1500, 4, 30.0, 1280)
    assert message.startswith("1580 tokens (1500 audio, 80 text), over --max_len 1280")
    assert "so does evaluation" in message
    assert "raise --max_len to 1580, or cut the clip at pauses into 2 parts of 90 s at most" in message
    assert "shorten" not in message, "the texts are shorter than the excess"
    message = over_limit(1200, 100, 1125, 3, 30.0, 1280)
    assert "evaluation takes it, for its prompt has just 1200" in message
    assert message.endswith("2 parts of 60 s at most, or shorten its texts by 20 tokens")
    assert "cut the clip" not in over_limit(500, 900, 375, 1, 30.0, 400), "no part of it would fit"


def test_the_clean_part_is_clean_and_kept_byte_for_byte(planted, tmp_path):
    folder, train, val = planted
    options = {"model_id": TINY, "max_len": 200}
    beside = folder / "beside" / "clean.jsonl"
    audit(tmp_path, train, val, **options, fix=str(folder / "clean.jsonl"))
    lines = (folder / "clean.jsonl").read_bytes().split(b"\n")
    clean_lines = [line for line in Path(train).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line]
    bad = {line for line, _ in EXPECTED}
    assert lines[:6] == [line for number, line in enumerate([*clean_lines[:19]], 1) if number not in bad]
    assert json.loads(lines[6])["id"] == "ASR.dev:1:a", "an id that both files have"
    assert lines[7:-1] == Path(val).read_bytes().splitlines()[1:] and lines[-1] == b""
    run_audit_job(
        AuditSettings(input=(str(folder / "clean.jsonl"),), output_dir=str(tmp_path / "again"), **options),
        use_ray=False,
    )
    figures = audit(tmp_path, train, val, **options, fix=str(beside))
    assert figures["fixed"] == {"num_rows": 10, "num_moved": 9, "num_renamed": 1}
    again = audit(tmp_path, str(beside), **options)
    assert again["faults"] == {} and again["rows"] == 10


def test_fix_never_writes_over_an_input_and_says_when_nothing_is_left(tmp_path, planted):
    row = {"instruction": "a", "output": "b"}
    manifest = write_rows(tmp_path / "a.jsonl", [row, row])
    (tmp_path / "link.jsonl").symlink_to(manifest)
    before = Path(manifest).read_bytes()
    for name in ("a.jsonl", "link.jsonl", "x/../a.jsonl"):
        with pytest.raises(SettingsError, match="is an input"):
            audit(tmp_path, manifest, fix=str(tmp_path / name))
    assert Path(manifest).read_bytes() == before and not (tmp_path / "audit").exists()
    bad = write_rows(tmp_path / "bad.jsonl", [{"no": 1}])
    settings = AuditSettings(input=(bad,), output_dir=str(tmp_path / "audit"), fix=str(tmp_path / "out.jsonl"))
    with pytest.raises(RunError, match="none is left to write"):
        run_audit_job(settings, use_ray=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_audio_paths_mean_the_same_in_the_new_folder(tmp_path):
    """A relative path may name another file there: then it becomes absolute."""
    clip(tmp_path / "data" / "a.wav", 1)
    clip(tmp_path / "new" / "a.wav", 2)
    manifest = write_rows(tmp_path / "data" / "m.jsonl", [asr("a.wav", "가나다라")])
    audit(tmp_path, manifest, fix=str(tmp_path / "new" / "m.jsonl"))
    assert json.loads((tmp_path / "new" / "m.jsonl").read_text())["audio_path"] == str(tmp_path / "data" / "a.wav")


def test_figures_equal_numpys(tmp_path):
    seconds = np.arange(20, 60) / 20
    rows = [asr(clip(tmp_path / f"{n}.wav", n, sec), "가" * (4 + n % 5)) for n, sec in enumerate(seconds)]
    rows += [{"instruction": "물음", "input": "", "output": f"답 {n} " + "x" * n} for n in range(100)]
    figures = audit(tmp_path, write_rows(tmp_path / "m.jsonl", rows))
    assert figures["faults"] == {} and figures["rows"] == 140
    assert figures["hours"] == pytest.approx(seconds.sum() / 3600, abs=1e-4)
    durations = figures["tasks"]["asr"]["duration_sec"]
    chars = np.array([len("물음") + len((f"답 {n} " + "x" * n).strip()) for n in range(100)])
    for q in (50, 90, 95, 99):
        assert durations[f"p{q}"] == pytest.approx(np.percentile(seconds, q), abs=1e-3)
        assert figures["tasks"]["tqa"]["num_chars"][f"p{q}"] == pytest.approx(np.percentile(chars, q), abs=1e-3)
    assert durations["max"] == pytest.approx(seconds.max()) and durations["rows"] == 40
    # two syllables and the one of the answer take three bytes each
    assert figures["tasks"]["tqa"]["num_bytes"]["max"] == chars.max() + 2 * 3
    assert figures["all"]["num_chars"]["rows"] == 140
    assert figures["length_unit"] == "characters and bytes" and "num_tokens" not in figures["tasks"]["asr"]
    assert (tmp_path / "audit" / "characters.png").read_bytes().startswith(b"\x89PNG")
    assert "no tokens were counted" in (tmp_path / "audit" / "report.html").read_text()


def test_token_lengths_are_those_of_featurize(small, make_features, tmp_path):
    """The same rows, and clips that end just before and behind a window at other rates."""
    front_end = get_family(TINY).front_end(TINY)
    window_sec = front_end.window_frames / 100
    rows = [
        asr(clip(tmp_path / f"{rate}_{more}.wav", 1, window_sec + more / rate, rate), "열이 납니다", id=f"{rate}{more}")
        for rate in (8_000, 44_100)
        for more in (-9, -1, 0, 1, 2, 9)
    ]
    manifests = [small["asr.val"], small["sqa.val"], small["tqa.val"], write_rows(tmp_path / "edge.jsonl", rows)]
    features = Features(make_features(*manifests))
    expected = {features.source(n): int(features.num_tokens[n]) for n in range(len(features))}
    limits = _limits()
    measured: dict[str, int] = {}
    for item in plan_chunks(manifests, tmp_path, 5):
        chunk = Chunk(**item["chunk"])
        for row in RowMeasurer(limits, front_end).measure_chunk(chunk, item["file"]):
            assert not row.faults
            measured[f"{chunk.manifest}:{row.line}"] = row.num_tokens
    assert measured == expected
    assert len({expected[f"{manifests[3]}:{line}"] for line in range(1, 13)}) == 2, "the edge is met"


def _limits():
    from voxray.audio.quality import QualityLimits
    from voxray.audit.measure_rows import AuditLimits

    return AuditLimits(QualityLimits(), 0, 1e9, 1e9, 1280)


def test_outliers_and_damaged_texts_are_warnings(tmp_path):
    rows = [{"instruction": "물음", "output": f"답 {n} {'가' * (n % 7)}"} for n in range(30)]
    rows[7]["output"] = "가나다 " * 80
    rows[9]["output"] = "\u1112\u1161\u11ab\u1100\u1173\u11af"
    rows[11]["output"] = "혈\ufffd"
    figures = audit(tmp_path, write_rows(tmp_path / "m.jsonl", rows))
    assert findings(tmp_path, "warnings") == [
        ("m.jsonl", 8, "length_outlier"),
        ("m.jsonl", 10, "not_nfc"),
        ("m.jsonl", 12, "damaged_text"),
    ]
    assert figures["faults"] == {} and figures["rows_with_warnings"] == 3
    assert set(figures["warnings"]) <= set(WARNINGS)


def test_a_clip_with_an_empty_transcript_is_a_warning(tmp_path):
    rows = [
        {"audio_path": clip(tmp_path / f"{n}.wav", n), "transcript": text} for n, text in enumerate(("", "네 네 네 네"))
    ]
    audit(tmp_path, write_rows(tmp_path / "m.jsonl", [*rows, {**rows[0], "unlabelled": True}]))
    warnings = [line for _, line, reason in findings(tmp_path, "warnings") if reason == "empty_transcript"]
    assert warnings == [1]


@pytest.mark.parametrize(
    ("names", "compare", "expected"),
    [
        (("ASR.jsonl", "ASR.dev.jsonl"), "auto", (0, 1)),
        (("a.train.jsonl", "b.train.jsonl"), "auto", (0, 0)),
        (("test.jsonl", "x_valid.jsonl", "training/a.jsonl", "dev/a.jsonl"), "auto", (2, 1, 0, 1)),
        (("f.jsonl", "g.jsonl", "h.jsonl"), "auto", (0, 1, 2)),
        (("a.train.jsonl", "b.train.jsonl"), "files", (0, 1)),
        (("a.train.jsonl", "a.dev.jsonl"), "none", (0, 0)),
        (("contest.jsonl", "device.jsonl"), "auto", (0, 1)),
        (("test/f.jsonl", "test/g.jsonl"), "auto", (0, 1)),
        (("test/f.jsonl", "my-test-data/g.jsonl"), "auto", (2, 0)),
    ],
)
def test_splits_by_name(names, compare, expected):
    assert assign_splits([f"/data/{name}" for name in names], compare).by_file == expected


def test_files_of_one_name_are_told_apart():
    assert assign_splits(["/a/f.jsonl", "/b/f.jsonl", "/b/g.jsonl"], "auto").names == (
        "1. f.jsonl",
        "2. f.jsonl",
        "g.jsonl",
    )


def test_copies_that_all_leak_or_fall_out_take_no_row_with_them(tmp_path):
    """A row that is left out anyway claims neither id nor text."""
    rows = [{"instruction": "a", "output": "b", "id": "1"}, {"instruction": "c", "output": "d", "id": "1"}]
    train = write_rows(tmp_path / "train.jsonl", rows)
    val = write_rows(tmp_path / "val.jsonl", [{"instruction": "A", "output": "B"}])
    audit(tmp_path, train, val)
    assert findings(tmp_path) == [("train.jsonl", 1, "leak_text")]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read the manifest"), (b"", "is empty"), (b"\n\n", "every line is blank")]
)
def test_inputs_without_rows_end_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "m.jsonl").write_bytes(content)
    settings = AuditSettings(input=(str(tmp_path / "m.jsonl"),), output_dir=str(tmp_path / "audit"))
    with pytest.raises(RunError, match=message) as error:
        run_audit_job(settings, use_ray=False)
    assert "m.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damaged", ["all", "config.json", "tekken.json"])
def test_a_model_that_cannot_be_read_ends_in_one_line(tmp_path, damaged):
    manifest = write_rows(tmp_path / "m.jsonl", [{"instruction": "a", "output": "b"}])
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(TINY).glob("*.json"):
        (model / path.name).write_bytes(b"{" if path.name == damaged else path.read_bytes())
        if damaged == "all":
            (model / path.name).unlink()
    settings = AuditSettings(input=(manifest,), output_dir=str(tmp_path / "o"), model_id=str(model))
    with pytest.raises((RunError, SettingsError), match=str(model)) as error:
        run_audit_job(settings, use_ray=False)
    assert "\n" not in str(error.value)


def test_ids_are_compared_as_they_are_written(tmp_path):
    """Ids that look like hexadecimal numbers, or differ by a space, are different ids."""
    ids = ["12 34", "1234", "ab", "AB", "4", 4.5]
    rows = [{"instruction": f"물음 {n}", "output": "답", "id": value} for n, value in enumerate(ids)]
    assert audit(tmp_path, write_rows(tmp_path / "m.jsonl", rows))["faults"] == {}


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_report_opens_in_a_browser(planted, tmp_path):
    """No error on its console, pictures that load, the figures in it, and texts that stay texts."""
    _, train, val = planted
    figures = audit(tmp_path, train, val, model_id=TINY, max_len=200)
    report = tmp_path / "audit" / "report.html"
    text = report.read_text()
    assert not re.search(r"https?://|<script|<link", text), "nothing is fetched, nothing runs"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = done.stdout
    assert dom.count("<img") == 2 and dom.count("data:image/png;base64,") == 2
    assert f"{len(EXPECTED)} fault(s)" in dom and f"{train}:13" in dom
    assert f"<b>{figures['rows']}</b>" in dom and f"<b>{figures['clean_rows']}</b>" in dom
    assert ">새는 소리 &lt;script&gt;" in dom and "<script" not in dom
