"""Stored answers are used again only for the very question they answer.

Every flag of the job is changed by itself, and so is every file that decides an answer. A new flag must be added to
one of the two tables.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, read_rows, write_rows
from helpers.running import parse_only
from safetensors.torch import load_file, save_file

from voxray.commands import evaluate as job
from voxray.config.evaluate import EvaluateSettings
from voxray.core.content_hash import path_hash
from voxray.core.tasks import use_own_tasks
from voxray.evaluation.distribute import answer_key
from voxray.features.reader import Features
from voxray.generation.model import InferenceConfig
from voxray.models.adapters.lora import add_lora, save_adapter
from voxray.models.registry import get_family

pytestmark = pytest.mark.usefixtures("evaluation_here")

CHANGES: dict[str, str] = {
    "val_jsonl": "other.jsonl",
    "model_id": "other-base",
    "lora_dir": "adapter",
    "bf16": "true",
    "fp16": "true",
    "quantize": "8bit",
    "tf32": "true",
    "trim_audio_tokens": "true",
    "store": "encoder",
    "language": "en",
    "gen_max_new_tokens": "7",
    "num_beams": "2",
    "temperature": "0.5",
    "top_p": "0.5",
    "seed": "3",
    "per_device_bsz": "3",
    "perplexity": "all",
    "mode": "valid_asr",
    "compiled": "compiled",
    "merge_adapter": "true",
    "static_cache": "true",
    "tasks_file": "tasks.yaml",
    "lora_scale": "0.5",
    "context": "terms.txt",
    "no_context": "true",
    "engine": "ct2",
    "server": "http://two/v1",
    "served_model": "two",
}
"""{flag that decides answers: another value}"""
NEEDS = {"top_p": ["--temperature", "0.5"], "seed": ["--temperature", "0.5"], "cache_dtype": ["--store", "encoder"]}
NEEDS["lora_scale"] = ["--lora_dir", "adapter"]
SERVER = ["--server", "http://one/v1", "--served_model", "one"]
NEEDS |= {"server": SERVER, "served_model": SERVER}
"""Flags without which a flag has no effect or is refused."""
CHANGES["cache_dtype"] = "float32"
NO_EFFECT = {
    *("output_dir", "storage_path", "features_dir", "features_cache_dir", "features_cache_gib", "cache_budget_gib"),
    *("num_actors", "num_models", "gpus_per_model", "cuda_visible_devices", "strict", "retry_failed", "score_only"),
    *("check_batch_invariance", "normalizer", "terms", "english_spelling", "caption_jars"),
    *("engine_python", "server_key", "server_timeout_sec", "server_retries"),
}
"""Flags that decide where and how the job computes, or what is done with the answers."""
ELSEWHERE = {
    "fp32": "keeps bf16 off, which is in the key, where it would be the default",
    "rows_per_shard": "the order of the rows stays; features of another division are made again",
    "max_len": "decides which rows are answered, and their numbers are in the key",
    "audio_prefix": "goes into the manifest that the job writes",
    **dict.fromkeys(("whisper_path", "beats_path", "llama_path", "end_sym", "prompts"), "go into the assembled base"),
}


class Stop(Exception):
    pass


@pytest.fixture
def question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Call it with flags: the key of the answers that the evaluate job would write."""
    rows = read_rows(Path(__file__).parents[1] / "assets" / "speech" / "asr.val.jsonl")[:2]
    for row in rows:
        row["audio_path"] = str(Path(__file__).parents[1] / "assets" / "speech" / row["audio_path"])
        row.pop("language", None)
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "other.jsonl", rows[:1])
    shutil.copytree(TINY, tmp_path / "base")
    (tmp_path / "terms.txt").write_text("Tylenol\n")
    (tmp_path / "tasks.yaml").write_text("s: {keys: [audio_path, s], prompt: x, answer: s, metrics: [rouge_l]}")
    monkeypatch.chdir(tmp_path)

    def stop(config: InferenceConfig, folders: Any, rows: Any, output_dir: Path, **options: Any) -> None:
        raise Stop(answer_key(config, Features(folders), [rows]))

    monkeypatch.setattr(job, "answer_rows", stop)

    def key(*flags: str) -> str:
        defaults = {"--val_jsonl": "rows.jsonl", "--model_id": "base", "--features_dir": "features"}
        if "--server" in flags:
            del defaults["--model_id"]
        argv = [word for pair in defaults.items() if pair[0] not in flags for word in pair]
        with pytest.raises(Stop) as stopped:
            job.run_evaluation(parse_only("evaluate", [*argv, "--output_dir", "evaluation", *flags]))
        return str(stopped.value)

    yield key
    use_own_tasks({})


