"""Comparing evaluations: values equal to jiwer's, matching and scoring rows, warnings, verdicts, errors."""

import json
import random
from pathlib import Path

import jiwer
import pytest
from helpers.evaluations import write_evaluation
from sacrebleu.metrics.chrf import CHRF

from voxray.commands.compare import run_compare
from voxray.comparison.compare import compare_slices, compare_tasks, verdicts
from voxray.comparison.evaluations import match_rows, read_evaluations, short_labels, training_differences
from voxray.config.compare import CompareSettings
from voxray.core.errors import RunError, SettingsError
from voxray.metrics.texts import score_texts

WORDS = [
    "혈압이",
    "높고",
    "어지럽습니다",
    "하루에",
    "세",
    "번",
    "식후에",
    "약을",
    "드세요",
    "오늘",
    "아침",
    "검사",
    "결과",
]


def sentences(num: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 8))) for _ in range(num)]


def damaged(texts: list[str], share: float, seed: int) -> list[str]:
    """Texts in which a share of the characters is replaced."""
    rng = random.Random(seed)
    return ["".join("기" if char != " " and rng.random() < share else char for char in text) for text in texts]


def rows(references: list[str], predictions: list[str], **more) -> list[dict]:
    return [{"reference": one, "prediction": other, **more} for one, other in zip(references, predictions, strict=True)]


def compare(tmp_path: Path, *runs: str, **changes) -> dict:
    values = {"runs": runs, "output_dir": str(tmp_path / "out"), "num_resamples": 1000, **changes}
    return run_compare(CompareSettings(**values))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[str], list[str], list[str]]:
    """Two runs on 60 transcripts, the second much better."""
    folder = tmp_path_factory.mktemp("pair")
    references = sentences(60)
    first, second = damaged(references, 0.25, 1), damaged(references, 0.08, 2)
    one = write_evaluation(folder / "base", rows(references, first), gen_max_new_tokens=32)
    other = write_evaluation(folder / "tuned", rows(references, second), gen_max_new_tokens=32)
    return one, other, references, first, second


def test_values_are_jiwers_and_the_verdict_says_them(pair, tmp_path, capsys):
    one, other, references, first, second = pair
    result = compare(tmp_path, one, other)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == result
    assert (result["num_matched"], result["matched_by"], result["warnings"]) == (60, "source", [])
    metrics = result["tasks"]["asr"]["metrics"]
    for index, answers in enumerate((first, second)):
        solid = [[text.replace(" ", "") for text in texts] for texts in (references, answers)]
        assert metrics["wer"]["runs"][index]["value"] == pytest.approx(jiwer.wer(references, answers))
        assert metrics["cer"]["runs"][index]["value"] == pytest.approx(jiwer.cer(references, answers))
        assert metrics["cer_nospace"]["runs"][index]["value"] == pytest.approx(jiwer.cer(*solid))
    [entry] = [e for e in result["tasks"]["asr"]["differences"] if e["metric"] == "cer_nospace"]
    assert entry["low"] < entry["difference"] < entry["high"] < 0 and entry["p"] < 0.01 and entry["is_shown"]
    [sentence] = result["verdicts"]
    values = f"cer_nospace {entry['first_value']:.3f} -> {entry['second_value']:.3f}"
    assert sentence.startswith(f"asr: tuned is better than base ({values}, difference {entry['difference']:+.3f} [")
    assert sentence.endswith("p < 0.001; 60 rows)") and sentence in capsys.readouterr().out
    assert metrics["cer_nospace"]["best_or_not_shown_to_differ"] == ["tuned"]
    swapped = compare(tmp_path, other, one)["verdicts"][0]
    assert swapped.startswith("asr: base is worse than tuned (")
    assert result["summaries"] == ["tuned against base: better on asr"]
    assert result["overall"]["macro"]["tuned"] == pytest.approx(1 - entry["second_value"])


