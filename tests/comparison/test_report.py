"""Reports opened in a real browser: no errors, nothing fetched, sorting, filtering and paging by mouse and keyboard."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import manifest
from helpers.browser import BROWSER, Page, browser
from helpers.evaluations import write_evaluation

from voxray.commands.compare import run_compare
from voxray.comparison.report import write_report
from voxray.config.compare import CompareSettings

EVIL = '</script><script>document.title="ran"</script><img src=x onerror="document.title=1">&amp;<!--'
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser here")
SHOWN = "document.getElementById('shown').textContent"
COLUMN = "[...document.querySelectorAll('#rows tbody tr')].map(row => row.cells[{}].textContent)"


def speech_rows(num: int = 12) -> list[dict[str, Any]]:
    """Transcripts of the assets' clips with errors, and text answers."""
    lines = [json.loads(line) for line in Path(manifest("asr.val")).read_text(encoding="utf-8").splitlines()[:num]]
    rows: list[dict[str, Any]] = [
        {
            "id": f"clip-{index}",
            "source": f"{manifest('asr.val')}:{index + 1}",
            "reference": line["transcript"],
            "prediction": line["transcript"][: len(line["transcript"]) - index],
            "num_samples": 16_000 * (index + 1),
            "domain": ("내과", "외과")[index % 2],
        }
        for index, line in enumerate(lines)
    ]
    text = {"task": "tqa", "num_samples": 0}
    rows.append({**text, "prompt": f"묻습니다 {EVIL}", "reference": "정답", "prediction": EVIL})
    return [*rows, {**text, "id": EVIL, "speaker": EVIL, "reference": EVIL, "prediction": "x"}]


