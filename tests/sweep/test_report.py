"""The report of a sweep in a real browser: nothing fetched, no error, lines that can be pointed at and chosen."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import BROWSER, Page, browser
from helpers.sweeps import sweep_settings, write

from voxray.sweep.report import write_report
from voxray.sweep.results import summarise_trials
from voxray.sweep.trials import read_trials

METRIC, QA = "asr/cer_nospace", "sqa/rouge_l"
SPACE = '{lora_r: [4, 8, 16], lr: {log: [1e-5, 1e-2]}, task_weights: ["1,1,1", "3,1,1"]}'
EVIL = '</script><script>document.title="ran"</script><img src=x onerror="document.title=1">'
LEFT = (
    "[...document.querySelectorAll('#trials tbody tr')].filter(row => !row.hidden).map(row => row.cells[0].textContent)"
)


def report(folder: Path, *flags: str) -> str:
    settings = sweep_settings(folder, *flags)
    outcome = summarise_trials(read_trials(folder), settings.metric, settings.mode, settings.top_k)
    write_report(folder / "report.html", settings, outcome)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve trials of three flags, two of them stopped and one failed, the best two again with other seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    for number in range(1, 13):
        lr, rank = 10 ** (-5 + 0.25 * number), (4, 8, 16)[number % 3]
        shares = {"asr": 3.0 if number % 2 else 1.0, "sqa": 1.0, "tqa": 1.0}
        value = abs(number - 8) / 10 + 0.1 + rank / 1000
        history: list[dict[str, Any]] = [{METRIC: value + 0.2, QA: 0.5}, {METRIC: value, QA: 0.4 + number / 40}]
        fields: dict[str, Any] = {"state": "stopped", "reason": "at step 10"} if number in (1, 2) else {}
        if number == 12:
            fields, history = {"state": "failed", "reason": EVIL}, []
        write(folder, number, {"lora_r": rank, "lr": lr, "task_weights": shares}, *history, **fields)
    for first, base in ((8, 0.1), (9, 0.11)):
        choice = next(trial.choice for trial in read_trials(folder) if trial.number == first)
        for seed in (1, 2, 3):
            choice = {**choice, "seed": seed}
            write(folder, 10 * first + seed, choice, {METRIC: base + seed / 100}, repeats=first)
    report(folder, "--space", SPACE, "--num_trials", "12", "--top_k", "2")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


def test_a_page_is_self_contained(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|@import|url\(", text), "nothing is fetched"
    assert text.count("<script") == text.count("</script>") == 1 and "default-src 'none'" in text
    for text_part in (
        "Best: lora_r 16, lr 0.001, task_weights asr=1,sqa=1,tqa=1 (trial 8): asr/cer_nospace 0.1200, the mean of 3",
        "Of the choices trained again, its interval overlaps with that of another choice",
        "2 of 12 trials stopped early, as weaker than others: 1, 2.",
        "1 of 12 trials failed; the table says why: 12.",
        "asr/cer_nospace against sqa/rouge_l",
        "Importance of each flag",
        "The best again, with other seeds",
    ):
        assert text_part in text, text_part
    assert text.count('<path class="trial') == 11, "all trials but the one that failed"
    assert "asr/cer_nospace against tqa" not in text


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_lines_are_highlighted_and_selected(folder: Path, page: Page) -> None:
    page.open(folder / "report.html")
    assert (
        page.console == []
        and len(page.requests) == 1
        and page.read("document.title") == "voxray: Sweep of train_multitask"
    )
    assert len(page.read(LEFT)) == 12
    drag(page, 1, 0.0, 0.5)
    upper = page.read(LEFT)
    assert sorted(map(int, upper)) == [7, 8, 9, 10, 11], "learning rates in the upper half of the logarithm"
    assert page.read("document.getElementById('pointed').textContent") == "5 of 11 trials: 7, 8, 9, 10, 11"
    assert page.read("document.querySelectorAll('path.trial:not(.far)').length") == 5
    drag(page, 0, 0.7, 1.0)
    assert page.read(LEFT) == ["9"], "and of the lowest rank as well"
    drag(page, 0, 0.5, 0.5)
    drag(page, 1, 0.5, 0.5)
    assert len(page.read(LEFT)) == 12, "a click on an axis takes its choice away"
    page.read("document.querySelector('path.winner').dispatchEvent(new Event('pointerenter'))")
    status = page.read("document.getElementById('pointed').textContent")
    assert status.startswith("trial 8, lora_r 16, lr 0.001, ") and "state done" in status
    assert page.read("document.querySelector('#trials tr.near').cells[0].textContent") == "8"
    page.click("#trials th")
    assert page.read(LEFT)[:3] == ["12", "11", "10"], "sorted by number"
    assert page.read("document.title").startswith("voxray") and page.console == [], page.console


def drag(page: Page, axis: int, top: float, bottom: float) -> None:
    """Draw along an axis with the mouse, between two shares of its height from the top."""
    area = f"document.querySelectorAll('.axis-area')[{axis}]"
    page.read(f"{area}.scrollIntoView({{block: 'center'}})")
    box = page.read(
        f"(() => {{ const r = {area}.getBoundingClientRect(); return [r.x + r.width / 2, r.y, r.height]; }})()"
    )
    for kind, share in (("mousePressed", top), ("mouseMoved", bottom), ("mouseReleased", bottom)):
        position = {"x": box[0], "y": box[1] + box[2] * share}
        page.call("Input.dispatchMouseEvent", type=kind, **position, button="left", buttons=1, clickCount=1)


@pytest.mark.parametrize("case", ["one", "failed", "nothing", "no number", "one flag", "equal"])
def test_a_page_for_every_outcome_of_the_trials(case: str, tmp_path: Path) -> None:
    choice = {"task_weights": {"asr": 1.0, "sqa": 1.0, "tqa": 1.0}, "lora_r": 4}
    if case == "one":
        write(tmp_path, 1, choice, {METRIC: 0.5})
    elif case == "failed":
        write(tmp_path, 1, choice, state="failed", reason=EVIL)
    elif case == "no number":
        write(tmp_path, 1, choice, {METRIC: None}, {"tqa/loss": 2.0})
        write(tmp_path, 2, {**choice, "lora_r": 8}, {METRIC: 0.4, QA: None}, state="stopped")
    elif case in ("one flag", "equal"):
        for number in (1, 2, 3):
            rank = (4, 8, 4)[number - 1]
            write(
                tmp_path,
                number,
                {**choice, "lora_r": rank},
                {METRIC: 0.5, QA: 0.5},
                state="running" if number > 2 else "done",
            )
    text = report(tmp_path, "--lora_r", "4" if case == "one" else "4,8")
    assert "<script>document" not in text and not re.search(r"[ \"',>]nan[ \"',<%]", text)
    assert ("there is no winner" in text) == (case in ("failed", "nothing"))
    assert ("&lt;/script&gt;" in text) == (case == "failed")


def test_trials_at_the_same_point_share_a_label(tmp_path: Path) -> None:
    """And a metric with the same value in all trials has one tick, within its range."""
    for number, rank in enumerate((4, 8, 16), 1):
        write(tmp_path, number, {"lora_r": rank}, {METRIC: 0.2 if number < 3 else 0.4, QA: 1.0})
    text = report(tmp_path, "--lora_r", "4,8,16")
    plot = text[text.index(f"{METRIC} against {QA}") :]
    assert ">1, 2</text>" in plot and ">3</text>" in plot and ">1.5</text>" not in text
