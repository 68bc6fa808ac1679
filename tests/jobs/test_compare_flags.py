"""Flags of compare and their effects; runs as positional arguments; errors in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.evaluations import write_evaluation
from helpers.running import ROOT, load_job, parse_only

REFERENCES = [
    f"{one} {other}" for one in ("혈압이", "오늘", "하루에", "머리가") for other in ("높다", "세 번", "약을", "x")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two runs on 16 rows, that differ in most of them."""
    folder = tmp_path_factory.mktemp("runs")
    texts = {"a": [text[index % 5 :] for index, text in enumerate(REFERENCES)]}
    texts["b"] = [text[index % 2 :] for index, text in enumerate(REFERENCES)]
    rows = {
        name: [{"reference": one, "prediction": other} for one, other in zip(REFERENCES, answers, strict=True)]
        for name, answers in texts.items()
    }
    return write_evaluation(folder / "a", rows["a"]), write_evaluation(folder / "b", rows["b"])


def compare(argv: str) -> None:
    load_job("compare").main(argv.split())


def fails(argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        compare(argv)
    assert isinstance(end.value.code, int)
    return end.value.code


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def rows_of_page(path: Path) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])["rows"]


def test_runs_as_words_or_flag(runs, tmp_path, monkeypatch):
    """Words come first; a relative run is found from where one stands, and the output lands where it is asked for."""
    monkeypatch.chdir(Path(runs[0]).parent)
    compare(f"a b --output_dir {tmp_path}/words")
    compare(f"--runs {runs[0]},{runs[1]} --storage_path {tmp_path} --output_dir flag")
    results = [result(tmp_path / name) for name in ("words", "flag")]
    assert results[0] == results[1] and [run["folder"] for run in results[0]["runs"]] == list(runs)
    assert (tmp_path / "words" / "comparison.html").is_file()
    compare("a")
    assert {"report.html", "errors.json"} <= {path.name for path in Path(runs[0]).iterdir()}
    compare(f"a --output_dir {tmp_path}/one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"report.html", "errors.json"}
    monkeypatch.chdir(tmp_path)
    compare(f"{runs[0]} {runs[1]}")
    assert (tmp_path / "runs" / "compare" / "comparison.json").is_file(), "the default"


def test_seed_and_num_resamples(runs, tmp_path):
    """The same draws give the same intervals; many draws give finer p-values than few."""
    results = {}
    few = {name: f"--seed {seed} --num_resamples 100" for name, seed in {"a": 1, "b": 1, "c": 2}.items()}
    for name, flags in {**few, "d": "--seed 1 --num_resamples 20000"}.items():
        compare(f"{runs[0]} {runs[1]} --output_dir {tmp_path}/{name} {flags}")
        results[name] = result(tmp_path / name)
    differences = {name: entry["tasks"]["asr"]["differences"][0] for name, entry in results.items()}
    assert differences["a"] == differences["b"]
    assert len({differences[name]["low"] for name in "acd"}) == 3
    assert (results["c"]["seed"], results["d"]["num_resamples"]) == (2, 20_000)


def test_top_and_max_rows(runs, tmp_path):
    """How much is listed, and how many rows the page holds: those with the largest changes."""
    compare(f"{runs[0]} {runs[1]} --output_dir {tmp_path}/few --top 2 --max_rows 5")
    compare(f"{runs[0]} {runs[1]} --output_dir {tmp_path}/all")
    lists = [result(tmp_path / name)["tasks"]["asr"]["changes"][0] for name in ("few", "all")]
    assert lists[0]["num_better"] == lists[1]["num_better"] > 2
    assert len(lists[0]["better"]) == 2 and lists[0]["better"] == lists[1]["better"][:2]
    few, whole = (rows_of_page(tmp_path / name / "comparison.html") for name in ("few", "all"))
    assert len(few) == 5 and len(whole) == 16 and few == whole[:5]
    assert "11 more are left out (--max_rows 5)" in (tmp_path / "few" / "comparison.html").read_text()
    compare(f"{runs[0]} --output_dir {tmp_path}/one --top 1")
    errors = json.loads((tmp_path / "one" / "errors.json").read_text())["asr"]
    assert len(errors["units"]["character"]["deletions"]) == 1 and len(errors["worst"]) == 1


def test_embed_audio_mib(small, tmp_path):
    lines = [json.loads(line) for line in Path(small["asr.val"]).read_text().splitlines()]
    rows = [
        {"reference": line["transcript"], "prediction": "x", "source": f"{small['asr.val']}:{index}"}
        for index, line in enumerate(lines, start=1)
    ]
    run = write_evaluation(tmp_path / "run", rows)
    for flags, beginning in (("", "data:audio/"), ("--embed_audio_mib 0", "file:///")):
        compare(f"{run} {flags}")
        clips = [row["u"] for row in rows_of_page(tmp_path / "run" / "report.html")]
        assert len(clips) == len(rows) and all(clip.startswith(beginning) for clip in clips)


def test_demo_compares_the_runs_of_make_demo(tmp_path, monkeypatch, capsys):
    """Without flags: the base and the tuned evaluation of the demo, or how to make them."""
    settings = parse_only("compare", [])
    assert [Path(run).parts[-3:] for run in settings.runs] == [("runs", "demo", "base"), ("runs", "demo", "tuned")]
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "jobs" / "configs" / "demo_compare.yaml").read_text())
    assert fails(f"--runs {','.join(config['runs'])}") == 1
    error = capsys.readouterr().err
    assert "no evaluation there" in error and "`make demo` makes runs/demo/base and runs/demo/tuned" in error


def test_refusals(runs, tmp_path, capsys):
    for argv, status, message in (
        (f"{runs[0]} {tmp_path}/none", 1, "none: no evaluation there (no predictions/part-*.parquet)"),
        (f"{runs[0]} {runs[0]}", 2, "is given twice"),
        (f"--output_dir {tmp_path}/o {runs[0]}", 2, "not a flag; every value follows its --flag"),
        (f"{runs[0]} --runs {runs[1]}", 2, "--runs: given twice"),
        (f"--output_dir {tmp_path}/o", 2, "--runs: Field required"),
        (f"{runs[0]} --num_resamples 5 --top 0 --max_rows 0 --embed_audio_mib -1", 2, "--embed_audio_mib"),
        (f"{runs[0]} {runs[1]} --output_dir {runs[0]}/metrics.json/x", 1, "cannot write there"),
    ):
        assert fails(argv) == status
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_old_spellings(runs):
    settings = parse_only("compare", f"{runs[0]} --out_dir o --num_bootstrap 200 --top_n 3".split())
    assert (settings.output_dir, settings.num_resamples, settings.top) == ("o", 200, 3)
