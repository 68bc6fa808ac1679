"""Effects of the flags of featurize, evaluate, infer and quickstart."""

import csv
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SPEECH, TINY, manifest, read_rows, write_rows
from helpers.running import load_job, parse_only

from voxray.commands import evaluate as job
from voxray.commands import infer, quickstart
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.flag_groups import PRECISIONS, FeatureFlags
from voxray.config.quickstart import QuickstartSettings
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.evaluation import distribute as batch
from voxray.evaluation.predictions import read_predictions
from voxray.features.extract import Extractor
from voxray.generation.engines import engine
from voxray.generation.generate import Completion, SamplingParams
from voxray.models.adapters.lora import add_lora, save_adapter
from voxray.models.voxtral.family import Voxtral

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LOADED: tuple[tuple[dict[str, Any], tuple[torch.dtype, int]], ...] = (
    ({"fp16": True}, (torch.float16, 0)),
    ({"quantize": "8bit"}, (torch.float32, 8)),
    ({"quantize": "4bit", "bf16": True}, (torch.bfloat16, 4)),
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose final adapter and checkpoint both change every answer, in different ways."""
    run = tmp_path_factory.mktemp("run")
    for folder, seed in (("adapter", 1), ("checkpoints/step-000005", 2)):
        torch.manual_seed(seed)
        base = Voxtral().load_model(TINY, dtype=torch.float32, device=CPU)
        model = add_lora(base, Voxtral(), ("projector", "llm"), model_id=TINY, r=4, alpha=64, dropout=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(model, run / folder)
    return run


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of ``generate`` by evaluate and infer; a fake that always gives the same answer."""
    calls: list[dict[str, Any]] = []

    def generated(
        model: Any, family: Any, front_end: Any, rows: Any, *, batch_size: int, sampling: SamplingParams, **_: Any
    ) -> Any:
        dtype = next(model.parameters()).dtype
        kinds = {parameter.dtype for parameter in model.parameters()}
        bits = 8 if torch.int8 in kinds else 4 if torch.uint8 in kinds else 0
        with_lora = any("lora" in name for name, _ in model.named_parameters())
        what = {"rows": [row.id for row in rows], "dtype": dtype, "lora": with_lora, "bits": bits}
        calls.append({**what, "batch_size": batch_size, **asdict(sampling)})
        return ((index, Completion("1", 1, False, 0.1)) for index in range(len(rows)))

    monkeypatch.setattr(engine, "generate", generated)
    return calls


# evaluate


Evaluate = Callable[..., job.EvaluationResult]


@pytest.fixture
def evaluate(small: dict[str, str], tmp_path: Path, evaluation_here: None) -> Evaluate:
    """Run the evaluate job in this process, by default on four speech and four text rows."""

    def run(**flags: Any) -> job.EvaluationResult:
        usual = {"model_id": TINY, "val_jsonl": (small["asr.val"], small["tqa.val"]), "storage_path": str(tmp_path)}
        return job.run_evaluation(EvaluateSettings.model_validate({**usual, **flags}))

    return run


def test_evaluate_folders(evaluate: Evaluate, answered: list, tmp_path: Path) -> None:
    usual = evaluate()
    assert usual.output_dir == tmp_path / "runs/evaluate" and (usual.output_dir / "metrics.json").is_file()
    assert len(list((usual.output_dir / "features").iterdir())) == 2
    other = evaluate(output_dir=str(tmp_path / "elsewhere"), features_dir="shared", rows_per_shard=3)
    assert other.output_dir == tmp_path / "elsewhere" and not (other.output_dir / "features").exists()
    assert sorted(json.loads(path.read_text())["shards"] for path in (tmp_path / "shared").glob("*/set.json")) == [2, 2]


def test_evaluate_rows(evaluate: Evaluate, answered: list, small: dict[str, str], tmp_path: Path) -> None:
    asr = read_rows(small["asr.val"])
    assert {task: metrics["exact_match"]["n"] for task, metrics in evaluate().metrics.items()} == {"asr": 4, "tqa": 4}
    assert set(evaluate(val_jsonl=(small["sqa.val"],), output_dir="b").metrics) == {"sqa"}
    assert set(evaluate(mode="valid_asr", output_dir="c").metrics) == {"asr"}
    result = evaluate(mode="submission_asr", output_dir="d")
    lines = list(csv.reader((result.output_dir / "submission.csv").open(encoding="utf-8")))
    assert lines[0] == ["testset_id", "text"] and lines[1:] == [[f"asr.val.jsonl:{line}", "1"] for line in range(1, 5)]
    with pytest.raises(RunError, match="no aac row"):
        evaluate(mode="valid_aac", output_dir="e")
    sounds = [{"audio_path": row["audio_path"], "caption": "소리", "id": f"test{n}"} for n, row in enumerate(asr)]
    captions = write_rows(tmp_path / "aac.jsonl", [sounds[0], {**sounds[1], "question": "What is heard?"}])
    both = {"val_jsonl": (captions, small["tqa.val"])}
    assert set(evaluate(**both, output_dir="f").metrics) == {"aac", "tqa"}
    metrics = evaluate(**both, mode="valid_aac", output_dir="g").metrics
    assert set(metrics) == {"aac"} and (metrics["aac"]["rouge_l"]["value"], metrics["aac"]["rouge_l"]["n"]) == (0, 2)
    result = evaluate(**both, mode="submission_aac", output_dir="h")
    lines = list(csv.reader((result.output_dir / "submission.csv").open(encoding="utf-8")))
    assert lines == [["testset_id", "text"], ["test0", "1"], ["test1", "1"]]
    prompts = [row["prompt"] for row in read_predictions(result.output_dir)]
    assert prompts == ["Please describe the audio.", "What is heard?"]
    with pytest.raises(ValueError, match="must be submission_ or valid_ with one of asr, sqa, tqa, aac"):
        EvaluateSettings.model_validate({"val_jsonl": "a", "mode": "submission_xyz"})


def test_evaluate_max_len(evaluate: Evaluate, answered: list, small: dict[str, str]) -> None:
    result = evaluate(max_len=40)
    assert set(result.metrics) == {"tqa"}, "the prompt of a clip has 50 positions per window"
    ledger = [json.loads(line) for line in (result.output_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["manifest"], line["line"], line["reason"]) for line in ledger] == [
        (small["asr.val"], line, "too_long") for line in range(1, 5)
    ]


def test_evaluate_batches_and_precision(
    evaluate: Evaluate, answered: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(per_device_bsz=3, gen_max_new_tokens=9, tf32=True)
    assert [(len(call["rows"]), call["batch_size"]) for call in answered] == [(8, 3)]
    assert {call["max_new_tokens"] for call in answered} == {9}
    assert {call["dtype"] for call in answered} == {torch.float32}
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.cuda.is_available() or "warning: --tf32 has no effect" in capsys.readouterr().out
    answered.clear()
    evaluate(bf16=True, output_dir="b")
    assert {call["dtype"] for call in answered} == {torch.bfloat16}
    assert not torch.backends.cuda.matmul.allow_tf32
    for index, (flags, expected) in enumerate(LOADED):
        answered.clear()
        evaluate(**flags, output_dir=f"precision{index}")
        assert {(call["dtype"], call["bits"]) for call in answered} == {expected}


def test_evaluate_model_and_adapter(
    evaluate: Evaluate, answered: list[dict[str, Any]], adapter: Path, tmp_path: Path
) -> None:
    evaluate()
    evaluate(lora_dir=str(adapter), output_dir="b")
    assert [call["lora"] for call in answered[:1] + answered[-1:]] == [False, True]
    with pytest.raises(RunError, match=r"--lora_dir .*: no adapter here"):
        evaluate(lora_dir=str(tmp_path), output_dir="c")
    with pytest.raises(RunError, match="--model_id /nowhere"):
        evaluate(model_id="/nowhere", output_dir="d")
    settings = EvaluateSettings(val_jsonl=("x",))
    assert job.base_and_adapter(settings, str(adapter))[0] == TINY, "an adapter knows its base"


def test_evaluate_strict(evaluate: Evaluate, answered: list, small: dict[str, str], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*read_rows(small["tqa.val"])[:1], {"other": 1}])
    with pytest.raises(RunError, match=rf"{path}:2: .*\(--strict\)"):
        evaluate(val_jsonl=(path,), strict=True)
    assert evaluate(val_jsonl=(path,)).metrics["tqa"]["exact_match"]["n"] == 1


# featurize, and what needs Ray


@pytest.mark.slow
@pytest.mark.ray
def test_numbers_of_ray_actors(
    local_ray: None, small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    sizes: list[int] = []
    strategy = ray.data.ActorPoolStrategy

    def watched(**options: Any) -> Any:
        sizes.append(options.get("size") or options["max_size"])
        return strategy(**options)

    monkeypatch.setattr(ray.data, "ActorPoolStrategy", watched)
    line = f"--model_id {TINY} --val_jsonl {small['tqa.val']} --output_dir {tmp_path} --rows_per_shard 1"
    fast = "--num_actors 1 --num_models 2 --per_device_bsz 1 --gen_max_new_tokens 4"
    monkeypatch.setattr(batch, "BATCHES_PER_PART", 1)
    load_job("evaluate").main([*line.split(), *fast.split()])
    assert sizes == [1, 2]
    parts = list((tmp_path / "predictions").glob("part-*.parquet"))
    assert len(parts) == 4


@pytest.mark.ray
@pytest.mark.slow
def test_featurize_flags(
    local_ray: None, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*read_rows(small["tqa.val"]), {"audio_path": "x.wav", "transcript": "x"}])
    line = f"--model_id {TINY} --manifest {bad},{small['asr.val']} --storage_path {tmp_path} --output_dir made"
    load_job("featurize").main([*line.split(), "--rows_per_shard", "2", "--num_actors", "1"])
    out, folder = capsys.readouterr().out, tmp_path / "made"
    assert "features: 9 rows, 9 of them made now, by " in out and "1 bad row(s)" in out
    shards = {json.loads(path.read_text())["manifest"]: path.parent / "shards" for path in folder.glob("*/set.json")}
    assert {name: len(list(path.glob("*.arrow"))) for name, path in shards.items()} == {bad: 3, small["asr.val"]: 2}
    [entry] = [json.loads(text) for text in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert (entry["manifest"], entry["line"], entry["reason"]) == (bad, 5, "audio_missing")
    with pytest.raises(SystemExit) as end:
        load_job("featurize").main([*line.split(), "--strict"])
    assert end.value.code == 1
    assert f"error: {bad}:5: audio file not found: x.wav (--strict)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        load_job("featurize").main([*line.split(), "--model_id", "/nowhere"])
    assert end.value.code == 2, "given twice"
    with pytest.raises(SystemExit) as end:
        load_job("featurize").main(["--model_id", "/nowhere", "--manifest", bad, "--output_dir", str(folder)])
    assert end.value.code == 1 and "--model_id /nowhere" in capsys.readouterr().err


# infer


def answer(**flags: Any) -> list[dict[str, Any]]:
    return infer.run_inference(InferSettings.model_validate({"model_id": TINY, **flags}), manifest("asr.val"))


def test_infer_clip(answered: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    make = Extractor.sample_rows

    def watched(extractor: Any, sample: Any) -> Any:
        rows, clip = make(extractor, sample)
        prompts.append(extractor.front_end.show(rows[0]["prompt_ids"]))
        return rows, clip

    monkeypatch.setattr(Extractor, "sample_rows", watched)
    clip = str(SPEECH / "sample.wav")
    answer(audio_path=clip)
    answer(audio_path=clip, language="ko")
    answer(audio_path=clip, language="Korean")
    [answered_row] = answer(audio_path=clip, question="무슨 번호입니까?")
    assert answered_row["task"] == "sqa" and answered_row["id"] == "sample.wav"
    assert prompts[0].endswith("[/INST][TRANSCRIBE]") and prompts[1].endswith("[/INST]lang:ko[TRANSCRIBE]")
    assert prompts[2] == prompts[1], "as in manifests"
    assert prompts[3].endswith("무슨 번호입니까?[/INST]")
    with pytest.raises(RunError, match=r"--audio_path /no\.wav: no such file"):
        answer(audio_path="/no.wav")
    with pytest.raises(ValueError, match="language 'Klingon' is not known"):
        answer(audio_path=clip, language="Klingon")


def test_infer_rows(
    answered: list[dict[str, Any]], small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number_of_calls(**flags: Any) -> list[int]:
        answered.clear()
        answer(jsonl=small["tqa.val"], **flags)
        return [len(call["rows"]) for call in answered]

    assert number_of_calls(batch_size=3) == [4] and answered[0]["batch_size"] == 3
    monkeypatch.setattr(infer, "BATCHES_PER_GROUP", 1)
    assert number_of_calls(batch_size=3) == [3, 1]
    assert number_of_calls(preview_rows=2) == [2]
    assert answered[0]["max_new_tokens"] == 256 and answered[0]["temperature"] == 0
    assert number_of_calls(max_new_tokens=5, temperature=0.5, seed=7) == [4]
    assert (answered[0]["max_new_tokens"], answered[0]["temperature"], answered[0]["seed"]) == (5, 0.5, 7)
    answer(jsonl=small["tqa.val"], output_path=str(tmp_path / "a.jsonl"), bf16=True)
    assert answered[-1]["dtype"] == torch.bfloat16
    for flags, expected in LOADED:
        answer(jsonl=small["tqa.val"], **flags)
        assert (answered[-1]["dtype"], answered[-1]["bits"]) == expected
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prediction"] for row in rows] == ["1"] * 4
    assert [row["reference"] for row in rows] == [row["output"] for row in read_rows(small["tqa.val"])]


def test_infer_max_len(answered: list, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="nothing could be answered"):
        answer(jsonl=small["asr.val"], max_len=50)
    assert f"{small['asr.val']}:4: left out: " in capsys.readouterr().err


def test_infer_sampling_really_happens(small: dict[str, str]) -> None:
    def texts(**flags: Any) -> list[str]:
        flags = {"max_new_tokens": 8, **flags}
        return [row["prediction"] for row in answer(jsonl=small["tqa.val"], **flags)]

    greedy = texts()
    assert greedy == texts(seed=5), "without a temperature nothing is drawn"
    hot = texts(temperature=5.0, seed=5)
    assert hot == texts(temperature=5.0, seed=5) != greedy
    assert hot != texts(temperature=5.0, seed=6)
    assert all(len(short) < len(long) for short, long in zip(texts(max_new_tokens=1), greedy, strict=True))


def test_infer_adapter(
    adapter: Path, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(**flags: Any) -> list[str]:
        return [row["prediction"] for row in answer(jsonl=small["tqa.val"], max_new_tokens=8, **flags)]

    base, final = texts(), texts(lora_dir=str(adapter))
    assert f"adapter {adapter / 'adapter'}: " in capsys.readouterr().err
    assert base != final == texts(output_dir=str(adapter)) == texts(lora_dir=str(adapter / "adapter"))
    shutil.copytree(adapter / "checkpoints", tmp_path / "checkpoints")
    assert texts(output_dir=str(tmp_path)) not in (base, final), "without a final adapter the newest checkpoint is used"


def test_infer_model_id_and_tf32(answered: list, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    answer(jsonl=small["tqa.val"], tf32=True)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.cuda.is_available() or "warning: --tf32 has no effect" in capsys.readouterr().out
    answer(jsonl=small["tqa.val"])
    assert not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(RunError, match="--model_id /nowhere"):
        answer(jsonl=small["tqa.val"], model_id="/nowhere")


# quickstart


def other_values(model: type, half: str = "bf16") -> dict[str, Any]:
    """A valid non-default value for every field; for the types, which exclude each other, only for ``half``."""
    special = {
        "model_id": "m",
        "train_jsonl": ("t",),
        "val_jsonl": ("v",),
        "replay_jsonl": ("r",),
        "lora_dropout": 0.5,
        "label_smoothing": 0.5,
    }
    special |= {"task_weights": {"asr": 1.0}, "lr_schedule": "linear", "num_workers": 3, "base_val_jsonl": ("b",)}
    special |= {
        "batching": "length",
        "optim": "adamw_torch_fused",
        "per_task_bsz": {"asr": 3},
        "curriculum": ((("asr",), 2),),
        "context_shares": {"true": 1.0, "false": 0.0, "none": 0.0},
    }
    special |= {**{name: half == name for name in PRECISIONS}, "quantize": "4bit", "tuning": "rslora"}
    special |= {
        "strategy": "deepspeed",
        "zero_stage": 2,
        "offload_optimizer": False,
        "metric_for_best_model": "asr/cer",
        "report_to": ("mlflow",),
        "store": "pcm16",
        "cache_dtype": "float32",
        "speeds": (0.8,),
        "noise_snr": (3.0, 4.0),
        "language": "en",
        "storage_path": "/storage",
    }
    values = {}
    for name, info in model.model_fields.items():
        kind, default = info.annotation, info.default
        plain = {bool: default is not True, int: (default if isinstance(default, int) else 0) + 1, str: f"a {name}"}
        plain[float] = (default if isinstance(default, float | int) else 0) + 0.5
        values[name] = special[name] if name in special else plain[kind]
        # stage 3 excludes --quantize and --compile, and FSDP's flag DeepSpeed
        left = {*PRECISIONS, "zero_stage", "offload_optimizer"} - {half}
        assert values[name] != default or name in left, name
    return values


@pytest.mark.parametrize("half", PRECISIONS)
def test_quickstart_hands_its_flags_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def featurized(settings: Any, model_id: str, manifests: Any, features_dir: Path, **options: Any) -> Any:
        arguments = {"settings": settings, "model_id": model_id, "manifests": manifests, "dir": features_dir}
        calls.append(("featurize", {**arguments, **options}))
        return SimpleNamespace(folders=(*manifests, *options["plain_manifests"]))

    split: list[Any] = []
    monkeypatch.setattr(quickstart, "ray_session", lambda log, processes: split.append(processes) or nullcontext())
    monkeypatch.setattr(quickstart, "make_features", featurized)
    monkeypatch.setattr(quickstart, "run_training", lambda settings, **_: calls.append(("train", dict(settings))))
    monkeypatch.setattr(quickstart, "run_evaluation", lambda settings: calls.append(("evaluate", dict(settings))))
    monkeypatch.setattr(quickstart, "read_predictions", lambda folder: [])
    monkeypatch.setattr(quickstart, "_split", lambda rows, own: split.append(own) or ({}, {}))
    monkeypatch.setattr(quickstart, "_most_frequent_answer", lambda folders, settings: {})
    cards: list[Any] = []
    monkeypatch.setattr(quickstart, "_write_card", lambda *arguments: cards.append(arguments))
    values = {
        **other_values(QuickstartSettings, half),
        "storage_path": str(tmp_path),
        "output_dir": "q",
        "features_dir": "f",
    }
    quickstart.run_quickstart(QuickstartSettings.model_validate(values))
    assert [name for name, _ in calls] == ["featurize", "evaluate", "train", "evaluate"]
    (_, features), (_, before), (_, trained), (_, after) = calls
    folder, common = tmp_path / "q", ("model_id", *FeatureFlags.model_fields)
    assert dict(features.pop("settings")) == values
    arguments = {"manifests": ("t",), "plain_manifests": ("v", "b"), "dir": tmp_path / "f"}
    assert features == {"model_id": values["model_id"], "bf16": values["bf16"], **arguments}
    own = {"output_dir": str(folder / "train"), "features_dir": str(tmp_path / "f"), "overwrite": True}
    assert trained == {**{name: values[name] for name in MultitaskSettings.model_fields}, **own}
    assert before["val_jsonl"] == after["val_jsonl"] == ("v", "b")
    for evaluation in (before, after):
        same = (*common, *PRECISIONS, "quantize", "tf32", "max_len")
        assert {name: evaluation[name] for name in same} == {name: values[name] for name in same}
        assert evaluation["per_device_bsz"] == values["eval_bsz"]
        assert evaluation["gen_max_new_tokens"] == values["eval_max_new_tokens"]
        assert evaluation["features_dir"] == str(tmp_path / "f")
    assert (before["output_dir"], after["output_dir"]) == (str(folder / "base"), str(folder / "tuned"))
    assert (before["lora_dir"], after["lora_dir"]) == ("", str(folder / "train"))
    assert split[0] == 3 and split[1:] == [("b",), ("b",)]
    assert (folder / "summary.json").is_file() and cards == [(folder, values["model_id"])]


def test_quickstart_trains_in_two_processes_unless_told_otherwise(tmp_path: Path) -> None:
    settings = QuickstartSettings(train_jsonl=("t",), output_dir="q")
    assert quickstart._train_settings(settings, tmp_path, {"model_id": "m"}).num_workers == 2


def test_flags_that_warn(capsys: pytest.CaptureFixture[str]) -> None:
    trains = "--train_jsonl t.jsonl --output_dir o"
    for name, line, flag in (
        ("train_multitask", f"{trains} --cuda_visible_devices 0", "cuda_visible_devices"),
        ("train_text", f"{trains} --cuda_visible_devices 0", "cuda_visible_devices"),
        ("train_asr_adapter", f"{trains} --cuda_visible_devices 0", "cuda_visible_devices"),
        ("tune", f"{trains} --cuda_visible_devices 0", "cuda_visible_devices"),
        ("quickstart", f"{trains} --cuda_visible_devices 0", "cuda_visible_devices"),
        ("evaluate", "--val_jsonl v.jsonl --cuda_visible_devices 0", "cuda_visible_devices"),
        ("quickstart", f"{trains} --overwrite", "overwrite"),
        ("compile", "--tensorrt_device cuda:0", "tensorrt_device"),
        ("efficiency", "--tensorrt_device cuda:0", "tensorrt_device"),
        ("efficiency", "--optimization_level 3", "optimization_level"),
    ):
        parse_only(name, line.split())
        assert f"warning: --{flag} has no effect: " in capsys.readouterr().err
    parse_only("train_multitask", trains.split())
    assert "warning" not in capsys.readouterr().err
