"""Caption metrics: published values, pycocoevalcap's values on random captions, and METEOR and SPICE without Java."""

import random
import sys
from pathlib import Path

import pytest

from voxray.evaluation.score import score
from voxray.metrics import meteor_spice as java
from voxray.metrics.captions import cider_d, coco_bleu
from voxray.metrics.counts import as_row, compute_metrics
from voxray.metrics.rows import count_row
from voxray.metrics.texts import score_texts, text_metrics

PUBLISHED = [
    (["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
     "a man is speaking"),
    (["rain is falling hard on a surface"], "rain falls"),
]  # fmt: skip
"""The example in the README of aac-metrics, which prints the values in ``test_published_values``."""


def random_captions(num: int) -> list[tuple[list[str], str]]:
    """Captions of words that often repeat, with one to five references."""
    rng = random.Random(0)
    line = "a man dog bird rain falls speaks while loud engine the in on hums and then"
    words = line.split()

    def caption() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 12)))

    return [([caption() for _ in range(rng.randint(1, 5))], caption()) for _ in range(num)]


def rouge_l(captions: list[tuple[list[str], str]]) -> float:
    rows = [{"task": "aac", "references": references, "prediction": text} for references, text in captions]
    return compute_metrics("aac", [as_row(count_row(row)) for row in rows])["rouge_l"]["value"]


GOLDEN = {
    "cider_d": 0.4809168551479204,
    "bleu": [0.5314417177912073, 0.18356602553168624, 0.047879405002195105, 2.9213476700936507e-06],
    "rouge_l": 0.29278650660777883,
}
"""Of ``random_captions(400)``, by Cider, Bleu and Rouge of pycocoevalcap 1.2."""


def test_published_values():
    scores = cider_d(PUBLISHED)
    assert [round(score, 4) for score in scores] == [1.3641, 0.5587] and round(sum(scores) / 2, 4) == 0.9614
    assert round(coco_bleu(PUBLISHED)[0], 4) == 0.4278


def test_values_equal_stored_ones_of_pycocoevalcap():
    """To all digits. The next test computes pycocoevalcap's values again if it is installed."""
    captions = random_captions(400)
    scores = cider_d(captions)
    assert sum(scores) / 400 == pytest.approx(GOLDEN["cider_d"], rel=1e-12)
    assert coco_bleu(captions) == pytest.approx(GOLDEN["bleu"], rel=1e-12)
    summed = score_texts("aac", captions)[0]
    assert [summed[f"bleu_{order}"].value for order in (1, 2, 3, 4)] == coco_bleu(captions)
    assert rouge_l(captions) == pytest.approx(GOLDEN["rouge_l"], rel=1e-12)


def test_values_equal_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    captions = random_captions(100)
    references = dict(enumerate(texts for texts, _ in captions))
    predictions = {clip: [text] for clip, (_, text) in enumerate(captions)}
    assert cider_d(captions) == pytest.approx(cider.Cider().compute_score(references, predictions)[1], abs=1e-12)
    assert coco_bleu(captions) == pytest.approx(Bleu(4).compute_score(references, predictions, verbose=0)[0], rel=1e-12)
    assert rouge_l(captions) == pytest.approx(Rouge().compute_score(references, predictions)[0], rel=1e-12)


def test_cider_depends_on_the_whole_set():
    whole = cider_d(PUBLISHED)
    assert [cider_d([caption]) for caption in PUBLISHED] == [[0], [0]]
    assert cider_d([*PUBLISHED, (["a man is speaking"], "wind")])[0] < whole[0], "a man is speaking became common"
    assert sum(cider_d([([text], text) for text in ("a dog barks twice", "rain on a tin roof")])) == pytest.approx(20)


@pytest.mark.parametrize("empty", ["", "...", "👍", "\u200b "])
def test_empty_captions(empty: str):
    captions = [(["a dog barks"], empty), (["rain falls", empty], "rain falls")]
    assert cider_d(captions)[0] == 0 and rouge_l(captions[:1]) == 0
    assert all(0 <= score <= 1 for score in coco_bleu(captions))
    assert all(0 <= score < 1e-3 for score in coco_bleu(captions[:1]))
    assert text_metrics("aac", captions)["bleu"]["value"] > 0