def test_chance_is_no_significant_difference(pair, tmp_path, capsys):
    one, _, references, first, _ = pair
    other = write_evaluation(tmp_path / "again", rows(references, damaged(references, 0.25, 4)))
    result = compare(tmp_path, one, other)
    assert result["verdicts"][0].startswith("asr: no difference can be shown between base and again (cer_nospace ")
    best = result["tasks"]["asr"]["metrics"]["cer_nospace"]["best_or_not_shown_to_differ"]
    assert best == ["base", "again"], "neither is marked as the better one"
    assert not any(entry["is_shown"] for entry in result["slices"])
    assert (
        result["tasks"]["asr"]["metrics"]["wer"]["runs"] and "*" not in capsys.readouterr().out.split("* the best")[0]
    )
    same = write_evaluation(tmp_path / "same", rows(references, first))
    assert compare(tmp_path, one, same)["warnings"] == [
        "same gave the same answer as base to every row: are they the same model?"
    ]


def test_what_one_broke_and_mended(tmp_path):
    """Rows are counted as broken, mended, worse or better, and the most changed ones are listed."""
    references = ["혈압이 높고", "세 번", "약을 드세요", "오늘 아침", "검사 결과", "식후에"]
    one = write_evaluation(tmp_path / "a", rows(references, ["혈압이 높고", "세 번", "약", "오늘", "검사", "식후에"]))
    other = write_evaluation(
        tmp_path / "b", rows(references, ["혈압이", "x", "약을 드세요", "오늘 아", "검", "식후에"])
    )
    [change] = compare(tmp_path, one, other, top=1)["tasks"]["asr"]["changes"]
    assert {name: change[f"num_{name}"] for name in ("broken", "mended", "worse", "better")} == {
        "broken": 2,
        "mended": 1,
        "worse": 1,
        "better": 1,
    }
    [broken] = change["broken"]
    assert (broken["id"], broken["first_prediction"], broken["second_prediction"]) == ("r1", "세 번", "x")
    assert broken["first_error"] == 0 and broken["second_error"] == 1


def test_rows_are_matched_by_source_else_by_id(pair, tmp_path):
    """Rows of a moved manifest are matched by id; rows that one run lacks or with other references are left out."""
    one, _, references, _, second = pair
    moved = [
        {**row, "source": f"/elsewhere/val.jsonl:{index + 7}"} for index, row in enumerate(rows(references, second))
    ]
    other = write_evaluation(tmp_path / "moved", moved)
    assert (compare(tmp_path, one, other)["matched_by"], compare(tmp_path, one, other)["num_matched"]) == ("id", 60)
    fewer = write_evaluation(
        tmp_path / "fewer", [*rows(references[:50], second[:50]), {"reference": "다른 말", "prediction": ""}]
    )
    result = compare(tmp_path, one, fewer)
    assert result["num_matched"] == 50
    assert "the data differ: 50 rows matched (base 60, fewer 51)" in result["warnings"][0]
    assert result["warnings"][1] == "1 rows are left out, for their references differ between the runs"
    twice = write_evaluation(
        tmp_path / "twice", [{**row, "source": "/data/asr.val.jsonl:1"} for row in rows(references, second)]
    )
    several = [{"task": "aac", "reference": "비", "references": ["비가 온다", "바람이 분다"]}] * 3
    captions = [
        write_evaluation(tmp_path / name, [{**row, "prediction": answer} for row in several])
        for name, answer in (("rain", "비가 온다"), ("wind", "바람이 분다"))
    ]
    assert compare(tmp_path, *captions)["num_matched"] == 3, "each answer is closest to another of the same references"
    warned = compare(tmp_path, one, twice)["warnings"]
    assert warned == [], "the ids still tell them apart"


def test_different_settings_give_warnings(pair, tmp_path):
    one, _, references, _, second = pair
    more = {"gen_max_new_tokens": 64, "lora_dir": "x", "per_device_bsz": 9, "num_beams": 4}
    other = write_evaluation(tmp_path / "o", rows(references, second, prompt="Transcribe"), **more)
    (tmp_path / "o" / "metrics.json").write_text(json.dumps({"normalizer": {"ko-v2": 60}}))
    warnings = compare(tmp_path, one, other)["warnings"]
    assert warnings == [
        "60 of 60 matched rows were asked with other prompts",
        "o: its metrics.json was normalised by ko-v2, here by ko-v1; all figures here are counted anew",
        "--gen_max_new_tokens differs: base 32, o 64",
    ], "adapter and batch size are ignored, and so is a flag that an older run does not have"