def many(num: int, wrong: int) -> list[dict[str, Any]]:
    """Rows of which the first ones are wrong, each with a different error."""
    return [
        {"reference": "가" * 50, "prediction": "가" * (50 - max(0, wrong - index)), "domain": f"d{index % 3}"}
        for index in range(num)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations, the report of one and the comparison of both."""
    folder = tmp_path_factory.mktemp("reports")
    rows = speech_rows()
    first = write_evaluation(folder / "a", rows, model_id=EVIL)
    fixed = [dict(row) for row in rows]
    for index, row in enumerate(fixed):
        row["prediction"] = row["reference"] if index % 2 else row["prediction"] + "요"
    second = write_evaluation(folder / "b", fixed)
    metrics = {"asr": {"cer_nospace": {"value": 0.5, "n": 8}, "of_old": {"value": 12.0, "n": 8}}, "overall": {}}
    (folder / "a" / "metrics.json").write_text(json.dumps(metrics))
    write_report(folder / "a", num_resamples=200)
    run_compare(CompareSettings(runs=(first, second), output_dir=str(folder / "out"), num_resamples=200))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_pages_are_self_contained(folder):
    for path in (folder / "a" / "report.html", folder / "out" / "comparison.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|<link|@import|url\(", text), "nothing is fetched"
        assert text.count("<script") == 2 and text.count("</script>") == 2, "the data and our own script"
        assert "<script>document" not in text and "<img" not in text, "texts are escaped"
        policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
        assert policy.startswith("default-src 'none'; ")
        for tag in ("style", "script"):
            content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
    errors = json.loads((folder / "a" / "errors.json").read_text())
    asr = errors["asr"]
    assert asr["units"]["character"]["num_deletions"] > 0 and set(errors) == {"asr", "tqa"}
    assert [row["error"] for row in asr["worst"]] == sorted((row["error"] for row in asr["worst"]), reverse=True)
    assert {(e["is"], e["n"]) for e in asr["slices"] if e["slice"] == "domain"} == {("내과", 6), ("외과", 6)}


@needs_browser
def test_a_report_opens_sorts_and_filters(folder, page):
    page.open(folder / "a" / "report.html")
    assert page.console == [] and len(page.requests) == 1, "only the page itself is requested"
    assert page.read("document.title") == "voxray evaluation: a" and page.read("document.images.length") == 0
    assert page.read(SHOWN) == "1-14 of 14 rows"
    errors = [float(text) for text in page.read(COLUMN.format(3))]
    assert errors == sorted(errors, reverse=True), "the worst come first"
    page.click("#rows th[data-key='error']")
    assert page.read(COLUMN.format(3)) == [f"{error:.2f}" for error in sorted(errors, reverse=True)]
    page.click("#rows th[data-key='error']")
    assert page.read(COLUMN.format(3)) == [f"{error:.2f}" for error in sorted(errors)]
    assert page.read("document.querySelector('#rows th[data-key=error]').getAttribute('aria-sort')") == "ascending"
    page.choose("#filter-task", "asr")
    assert page.read(SHOWN) == "1-12 of 12 rows" and set(page.read(COLUMN.format(0))) == {"asr"}
    page.choose("#filter-domain", "외과")
    assert sorted(page.read(COLUMN.format(1))) == [f"clip-{index}" for index in (1, 11, 3, 5, 7, 9)]
    page.choose("#filter-rows", "wrong")
    page.type("#filter-text", "clip-5")
    assert page.read(COLUMN.format(1)) == ["clip-5"] and page.read(SHOWN) == "1-1 of 1 rows"
    assert page.console == [], page.console


@needs_browser
def test_texts_stay_texts_and_clips_play(folder, page):
    """A transcript, an id, a speaker, a prompt and a model that hold tags; the clip of a row that is in the page."""
    page.open(folder / "a" / "report.html")
    page.choose("#filter-task", "tqa")
    shown = page.read("document.getElementById('rows').innerText + document.querySelector('.box').innerText")
    assert shown.count("<script>document.title") >= 3 and page.read("document.title") == "voxray evaluation: a"
    assert page.read("document.querySelectorAll('#rows script, #rows img').length") == 0
    page.choose("#filter-task", "asr")
    assert page.read("document.querySelectorAll('#rows audio').length") == 12
    page.read("document.querySelector('#rows audio').preload = 'auto'; document.querySelector('#rows audio').load()")
    page.wait_for("document.querySelector('#rows audio').readyState > 0")
    assert 0.3 < page.read("document.querySelector('#rows audio').duration") < 10
    assert page.console == [], page.console


@needs_browser
def test_diffs_are_aligned_and_coloured(folder, page):
    """A missing end is marked, with an empty answer below; equal text is shown above itself."""
    page.open(folder / "a" / "report.html")
    page.type("#filter-text", "clip-4")
    pairs = page.read(
        "[...document.querySelectorAll('#rows .pair')].map(pair => [pair.className,"
        " pair.children[0].textContent, pair.children[1].textContent])"
    )
    reference = speech_rows()[4]["reference"]
    assert "".join(top for _, top, _ in pairs).replace("␣", " ") == reference
    missing = [pair for pair in pairs if pair[0] == "pair d"]
    assert missing == pairs[-len(missing) :] and all(below == "" for *_, below in missing)
    assert len("".join(top for _, top, _ in missing)) == 4
    assert all(top == below for kind, top, below in pairs[:-1] if kind == "pair e")
    colour = "getComputedStyle(document.querySelector('#rows .pair.d .ref')).backgroundColor"
    light = page.read(colour)
    page.open(folder / "a" / "report.html", dark=True)
    assert (
        page.read(colour) != light and page.read("getComputedStyle(document.body).backgroundColor") == "rgb(20, 25, 31)"
    )


@needs_browser
@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_overflows_and_hangul_is_above_its_replacement(page, tmp_path, width):
    """A narrow window, very long words, wide letters replaced by narrow ones, an answer that reads right to left."""
    texts = [("혈압이 높다", "knee 높다"), ("가" * 2000, "나" * 900), ("مرحبا كيف", "مرحبا كي"), ("x y", "x" * 500)]
    more = {"references": [], "speaker": "s" * 200}
    rows = [{"reference": one, "prediction": other, **more} for one, other in texts]
    rows += [{**row, "task": "tqa", "id": "z" * 300} for row in rows]
    rows.append(
        {"task": "tqa", "reference": "네", "references": ["네", "예"], "prediction": "네", "id": "either"}
        | {"speaker": "s"}
    )
    one = write_evaluation(tmp_path / ("long_name_of_a_run_" * 5), rows, model_id="/" + "m" * 300)
    answered = [{**row, "prediction": "예" if row.get("id") == "either" else ""} for row in rows]
    other = write_evaluation(tmp_path / ("another_name_of_a_run_" * 5), answered)
    run_compare(CompareSettings(runs=(one, other), output_dir=str(tmp_path / "out"), num_resamples=200))
    write_report(Path(one), num_resamples=200)
    for path in (tmp_path / "out" / "comparison.html", Path(one, "report.html")):
        page.open(path, width=width)
        assert page.read("document.documentElement.scrollWidth") <= width and page.console == []
        right = page.read("[...document.querySelectorAll('#rows .right')].map(line => line.textContent)")
        assert right == ["\u2713 네", "\u2713 예"][: 1 + (path.name == "comparison.html")], (
            "a correct answer is shown in its own words"
        )
    page.type("#filter-text", "knee")
    boxes = "['ref', 'hyp'].map(c => pair.querySelector('.' + c).getBoundingClientRect().x)"
    pairs = page.read(f"[...document.querySelectorAll('#rows .pair.s')].map(pair => [pair.innerText, ...{boxes}])")
    assert len(pairs) == 4 and all(above == below for _, above, below in pairs), "three letters by character, one word"


@needs_browser
def test_tables_sort_and_name_outdated_metrics(folder, page):
    page.open(folder / "a" / "report.html")
    names = "[...document.querySelectorAll('#metrics tbody tr')].map(row => Number(row.cells[2].textContent))"
    before = page.read(names)
    page.click("#metrics th:nth-child(3)")
    assert page.read(names) == sorted(before, reverse=True) != before
    assert 12.0 in before, "metrics that cannot be computed again are taken from metrics.json"
    warning = page.read("document.querySelector('.warnings').innerText")
    assert "metrics.json holds other values of asr cer_nospace" in warning


@needs_browser
def test_a_comparison_opens_sorts_and_filters(folder, page):
    page.open(folder / "out" / "comparison.html")
    assert page.console == [] and page.read(SHOWN) == "1-14 of 14 rows"
    heads = page.read("[...document.querySelectorAll('#rows th')].map(head => head.textContent)")
    assert heads[:6] == ["task", "id", "sec", "error, a", "error, b", "change"]
    page.choose("#filter-rows", "mended")
    assert set(page.read(COLUMN.format(1))) >= {"clip-1", "clip-3"}
    assert page.read("document.querySelectorAll('#rows .tag.mended').length") == page.read(
        "document.querySelectorAll('#rows tbody tr').length"
    )
    page.choose("#filter-rows", "broken")
    assert page.read(COLUMN.format(1)) == ["clip-0"]
    page.choose("#filter-rows", "")
    page.click("#rows th[data-key='change']")
    changes = [float(text) for text in page.read(COLUMN.format(5))]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0 > changes[-1]
    assert page.read("document.querySelectorAll('.lead li').length") == 5, "verdicts, the slices of one task, changes"
    glance = page.read("document.getElementById('overview').innerText")
    assert glance.startswith("run\tmacro\tweighted\tbalance\tasr cer_nospace ↓\ttqa rouge_l ↑")
    assert page.read("document.querySelectorAll('svg').length") >= 3
    visible = "[...document.querySelectorAll('#slices tbody tr')].filter(row => !row.hidden).map(row => row.innerText)"
    assert len(page.read(visible)) > 2
    page.choose("#filter-slice-by", "domain")
    shown = page.read(visible)
    assert len(shown) == 2 and all("\tdomain\t" in row for row in shown) and page.console == []


@needs_browser
def test_thousands_of_rows_are_shown_page_by_page(page, tmp_path):
    """The worst rows are in the page, which says how many are not; the keyboard sorts as well."""
    path = Path(write_evaluation(tmp_path / "many", many(1500, 40)))
    write_report(path, num_resamples=200, max_rows=1200)
    page.open(path / "report.html")
    assert page.read(SHOWN) == "1-25 of 1200 rows, 300 further rows are not in this page"
    assert page.read(COLUMN.format(3))[:2] == ["0.80", "0.78"]
    page.click("#explorer .pager button:nth-child(2)")
    assert page.read(SHOWN).startswith("26-50 of 1200") and page.read(COLUMN.format(3))[0] == "0.30"
    page.read("document.querySelector('#rows th[data-key=id]').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert page.read(COLUMN.format(1))[0] == "r0" and page.read(SHOWN).startswith("1-25")
    page.choose("#filter-domain", "d1")
    assert page.read(SHOWN).startswith("1-25 of 400 rows")
    assert page.console == [], page.console


def test_clips_that_are_too_large_or_cut_from_files(tmp_path):
    """Over the limit the page links to files; a part of a file is embedded as its own clip, or linked as a part."""
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "long file.wav", np.zeros(160_000), 16_000)
    line = {"audio_path": "long file.wav", "transcript": "혈압", "start": 1.5, "duration": 2.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "audio_path": "none.wav"}))
    rows = [{"reference": "혈압", "prediction": "x", "source": f"{tmp_path}/m.jsonl:{n}"} for n in (1, 2, 3)]
    path = Path(write_evaluation(tmp_path / "run", rows))

    def clips(embed_audio_mib: int) -> list[str]:
        write_report(path, num_resamples=200, embed_audio_mib=embed_audio_mib)
        text = (path / "report.html").read_text()
        data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
        return [row["u"] for row in data["rows"] if "u" in row]

    assert clips(0) == [f"{(tmp_path / 'long file.wav').as_uri()}#t=1.5,3.5"]
    assert "(0 MiB, more than --embed_audio_mib)" in (path / "report.html").read_text()
    [inside] = clips(16)
    assert inside.startswith("data:audio/wav;base64,") and len(inside) == pytest.approx(2 * 32_000 * 4 / 3, rel=0.01)