def write_adapter(folder: Path, model_id: str, *, alpha: float = 4) -> None:
    family = get_family(model_id)
    model = family.load_model(model_id, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(add_lora(model, family, ["llm"], model_id=model_id, r=2, alpha=alpha, dropout=0.0), folder)


def test_every_flag_is_on_one_side() -> None:
    sides = [set(CHANGES), NO_EFFECT, set(ELSEWHERE)]
    assert set().union(*sides) == set(EvaluateSettings.model_fields)
    assert sum(map(len, sides)) == len(EvaluateSettings.model_fields)


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_that_decides_answers_changes_the_key(
    flag: str, question: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flag == "model_id":
        shutil.copytree(TINY, tmp_path / "other-base")
        edit_json(tmp_path / "other-base" / "generation_config.json", "max_length", 9)
    if flag in ("lora_dir", "lora_scale"):
        write_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    if flag == "compiled":
        (tmp_path / "compiled").mkdir()
        (tmp_path / "compiled" / "program").write_text("1")
        monkeypatch.setattr(job, "read_report", lambda folder: {})
    if flag == "engine":
        monkeypatch.setattr(job, "check_engine", lambda config: None)
    needed = NEEDS.get(flag, [])
    changed = dict(zip(needed[::2], needed[1::2], strict=True)) | {f"--{flag}": CHANGES[flag]}
    assert question(*needed) != question(*(word for pair in changed.items() for word in pair))


def test_key_and_patience_with_a_server_do_not_change_the_key(
    question: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = question(*SERVER)
    for name in ("OPENAI_API_KEY", "OTHER_KEY"):
        monkeypatch.setenv(name, "secret")
    assert question(*SERVER) == before
    others = ("--server_key", "OTHER_KEY", "--server_timeout_sec", "9", "--server_retries", "0")
    assert question(*SERVER, *others) == before


def edit_json(path: Path, name: str, value: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**values, name: value}), encoding="utf-8")


def test_every_file_of_the_base_changes_the_key(question: Callable[..., str], tmp_path: Path) -> None:
    """The same path with other content: tokenizer, configuration, generation settings, processor, weights."""
    keys = [question()]
    for path in sorted((tmp_path / "base").iterdir()):
        if path.suffix == ".json":
            intact = path.read_bytes()
            path.write_bytes(intact + b"\n")
            keys.append(question())
            path.write_bytes(intact)
            assert question() == keys[0], path.name
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = next(name for name in weights if "language_model" in name)
    save_file({**weights, name: torch.zeros_like(weights[name])}, tmp_path / "base" / "model.safetensors")
    keys.append(question())
    assert len(set(keys)) == len(keys) >= 4


def test_every_file_of_the_adapter_changes_the_key(question: Callable[..., str], tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    flags = ("--lora_dir", "adapter")
    before = question(*flags)
    edit_json(tmp_path / "adapter" / "adapter_config.json", "lora_alpha", 64)
    changed = question(*flags)
    write_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, tmp_path / "adapter" / "adapter_model.safetensors")
    assert len({before, changed, question(*flags)}) == 3


def test_a_clip_that_changed_changes_the_key(question: Callable[..., str], tmp_path: Path) -> None:
    rows = read_rows(tmp_path / "rows.jsonl")
    clip = tmp_path / "clip.wav"
    shutil.copyfile(rows[0]["audio_path"], clip)
    write_rows(tmp_path / "rows.jsonl", [{**rows[0], "audio_path": str(clip)}])
    before = question()
    shutil.copyfile(rows[1]["audio_path"], clip)
    assert question() != before


def test_a_moved_base_keeps_its_answers(question: Callable[..., str], tmp_path: Path) -> None:
    before = question()
    (tmp_path / "base").rename(tmp_path / "moved")
    assert question("--model_id", "moved") == before


def test_a_page_about_the_model_does_not_count(tmp_path: Path) -> None:
    before = path_hash(Path(TINY))
    shutil.copytree(TINY, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("other words")
    assert path_hash(tmp_path / "base") == before
