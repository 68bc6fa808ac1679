"""Model cards: what the hub reads from them, the numbers of evaluations, and no path of this machine."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, WHISPER
from helpers.adapters import random_adapter
from helpers.evaluations import write_evaluation
from helpers.running import ROOT
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from voxray.cards.card import NOTHING_MEASURED, card_text, read_card_facts, write_card
from voxray.cards.facts import find_run
from voxray.core.content_hash import path_hash
from voxray.core.errors import RunError
from voxray.evaluation.predictions import read_predictions
from voxray.evaluation.score import score
from voxray.models.adapters.lora import add_lora, save_adapter
from voxray.models.whisper.family import Whisper

pytestmark = pytest.mark.usefixtures("one_thread")

REFERENCES = [f"환자는 {number} 일 전부터 열이 납니다" for number in range(12)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of Voxtral's projector and language model, without a run around it."""
    return random_adapter(tmp_path_factory.mktemp("adapters") / "copied")


def evaluation(folder: Path, num_wrong: tuple[int, int], **settings: Any) -> str:
    """An evaluation of two data sets of six rows each, of which some have a wrong answer."""
    rows = []
    for number, reference in enumerate(REFERENCES):
        dataset, index = divmod(number, 6)
        answer = "아니요" if index < num_wrong[dataset] else reference
        source = f"/data/{'new' if dataset else 'old'}.jsonl:{index + 1}"
        rows.append({"source": source, "reference": reference, "prediction": answer})
    values = {"model_id": TINY, "lora_dir": "", "val_jsonl": ["/data/old.jsonl", "/data/new.jsonl"], **settings}
    write_evaluation(folder, rows, **values)
    (folder / "metrics.json").write_text(json.dumps(score(read_predictions(folder), num_resamples=200)))
    return str(folder)


def run_folder(folder: Path, adapter: Path) -> Path:
    """The records of a finished run around a copy of an adapter; returns the copy."""
    shutil.copytree(adapter, folder / "adapter")
    records = {
        "settings.json": {"model_id": TINY, "output_dir": str(folder), "lr": 1e-4, "seed": 7, "tuning": "lora"},
        "provenance.json": {"versions": {"voxray": "0.1.0", "torch": "2.13"}, "command": ["x", str(folder)]},
        "parameters.json": {"llm": {"total": 1000, "trainable": 10}},
        "result.json": {"adapter_step": 4, "finished": True},
        "trained_rows.json": {
            "rows": [
                {"task": "asr", "dataset": "org/speech", "replay": False, "rows": 1200, "hours": 2.0},
                {"task": "asr", "dataset": str(folder / "more"), "replay": True, "rows": 5, "hours": 0.001},
            ],
            "languages": {"ko": 1200, "": 5},
            "manifests": [{"name": "asr.jsonl", "content": "0123456789abcdef" * 4}],
            "rows_per_step": 8.0,
        },
    }
    for name, value in records.items():
        (folder / name).write_text(json.dumps(value))
    validations = [{"kind": "validation", "step": step, "asr/cer_nospace": step / 10} for step in (2, 4, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in validations))
    return folder / "adapter"


def require_nothing_private(text: str, *folders: Path) -> None:
    for private in (str(ROOT), str(Path.home()) + "/", socket.gethostname(), "/tmp", *map(str, folders)):
        assert private not in text, private
    assert not re.search(r"(?<![\w:/])/(?!/)\w+/", text), "no absolute path"


def test_the_hub_reads_the_numbers_of_an_evaluation(adapter: Path, tmp_path: Path) -> None:
    base = evaluation(tmp_path / "base", (0, 5))
    tuned = evaluation(tmp_path / "tuned", (2, 1), lora_dir=str(adapter))
    trained = run_folder(tmp_path / "run", adapter)
    write_card(trained, read_card_facts(trained, TINY, evaluations=[base, tuned]))
    card = ModelCard.load(trained / "README.md")
    [index] = card.data.to_dict()["model-index"]
    assert model_index_to_eval_results([index]) == (card.data.model_name, card.data.eval_results)
    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    parts = {"new, old": metrics["asr"], **metrics["slices"]["asr"]["dataset"]}
    assert len(card.data.eval_results) == 3 * 5
    for result in card.data.eval_results:
        entry = parts[result.dataset_name][result.metric_name.removeprefix("asr/")]
        assert (result.task_type, result.task_name) == ("automatic-speech-recognition", "asr")
        assert result.metric_value == entry["value"]
        interval = {"low": entry["low"], "high": entry["high"], "level": 0.95} if entry["low"] is not None else None
        assert result.metric_args == interval
    assert {result.metric_type for result in card.data.eval_results} == {"cer", "wer", "swer", "exact_match"}
    limits = card.text.partition("## Limits")[2]
    by_dataset = metrics["slices"]["asr"]["dataset"]
    for name, base_value in (("old", "0"), ("new", None)):
        [line] = [line for line in limits.splitlines() if line.startswith(f"| asr | {name} |")]
        assert f"| {by_dataset[name]['cer_nospace']['value']:.4g} |" in line
        assert base_value is None or f"| {base_value} |" in line
    require_nothing_private(card.content, tmp_path)