def test_slices_and_speakers(tmp_path):
    """A run that is better on one domain and worse on another; speakers are resampled if there are enough."""
    references = sentences(120)
    good, bad, middle = (damaged(references, share, seed) for share, seed in ((0.05, 1), (0.4, 2), (0.2, 3)))
    half = [good[index] if index % 2 else bad[index] for index in range(120)]

    def evaluation(name: str, answers: list[str], num_speakers: int) -> str:
        answered = rows(references, answers)
        more = [{"domain": ("내과", "외과")[index % 2], "speaker": f"s{index % num_speakers}"} for index in range(120)]
        return write_evaluation(
            tmp_path / name, [{**row, **fields} for row, fields in zip(answered, more, strict=True)]
        )

    result = compare(tmp_path, evaluation("a", middle, 20), evaluation("b", half, 20))
    assert result["verdicts"][0].endswith("120 rows of 20 speakers)")
    assert result["tasks"]["asr"]["resampled"] == "speaker" and result["tasks"]["asr"]["num_units"] == 20
    domains = {e["value"]: e for e in result["slices"] if e["slice"] == "domain"}
    assert domains["내과"]["is_shown"] and domains["내과"]["difference"] > 0 and domains["내과"]["num_rows"] == 60
    assert domains["외과"]["is_shown"] and domains["외과"]["difference"] < 0
    [sentence] = result["slice_verdicts"]
    num_better = sum(e["is_shown"] and e["difference"] < 0 for e in result["slices"])
    num_worse = sum(e["is_shown"] and e["difference"] > 0 for e in result["slices"])
    assert sentence.startswith(
        f"asr by slice: b is better in {num_better} of {len(result['slices'])}, worse in {num_worse} ("
    )
    values = f"{domains['내과']['first_value']:.3f} -> {domains['내과']['second_value']:.3f}"
    assert f"(domain 내과 {values}, p = {domains['내과']['p_adjusted']:.3f})" in sentence
    assert all(e["p_adjusted"] >= e["p"] for e in result["slices"])
    assert len([e for e in result["slices"] if e["slice"] == "speaker"]) == 20
    few = compare(tmp_path, evaluation("c", middle, 3), evaluation("d", good, 3))
    assert few["verdicts"][0].endswith("120 rows of 3 speaker(s), too few to say anything of others)")


def test_many_runs_in_one_table(pair, tmp_path):
    """Every pair is tested, and p-values are adjusted, because among many runs some differ by chance."""
    one, other, references, _, _ = pair
    third = write_evaluation(tmp_path / "third", rows(references, damaged(references, 0.08, 5)))
    result = compare(tmp_path, one, other, third)
    differences = [e for e in result["tasks"]["asr"]["differences"] if e["metric"] == "cer_nospace"]
    assert [(e["first"], e["second"]) for e in differences] == [
        ("base", "tuned"),
        ("base", "third"),
        ("tuned", "third"),
    ]
    assert [e["is_shown"] for e in differences] == [True, True, False]
    assert sorted(e["p_adjusted"] for e in differences)[0] == pytest.approx(3 * min(e["p"] for e in differences))
    assert result["tasks"]["asr"]["metrics"]["cer_nospace"]["best_or_not_shown_to_differ"] == ["tuned", "third"]
    assert len(result["verdicts"]) == 2 and len(result["tasks"]["asr"]["changes"]) == 2


def test_tasks_are_compared_one_by_one(tmp_path):
    """Answers by ROUGE-L, where more is better; a run that is better on one task and worse on the other."""
    references = sentences(40)
    good, bad = damaged(references, 0.05, 1), damaged(references, 0.3, 2)
    of_task = {"prompt": "무엇입니까?", "task": "sqa"}
    runs = []
    for name, (asr, sqa) in {"a": (good, bad), "b": (bad, good)}.items():
        answered = [*rows(references, asr), *rows(references, sqa, **of_task)]
        runs.append(write_evaluation(tmp_path / name, answered))
    results = compare(tmp_path, *runs)["verdicts"]
    assert results[0].startswith("asr: b is worse than a (cer_nospace") and results[1].startswith(
        "sqa: b is better than a (rouge_l"
    )


ENGLISH = "The doctor says that her blood pressure is high, so she should rest for 2 days at home and drink water."