def test_signatures():
    *_, signatures = score_texts("aac", PUBLISHED)
    assert "tok:char" in signatures["bleu"] and "nrefs:var" in signatures["bleu"] and "version:" in signatures["chrf"]
    assert signatures["cider_d"] == signatures["bleu_4"] == "tok:words|norm:ko-v1"
    assert set(text_metrics("aac", PUBLISHED)) <= set(signatures)
    assert "nrefs:1|" in score_texts("sqa", [("네", "네")])[2]["bleu"]
    assert score_texts("asr", PUBLISHED) == ({}, {}, {})


def test_java_metrics_name_missing_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values, missing = java.java_metrics(PUBLISHED, "")
    assert values == {} and set(missing) == {"meteor", "spice"}
    assert "--caption_jars" in missing["spice"] and "voxray[caption]" in missing["spice"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no java on PATH" in java.java_metrics(PUBLISHED, str(tmp_path))[1]["meteor"]


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pycocoevalcap whose METEOR is always 0.25, and a ``java`` program that writes a SPICE of 0.5 for a caption that
    contains the first word of a reference, else 0."""
    package = tmp_path / "site" / "pycocoevalcap"
    for name in ("", "tokenizer", "meteor", "spice", "spice/lib"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").touch()
    (package / "tokenizer/ptbtokenizer.py").write_text(
        "class PTBTokenizer:\n"
        "    def tokenize(self, texts):\n"
        "        return {clip: [entry['caption'].lower().strip('.') for entry in texts[clip]] for clip in texts}\n"
    )
    (package / "meteor/meteor.py").write_text(
        "class Meteor:\n    def compute_score(self, gts, res):\n        return 0.25, [0.25] * len(res)\n"
    )
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text(f"""#!{sys.executable}
import json, sys
args = sys.argv[1:]
assert args[0] == "-Xmx8G" and args[1] == "-cp" and "stanford-corenlp-3.6.0-models.jar" in args[2], args
assert args[3] == "edu.anu.spice.SpiceScorer" and args[5] == "-out", args
entries = json.load(open(args[4]))
hits = [any(ref.split()[0] in entry["test"].split() for ref in entry["refs"]) for entry in entries]
json.dump([{{"scores": {{"All": {{"f": 0.5 * hit}}}}}} for hit in hits], open(args[6], "w"))
""")
    program.chmod(0o755)
    jars = tmp_path / "jars"
    jars.mkdir()
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    yield jars
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]


def test_java_metrics(fake_java: Path):
    values, missing = java.java_metrics(PUBLISHED, str(fake_java))
    assert values == {"meteor": 0.25} and "stanford-corenlp-3.6.0.jar" in missing["spice"]
    for name in java.CORENLP_JARS:
        (fake_java / name).touch()
    assert java.java_metrics(PUBLISHED, str(fake_java)) == ({"meteor": 0.25, "spice": 0.5}, {})
    rows = [{"task": "aac", "references": references, "prediction": text} for references, text in PUBLISHED]
    metrics = score(rows, num_resamples=20, caption_jars=str(fake_java))
    assert metrics["not_available"] == {}
    assert metrics["aac"]["spider"]["value"] == (metrics["aac"]["cider_d"]["value"] + 0.5) / 2
    assert {"meteor", "spice", "spider"} < set(metrics["intervals"]["aac"]["without"])
    assert "English only" in java.java_metrics([(["개가 짖는다"], "개")], str(fake_java))[1]["meteor"]
    (fake_java.parent / "bin" / "java").write_text("#!/bin/sh\necho no room for the heap >&2\nexit 1\n")
    values, missing = java.java_metrics(PUBLISHED, str(fake_java))
    assert values == {"meteor": 0.25} and missing["spice"] == "not available: spice failed: no room for the heap"