def test_metadata_and_text_of_a_run(adapter: Path, tmp_path: Path) -> None:
    trained = run_folder(tmp_path / "run", adapter)
    assert find_run(trained) == (tmp_path / "run", 4)
    text = card_text(read_card_facts(trained, TINY))
    data = ModelCard(text).data.to_dict()
    assert data == {
        "datasets": ["org/speech"],
        "language": ["ko"],
        "library_name": "peft",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["voxray", "lora", "voxtral", "asr"],
    }
    for part in (
        "10 of 1,000 (1.00%)",
        "| asr | org/speech | 1,200 | 2.00 h |  |",
        "| asr | more | 5 | 3.6 s | replayed |",
    ):
        assert part in text
    for part in ("optimizer steps: 4, of 8 rows", "learning rate 0.0001", "seed 7", "voxray 0.1.0, torch 2.13"):
        assert part in text
    assert "at step 4" in text and "| asr/cer_nospace ↓ | 0.4 |" in text and NOTHING_MEASURED in text
    assert "PeftModel.from_pretrained" in text and "--format mistral" in text and "voxray infer --lora_dir" in text
    require_nothing_private(text, tmp_path)


def test_an_adapter_without_its_run_has_a_card_that_says_less(adapter: Path) -> None:
    text = card_text(read_card_facts(adapter, TINY))
    assert ModelCard(text).data.pipeline_tag == "audio-text-to-text" and "rank 4" in text
    assert "## Training" not in text and "Parameters in the adapter: " in text and "It was not evaluated." in text
    require_nothing_private(text)


def test_base_and_license_come_from_the_hub_only(adapter: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0a1b"
    shutil.copytree(TINY, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: mrl\n---\nThe base.\n")
    facts = read_card_facts(adapter, str(snapshot))
    data = ModelCard(card_text(facts)).data.to_dict()
    assert (data["base_model"], data["license"], data["license_name"]) == ("org/tiny", "other", "mrl")
    assert 'from_pretrained("org/tiny")' in card_text(facts)
    for card in ("no metadata", "---\n- a\n---\n", "---\nlicense: [x]\n---\n", "---\n{\n---\n"):
        (snapshot / "README.md").write_text(card)
        assert "license" not in ModelCard(card_text(read_card_facts(adapter, str(snapshot)))).data.to_dict()


@pytest.mark.parametrize(("kind", "library"), [("hf", "transformers"), ("mistral", "mistral-common")])
def test_an_export_is_used_as_a_model_of_its_own(adapter: Path, kind: str, library: str) -> None:
    text = card_text(read_card_facts(adapter, TINY, kind=kind, scale=0.5))
    assert ModelCard(text).data.library_name == library and "at a share of 0.5" in text
    assert ("vllm serve THIS-FOLDER --config-format mistral" in text) == (kind == "mistral")
    assert ("VoxtralForConditionalGeneration.from_pretrained" in text) == (kind == "hf")
    assert "PeftModel" not in text


def test_whisper_goes_to_vllm_as_transformers_writes_it(tmp_path: Path) -> None:
    family = Whisper()
    model = family.load_model(WHISPER, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(add_lora(model, family, ["decoder"], model_id=WHISPER, r=2, alpha=2, dropout=0.0), tmp_path)
    card = card_text(read_card_facts(tmp_path, WHISPER))
    assert ModelCard(card).data.pipeline_tag == "automatic-speech-recognition"
    assert "--format hf --output_dir exported\nvllm serve exported\n" in card


def test_evaluations_of_others_are_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = random_adapter(tmp_path / "other", seed=2)
    refused = {
        str(tmp_path / "empty"): "no evaluation there",
        str(tmp_path / "nowhere"): "no evaluation there .*no such folder",
        evaluation(tmp_path / "a", (1, 1), lora_dir=str(other)): "is of the adapter .*, which holds other weights",
        evaluation(
            tmp_path / "b", (1, 1), model_id=WHISPER
        ): "is of the model .*, and the adapter's base is voxtral-tiny",
        evaluation(tmp_path / "c", (1, 1), score_only="/x.jsonl"): "scores answers of /x.jsonl",
    }
    for folder, message in refused.items():
        with pytest.raises(RunError, match=rf"^--evaluations {folder}: .*{message}|^--evaluations {folder}: {message}"):
            read_card_facts(adapter, TINY, evaluations=[folder])


def test_a_new_card_does_not_make_it_another_adapter(adapter: Path, tmp_path: Path) -> None:
    """An evaluation that goes on finds its answers by the hash of the adapter."""
    trained = run_folder(tmp_path / "run", adapter)
    before = path_hash(trained)
    tuned = evaluation(tmp_path / "tuned", (2, 1), lora_dir=str(trained))
    for evaluations in ([], [tuned]):
        write_card(trained, read_card_facts(trained, TINY, evaluations=evaluations))
        assert path_hash(trained) == before
    assert NOTHING_MEASURED in (trained / "README.md").read_text(encoding="utf-8"), "there is no base beside it"