def test_translations_are_compared_by_bleu(tmp_path, capsys):
    """Values of sacrebleu on raw text, with intervals, p-values, slices and reports."""
    rng = random.Random(0)
    references = [" ".join(rng.choices(ENGLISH.split(), k=rng.randint(6, 20))) for _ in range(50)]
    references[::10] = sentences(5)
    good = [" ".join(word for word in text.split() if rng.random() < 0.9) for text in references]
    bad = [" ".join(word.lower() for word in text.split() if rng.random() < 0.7) for text in references]
    of_task = {"task": "ast", "prompt": "Translate the speech into English."}
    runs = []
    for name, answers in {"a": bad, "b": good}.items():
        answered = [{**row, "domain": "xy"[n % 2]} for n, row in enumerate(rows(references, answers, **of_task))]
        runs.append(write_evaluation(tmp_path / name, answered))
    result = compare(tmp_path, *runs)
    metrics = result["tasks"]["ast"]["metrics"]
    for index, answers in enumerate((bad, good)):
        chrf = CHRF()
        assert metrics["chrf"]["runs"][index]["value"] == chrf.corpus_score(answers, [references]).score
        [error, *_] = read_evaluations(runs)[index].rows
        assert error.error == 1 - chrf.sentence_score(answers[0], [references[0]]).score / 100
        bleu = metrics["bleu"]["runs"][index]
        assert bleu["low"] < bleu["value"] < bleu["high"]
        assert bleu["value"] == score_texts("ast", list(zip(references, answers, strict=True)))[0]["bleu"].value
    assert result["verdicts"][0].startswith("ast: b is better than a (bleu ") and result["normalizer"] == "none"
    assert result["overall"]["macro"]["b"] == metrics["bleu"]["runs"][1]["value"] / 100
    slices = {entry["value"]: entry for entry in result["slices"] if entry["slice"] == "domain"}
    assert set(slices) == {"x", "y"} and all(
        entry["metric"] == "bleu" and entry["is_shown"] for entry in slices.values()
    )
    assert "bleu (0 to 100)" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    report = compare(tmp_path, runs[0])["ast"]
    assert report["slices"][0]["metric"] == "bleu" and report["worst"][0]["error"] > report["worst"][-1]["error"] > 0
    assert "bleu (0 to 100)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "bleu" in capsys.readouterr().out


def test_empty_references_and_odd_texts_are_compared(tmp_path):
    """Silence, decomposed Hangul, emoji and an empty answer give finite values."""
    texts = ["", "혈압", "\u1112\u1167\u11af\u110b\u1161\u11b8", "😀 네", "가" * 3000]
    one = write_evaluation(tmp_path / "a", rows(texts, ["말", "혈압", "혈압", "네", "가" * 2990]))
    other = write_evaluation(tmp_path / "b", rows(texts, ["", "", "혈압", "😀", "나" * 100]))
    runs = read_evaluations([one, other])
    comparisons = compare_tasks(match_rows(runs), seed=0, num_resamples=500)
    assert verdicts(runs, comparisons, 1) and compare_slices(comparisons, seed=0, num_resamples=500) == []
    assert [row.error for row in runs[0].rows] == [1.0, 0.0, 0.0, 0.0, pytest.approx(10 / 3000)]


def test_rows_are_scored_by_the_rules_of_the_first_run(tmp_path):
    """Its terms and English spellings are used for all runs, so that the values are those of metrics.json."""
    (tmp_path / "terms.txt").write_text("혈압\n약\n")
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    rules = {"terms": str(tmp_path / "terms.txt"), "english_spelling": str(tmp_path / "normalizer.json")}
    references = ["혈압 약", "약", "the colour red"]
    answers = [["혈압", "약", "the color red"], ["혈압 약", "약", "the color red"]]
    languages = [{"language": "ko"}, {"language": "ko"}, {"language": "en"}]
    runs = []
    for name, predictions in zip("ab", answers, strict=True):
        answered = [{**row, **more} for row, more in zip(rows(references, predictions), languages, strict=True)]
        runs.append(write_evaluation(tmp_path / name, answered, **(rules if name == "a" else {})))
    metrics = compare(tmp_path, *runs)["tasks"]["asr"]["metrics"]
    assert [entry["value"] for entry in metrics["term_recall"]["runs"]] == [pytest.approx(2 / 3), 1.0]
    assert metrics["exact_match"]["runs"][1]["value"] == 1.0
    Path(rules["english_spelling"]).unlink()
    assert compare(tmp_path, *runs)["tasks"]["asr"]["metrics"]["exact_match"]["runs"][1]["value"] < 1


