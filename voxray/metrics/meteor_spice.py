"""METEOR and SPICE of captions, computed only by the Java programs that define them.

They need Java, the extra ``caption`` (pycocoevalcap, which contains METEOR and SPICE) and, for SPICE, a folder with
Stanford CoreNLP 3.6.0, which must be downloaded by hand. Both support only English.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from voxray.metrics.captions import Caption

CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
CORENLP_URL = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
SPICE_MEMORY = "-Xmx8G"  # the value that SPICE's authors use

Tokens = dict[int, list[str]]


def java_metrics(captions: Sequence[Caption], jars: str) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR and SPICE of a set of captions.

    Args:
        captions: References and prediction of every clip.
        jars: Folder with CoreNLP's jars; "" computes neither metric.
    Returns:
        {metric: value} of the metrics that could be computed, and {metric: reason and remedy} of the others.
    """
    names = ("meteor", "spice")
    if missing := _missing_requirement(captions, jars):
        return {}, dict.fromkeys(names, f"not available: {missing}")
    references, predictions = _tokenize(captions)
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            if name == "meteor":
                values[name] = _meteor(references, predictions)
            else:
                values[name] = _spice(references, predictions, Path(jars))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
            reasons[name] = f"not available: {name} failed: {lines[-1] if lines else type(error).__name__}"
    return values, reasons


def _missing_requirement(captions: Sequence[Caption], jars: str) -> str:
    """What is missing to run the Java programs, with the remedy; "" if nothing is."""
    if not jars:
        return f"needs Java, pip install 'voxray[caption]', and --caption_jars with {' and '.join(CORENLP_JARS)}"
    if shutil.which("java") is None:
        return "no java on PATH; install a Java runtime"
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pip install 'voxray[caption]'"
    if not any(re.search("[A-Za-z]", text) for references, _ in captions for text in references):
        return "it knows English only"
    return ""


def _tokenize(captions: Sequence[Caption]) -> tuple[Tokens, Tokens]:
    """References and predictions in Penn Treebank tokens without punctuation, as in published results."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = PTBTokenizer()

    def entry(text: str) -> dict[str, str]:
        return {"caption": " ".join(text.split())}  # the tokenizer takes every line as a caption

    references = {clip: [entry(text) for text in texts] for clip, (texts, _) in enumerate(captions)}
    predictions = {clip: [entry(text)] for clip, (_, text) in enumerate(captions)}
    return tokenizer.tokenize(references), tokenizer.tokenize(predictions)


def _meteor(references: Tokens, predictions: Tokens) -> float:
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

    return float(Meteor().compute_score(references, predictions)[0])


def _spice(references: Tokens, predictions: Tokens, jars: Path) -> float:
    """pycocoevalcap's SPICE, with CoreNLP from ``jars`` instead of its own folder, to which it would download."""
    if absent := [name for name in CORENLP_JARS if not (jars / name).is_file()]:
        raise OSError(f"--caption_jars {jars} has no {' and no '.join(absent)}; they are in {CORENLP_URL}")
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    spice_jars = [package / "spice-1.0.jar", *sorted((package / "lib").glob("*.jar"))]
    classes = [*spice_jars, *(jars / name for name in CORENLP_JARS)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "captions.json", Path(folder) / "scores.json"
        entries = [
            {"image_id": clip, "test": predictions[clip][0], "refs": texts} for clip, texts in references.items()
        ]
        source.write_text(json.dumps(entries), encoding="utf-8")
        path = ":".join(str(jar.resolve()) for jar in classes)
        command = ["java", SPICE_MEMORY, "-cp", path, "edu.anu.spice.SpiceScorer", str(source), "-out", str(target)]
        subprocess.run([*command, "-silent"], cwd=folder, check=True, capture_output=True, text=True)
        scores = [float(entry["scores"]["All"]["f"]) for entry in json.loads(target.read_text(encoding="utf-8"))]
    return sum(scores) / len(scores)
