"""METEOR and SPICE of captions, by the Java programs that define them; nothing else goes by their names.

They need Java, the extra ``caption`` (pycocoevalcap, which brings METEOR and SPICE), and for SPICE a folder with
Stanford CoreNLP 3.6.0, which has to be fetched by hand. Both know English only.
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
SPICE_MEMORY = "-Xmx8G"  # what SPICE's authors give it

Tokens = dict[int, list[str]]


def java_metrics(captions: Sequence[Caption], jars: str) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR and SPICE of a set of captions.

    Args:
        captions: References and prediction of every clip.
        jars: Folder with CoreNLP's jars; "" asks for neither metric.
    Returns:
        {metric: value} of those that could be computed, and {metric: why not, and what to do} of the others.
    """
    names = ("meteor", "spice")
    if lacking := _lacking(captions, jars):
        return {}, dict.fromkeys(names, f"not available: {lacking}")
    wanted, given = _tokenized(captions)
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            found[name] = _meteor(wanted, given) if name == "meteor" else _spice(wanted, given, Path(jars))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
            missing[name] = f"not available: {name} failed: {lines[-1] if lines else type(error).__name__}"
    return found, missing


def _lacking(captions: Sequence[Caption], jars: str) -> str:
    if not jars:
        return f"needs Java, pip install 'voxray[caption]', and --caption_jars with {' and '.join(CORENLP_JARS)}"
    if shutil.which("java") is None:
        return "no java on PATH; install a Java runtime"
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pip install 'voxray[caption]'"
    if not any(re.search("[A-Za-z]", text) for references, _ in captions for text in references):
        return "it knows English only"
    return ""


def _tokenized(captions: Sequence[Caption]) -> tuple[Tokens, Tokens]:
    """References and predictions as the Penn Treebank's tokens, without punctuation, as published figures have them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = PTBTokenizer()
    # a line is a caption to it, so that no line end may be within one
    wanted = {at: [{"caption": " ".join(text.split())} for text in texts] for at, (texts, _) in enumerate(captions)}
    given = {at: [{"caption": " ".join(text.split())}] for at, (_, text) in enumerate(captions)}
    return tokenizer.tokenize(wanted), tokenizer.tokenize(given)


def _meteor(wanted: Tokens, given: Tokens) -> float:
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

    return float(Meteor().compute_score(wanted, given)[0])


def _spice(wanted: Tokens, given: Tokens, jars: Path) -> float:
    """pycocoevalcap's SPICE, with CoreNLP from elsewhere than its own folder (where it would download to)."""
    if absent := [name for name in CORENLP_JARS if not (jars / name).is_file()]:
        raise OSError(f"--caption_jars {jars} has no {' and no '.join(absent)}; they are in {CORENLP_URL}")
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    assert spec is not None and spec.origin is not None
    home = Path(spec.origin).parent
    classes = [home / "spice-1.0.jar", *sorted((home / "lib").glob("*.jar")), *(jars / name for name in CORENLP_JARS)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "captions.json", Path(folder) / "scores.json"
        entries = [{"image_id": at, "test": given[at][0], "refs": texts} for at, texts in wanted.items()]
        source.write_text(json.dumps(entries), encoding="utf-8")
        path = ":".join(str(item.resolve()) for item in classes)
        command = ["java", SPICE_MEMORY, "-cp", path, "edu.anu.spice.SpiceScorer", str(source), "-out", str(target)]
        subprocess.run([*command, "-silent"], cwd=folder, check=True, capture_output=True, text=True)
        scores = [float(entry["scores"]["All"]["f"]) for entry in json.loads(target.read_text(encoding="utf-8"))]
    return sum(scores) / len(scores)