def test_adapters_are_distinguished_by_their_training_settings(pair, tmp_path):
    """From the settings beside the adapter or above its checkpoint; the base has none."""
    one, _, references, first, second = pair
    runs = [one]
    for name, answers, adapter, weights in (
        ("a", first, "t1", None),
        ("b", second, "t2/checkpoints/step-1", {"asr": 2}),
    ):
        (tmp_path / adapter).mkdir(parents=True)
        trained = {"train_jsonl": ["x.jsonl"], "lora_r": 8, "task_weights": weights, "output_dir": name}
        (tmp_path / adapter.split("/")[0] / "settings.json").write_text(json.dumps(trained))
        runs.append(write_evaluation(tmp_path / name, rows(references, answers), lora_dir=str(tmp_path / adapter)))
    assert training_differences(read_evaluations(runs)) == {"task_weights": ["", "none", "asr=2"]}


def test_labels_distinguish_folders():
    assert short_labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_labels(["x/eval", "y/eval", "y/other"]) == ["x/eval", "y/eval", "y/other"]


def test_errors_are_one_line(pair, tmp_path):
    one, other, *_ = pair
    cut = write_evaluation(tmp_path / "cut", rows(["가"], ["가"]))
    Path(cut, "metrics.json").unlink()
    torn = write_evaluation(tmp_path / "torn", rows(["가"], ["가"]))
    Path(torn, "predictions", "part-00000.parquet").write_bytes(b"PAR1 and no more")
    broken = write_evaluation(tmp_path / "broken", rows(["가"], ["가"]))
    Path(broken, "settings.json").write_text("{")
    begun = write_evaluation(tmp_path / "begun", rows(["가"], ["가"]))
    Path(begun, "metrics.json").write_text(json.dumps({"asr": {"exact_match": {"value": 1, "n": 9}}}))
    translated = write_evaluation(tmp_path / "translated", rows(["a"], ["a"], task="ast"))
    Path(translated, "metrics.json").write_text(json.dumps({"ast": {"chrf": {"value": 1, "n": 7}}}))
    unlike = write_evaluation(tmp_path / "unlike", rows(["가"], ["가"], id="z", source="/z.jsonl:1"))
    for runs, error, message in (
        ((one, str(tmp_path / "none")), RunError, "no evaluation there .*; no such folder"),
        ((f"{one}/predictions", other), RunError, f"predictions: no evaluation there .*; give {one}$"),
        ((str(Path(one).parent), other), RunError, f"no evaluation there .*; give {one} or {other}$"),
        ((one, f"{cut}/settings.json"), RunError, "are scored first: jobs/evaluate.py --score_only .*settings.json"),
        ((one, str(tmp_path / "demo" / "base")), RunError, "`make demo` makes runs/demo/base"),
        ((one, cut), RunError, "cut: this evaluation has not finished"),
        ((one, torn), RunError, r"torn/predictions/part-00000\.parquet: .* damaged: "),
        ((one, broken), RunError, "settings.json: damaged: "),
        (
            (one, begun),
            RunError,
            "metrics.json is of 9 asr rows, but 1 are in predictions/: the evaluation has not fin",
        ),
        ((one, translated), RunError, "metrics.json is of 7 ast rows, but 1 are in predictions/"),
        (
            (one, unlike),
            RunError,
            "base, unlike: nothing to compare: no row has the same task and source, or id, .*asr",
        ),
        ((one, other, one), SettingsError, "is given twice"),
        ((torn,), RunError, "damaged"),
    ):
        with pytest.raises(error, match=message) as caught:
            compare(tmp_path, *runs)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "no folder is created for runs that cannot be compared"


def test_rows_match_although_another_language_was_detected(tmp_path):
    references, languages = ["twenty colours", "네 맞아요"], ("en", "ja")
    runs = [
        write_evaluation(tmp_path / language, rows(references, references[::-1], language=language))
        for language in languages
    ]
    assert compare(tmp_path, *runs)["num_matched"] == 2
