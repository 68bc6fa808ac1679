"""A training writes the card of its adapter, and export that of its model, with the results of --evaluations."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from conftest import TINY, manifest, read_rows, write_rows
from helpers.running import ROOT, parse_only
from huggingface_hub import ModelCard

from voxray.commands.evaluate import run_evaluation
from voxray.commands.export import run_export
from voxray.commands.train import run_training
from voxray.core.content_hash import damaged_files
from voxray.core.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread", "evaluation_here")


def test_card_of_a_training_and_of_its_export(tmp_path: Path) -> None:
    rows = [{**row, "dataset": "org/digits"} for row in read_rows(manifest("tqa.train"))[:6]]
    new, old = write_rows(tmp_path / "new.jsonl", rows), write_rows(tmp_path / "old.jsonl", rows[:4])
    common = ["--model_id", TINY, "--features_dir", str(tmp_path / "f")]
    steps = ["--num_workers", "0", "--max_steps", "1", "--lora_r", "2", "--lora_alpha", "4", "--preview_rows", "0"]
    run = ["--output_dir", str(tmp_path / "run")]
    run_training(parse_only("train_text", [*common, *steps, *run, "--train_jsonl", new]))
    adapter = tmp_path / "run" / "adapter"
    assert damaged_files(adapter) == [] and (adapter / "checksums.json").is_file()
    card = ModelCard.load(adapter / "README.md")
    assert card.data.datasets == ["org/digits"] and card.data.tags == ["voxray", "lora", "voxtral", "tqa"]
    for part in ("| tqa | org/digits | 6 |  |", "rank 2, alpha 4", "optimizer steps: 1, of 2 rows"):
        assert part in card.text, card.text

    answers = ["--val_jsonl", f"{new},{old}", "--gen_max_new_tokens", "4"]
    folders = {"base": [], "tuned": ["--lora_dir", str(tmp_path / "run")]}
    for name, flags in folders.items():
        argv = [*common, *answers, *flags, "--output_dir", str(tmp_path / name)]
        run_evaluation(parse_only("evaluate", argv))
    evaluations = ",".join(str(tmp_path / name) for name in folders)
    argv = ["--lora_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "e"), "--evaluations", evaluations]
    run_export(parse_only("export", argv))
    exported = ModelCard.load(tmp_path / "e" / "README.md")
    assert exported.data.library_name == "transformers" and exported.data.datasets == ["org/digits"]
    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())["tqa"]
    values = {result.metric_name: result.metric_value for result in exported.data.eval_results}
    assert values == {f"tqa/{name}": metrics[name]["value"] for name in ("rouge_l", "exact_match")}
    for private in (str(ROOT), str(tmp_path), str(Path.home()) + "/", socket.gethostname()):
        assert private not in card.content + exported.content
    with pytest.raises(RunError, match=r"^--evaluations .*/run: no evaluation there"):
        run_export(parse_only("export", [*argv[:-1], str(tmp_path / "run"), "--overwrite"]))

    copied = Path(shutil.copytree(adapter, tmp_path / "copied"))
    run_export(parse_only("export", ["--lora_dir", str(copied), "--output_dir", str(tmp_path / "c")]))
    assert "## Training" not in ModelCard.load(tmp_path / "c" / "README.md").text
