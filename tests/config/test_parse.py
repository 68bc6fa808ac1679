"""Settings: defaults < YAML < flags, all errors reported at once, nothing read from elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import load_job, parse_only

from voxray.config.audit import AuditSettings
from voxray.config.compare import CompareSettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.featurize import FeaturizeSettings
from voxray.config.flags import flag_metadata
from voxray.config.parse import Settings, flag_names, parse
from voxray.config.quickstart import QuickstartSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.config.tune import TuneMultitaskSettings
from voxray.core.project_files import PROJECT_FILES

LISTS = {"--train_jsonl": MultitaskSettings, "--manifest": FeaturizeSettings, "--val_jsonl": EvaluateSettings}
LISTS |= {"--input": AuditSettings}
NEEDED = ["--output_dir", "out", "--train_jsonl", "a.jsonl"]
JOBS = [
    (TextSettings, "demo_train_text.yaml"),
    (AsrAdapterSettings, "demo_train_asr_adapter.yaml"),
    (MultitaskSettings, "demo.yaml"),
    (EvaluateSettings, "demo_evaluate.yaml"),
    (InferSettings, "demo_infer.yaml"),
    (FeaturizeSettings, "demo_featurize.yaml"),
    (TuneMultitaskSettings, "demo_tune.yaml"),
    (QuickstartSettings, "quickstart.yaml"),
    (CompareSettings, "demo_compare.yaml"),
]


def read(argv: list[str], model: type[Settings] = MultitaskSettings, demo: str = "demo.yaml"):
    return parse(model, argv, job="a_job", about="About it.", demo=demo)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], model: type[Settings] = MultitaskSettings) -> str:
    """Parse, expect exit status 2, and return the error output."""
    with pytest.raises(SystemExit) as stop:
        read(argv, model)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "a_job: " in shown.err and shown.out == ""
    return shown.err


@pytest.fixture
def yaml(tmp_path: Path):
    def write(text: str) -> list[str]:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def test_flags_win_over_yaml_and_yaml_over_defaults(yaml):
    settings = read([*NEEDED, *yaml("lr: 1e-4\nepochs: 7\n"), "--epochs", "2"])
    assert (settings.lr, settings.epochs, settings.lora_r) == (1e-4, 2, 16)
    assert isinstance(settings.lr, float)


def test_flags_win_wherever_the_config_flag_stands(yaml):
    assert read(["--epochs", "2", *yaml("epochs: 7"), *NEEDED]).epochs == 2
    assert read([*yaml("epochs: 7"), "--epochs", "2", *NEEDED]).epochs == 2


def test_yaml_ranges_are_no_numbers_to_base_60(yaml) -> None:
    assert read([*NEEDED, *yaml("num_workers: 1:4")]).num_workers == "1:4"
    assert read([*NEEDED, *yaml("num_workers: 3")]).num_workers == 3
    assert read([*NEEDED, "--num_workers", "2:2"]).num_workers == 2
    for bad in ("4:1", "0:2", "1:", "a:b", "1:2:3"):
        with pytest.raises(SystemExit):
            read([*NEEDED, "--num_workers", bad])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_yaml_spellings_of_a_small_number(yaml, text: str):
    assert read([*NEEDED, *yaml(f"lr: {text}")]).lr == 1e-4


@pytest.mark.parametrize("value", ["a.jsonl,b.jsonl", "a.jsonl, b.jsonl ,", ["a.jsonl", "b.jsonl"]])
def test_comma_lists(yaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value):
    monkeypatch.chdir(tmp_path)
    expected = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert read(["--output_dir", "o", *yaml(f"train_jsonl: {value}")]).train_jsonl == expected
    if isinstance(value, str):
        assert read(["--output_dir", "o", "--train_jsonl", value]).train_jsonl == expected


@pytest.mark.parametrize(
    ("argv", "pin_memory"),
    [
        ([], True),
        (["--pin_memory"], True),
        (["--no_pin_memory"], False),
        (["--no-pin_memory"], False),
        (["--no-pin-memory"], False),
        (["--pin-memory", "false"], False),
        (["--pin_memory=False"], False),
        (["--pin_memory=true"], True),
        (["--no_pin_memory=false"], True),
        (["--no_pin_memory", "true"], False),
    ],
)
def test_switches(argv: list[str], pin_memory: bool):
    assert read([*argv, *NEEDED]).pin_memory is pin_memory


def test_values_after_an_equals_sign():
    settings = read(["--output_dir=o=1", "--train_jsonl=a", "--lr=3e-3", "--grad-accum=4"])
    assert (settings.output_dir, settings.lr, settings.grad_accum) == ("o=1", 3e-3, 4)


@pytest.mark.parametrize(
    ("model", "argv", "name", "value"),
    [
        (MultitaskSettings, ["--nproc", "2"], "num_workers", 2),
        (MultitaskSettings, ["--num_workers", "auto"], "num_workers", "auto"),
        (MultitaskSettings, ["--num_workers", "0"], "num_workers", 0),
        (MultitaskSettings, ["--task_sampling", "1.0,1.5,1.2"], "task_weights", {"asr": 1.0, "sqa": 1.5, "tqa": 1.2}),
        (MultitaskSettings, ["--learning_rate", "1"], "lr", 1.0),
        (MultitaskSettings, ["--num-train-epochs", "9"], "epochs", 9),
        (MultitaskSettings, ["--gradient_accumulation_steps", "3"], "grad_accum", 3),
        (MultitaskSettings, ["--no_freeze_encoder"], "freeze_whisper", False),
        (MultitaskSettings, ["--drop_last"], "drop_last", True),
        (MultitaskSettings, ["--no-drop_last"], "drop_last", False),
        (MultitaskSettings, ["--eval_steps", "5"], "eval_steps", 5),
        (MultitaskSettings, ["--jsonl", "/v"], "val_jsonl", ("/v",)),
        (MultitaskSettings, ["--test_jsonl", "/v,/w"], "val_jsonl", ("/v", "/w")),
        (InferSettings, ["--num_preview", "3"], "preview_rows", 3),
        (InferSettings, ["--test_jsonl", "/v"], "jsonl", ("/v",)),
        (EvaluateSettings, ["--jsonl", "/v", "--out_dir", "here"], "output_dir", "here"),
        (EvaluateSettings, ["--jsonl", "/v", "--adapter_path", "/x"], "lora_dir", "/x"),
        (TextSettings, ["--init_adapter", "/a/lora_stage1"], "init_adapter", "/a/lora_stage1"),
        (AsrAdapterSettings, ["--gradient_checkpointing"], "grad_ckpt", True),
        (TuneMultitaskSettings, ["--lora_r", "4,8"], "lora_r", (4, 8)),
        (
            TuneMultitaskSettings,
            ["--task_sampling", "1,1,1;asr=1"],
            "task_weights",
            ({"asr": 1, "sqa": 1, "tqa": 1}, {"asr": 1}),
        ),
    ],
)
def test_old_spellings_and_forms(model, argv: list[str], name: str, value):
    needed = NEEDED if issubclass(model, TrainSettings) else []
    if model is InferSettings and "jsonl" in name:
        value = value[0]
    assert getattr(read([*needed, *argv], model), name) == value


def test_out_dir_is_output_dir_also_in_yaml(yaml):
    assert read(["--train_jsonl", "a", *yaml("out-dir: x\nnproc: auto")]).output_dir == "x"


def test_every_alias_reaches_its_field():
    for model, _ in JOBS:
        names = flag_names(model)
        for name, field in model.model_fields.items():
            assert {names[alias] for alias in flag_metadata(field).aliases} <= {name}


def test_every_bad_field_is_named_at_once(yaml, capsys: pytest.CaptureFixture[str]):
    config = yaml("epochs: many\nlorra_r: 4\nweight_decay: -1\nseed: true\n")
    stderr = refused([*config, "--lr", "0", "--lr_schedule", "cubic", "--lora_dropout=1", "--gradckpt", "word"], capsys)
    expected = [
        "lorra_r",
        "did you mean lora_r",
        "epochs",
        "'many'",
        "weight_decay",
        "--lr: ",
        "--lr_schedule",
        "seed",
    ]
    expected += ["--lora_dropout", "--gradckpt", "did you mean --grad_ckpt"]
    expected += ["--output_dir: Field required", "--train_jsonl: Field required"]
    assert [text for text in expected if text not in stderr] == []
    assert stderr.count("error: ") == 10 and "10 bad setting(s)" in stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rank", "4"], "--lora_rank: unknown flag"),
        (["--epoch", "4"], "--epoch: unknown flag; did you mean --epochs?"),
        (["--train", "x"], "--train: unknown flag"),
        (["--lora"], "--lora: unknown flag"),
        (["--zzzz"], "--zzzz: unknown flag\n"),
        (["-lr", "4"], "-lr: not a flag"),
        (["--lr"], "--lr: needs a value"),
        (["--lr", "--bf16"], "--lr: needs a value"),
        (["--no_lr"], "--no_lr: only switches"),
        (["--bf16=maybe"], "--bf16: a switch takes true or false"),
        (["--epochs", "0"], "--epochs: Input should be greater than or equal to 1 (got '0')"),
        (["--epochs", "2.5"], "--epochs: must be a whole number; --max_steps ends a run within an epoch (got '2.5')"),
        (["--max_steps", "-1"], "--max_steps: must be 0 or more; 0 trains for --epochs (got '-1')"),
        (["--bf16", "1"], "--bf16: a switch takes true or false, not '1'"),
        (["--metric_for_best_model", "wer"], "--metric_for_best_model: did you mean asr/wer? It must be one of asr/"),
        (["--metric_for_best_model", "eval_wer"], "--metric_for_best_model: did you mean asr/wer?"),
        (["--lr", "nan"], "--lr: Input should be a finite number"),
        (["--lr", "inf"], "--lr: Input should be a finite number"),
        (["--lr", "-1"], "--lr: Input should be greater than 0"),
        (["--lora_dropout", "1.0"], "--lora_dropout: Input should be less than 1"),
        (["--num_workers", "-1"], "--num_workers: must be auto or a whole number"),
        (["--num_workers", "some"], "--num_workers: must be auto or a whole number"),
        (["--num_workers", "1.5"], "--num_workers: must be auto or a whole number"),
        (["--task_weights", "1,2"], "--task_weights: needs 3 numbers"),
        (["--val_jsonl", "b", "--val_jsonl", "c"], "--val_jsonl: given twice"),
        (["--lr", "1", "--learning_rate", "2"], "--learning_rate: given twice, as '1' and '2'"),
        (["--bf16", "--no_bf16"], "--no_bf16: given twice, as True and False"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config: given twice"),
        (["--config"], "--config: needs a value"),
    ],
)
def test_faulty_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert message in refused([*NEEDED, *argv], capsys)


def test_only_metrics_of_the_jobs_tasks(capsys: pytest.CaptureFixture[str]):
    errors = refused([*NEEDED, "--metric_for_best_model", "tqa/loss"], capsys, WhisperSettings)
    assert "--metric_for_best_model: must be one of asr/" in errors and "tqa/rouge_l" not in errors


def test_a_flag_repeated_with_the_same_value_is_fine():
    assert read([*NEEDED, "--lr", "1e-3", "--learning_rate", "1e-3", "--bf16", "--bf16"]).lr == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [", "--config"),
        ("- lr\n- 2\n", "holds a list, not keys and values"),
        ("", "holds a NoneType"),
        ("just words", "holds a str"),
        ("lr: 1\nlearning_rate: 2", "learning_rate: given twice, as 1 and 2"),
        ("num_worker: 2", "num_worker: unknown key; did you mean num_workers?"),
        ("num_workers:", "num_workers: must be auto or a whole number"),
        ("num_workers: 2.7", "num_workers: must be auto or a whole number"),
        ("num_workers: true", "num_workers: is not true or false"),
        ("epochs: yes", "epochs: is not true or false"),
        ("model_id: 3", "model_id: Input should be a valid string (got 3)"),
        ("model_id:", "model_id: Input should be a valid string (got None)"),
        ("bf16: 2", "bf16: Input should be a valid boolean"),
        ("task_weights: 3", "task_weights: needs 3 numbers"),
        ("task_weights: {asr: x}", "task_weights: 'x' is not a number"),
        ("model_id: 2024-13-45", "month must be in 1..12"),
        ("lr: !!float abc", "could not convert string to float"),
        ("lr: !!bool abc", "--config"),
        ("lr: !!timestamp abc", "--config"),
        ("[" * 5000, "--config"),
        ("lr: \x01", "--config"),
        ("lr: 1\nlr: 2", "line 2: the key lr is there twice"),
        ("task_weights: {asr: 1, asr: 2}", "line 1: the key asr is there twice"),
    ],
)
def test_faulty_yaml(yaml, text: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert message in refused([*NEEDED, *yaml(text)], capsys)


def test_yaml_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (tmp_path / "missing.yaml", tmp_path):
        assert f"--config {path}: " in refused([*NEEDED, "--config", str(path)], capsys)
    (tmp_path / "latin.yaml").write_bytes(b"model_id: caf\xe9")
    assert "utf-8" in refused([*NEEDED, "--config", str(tmp_path / "latin.yaml")], capsys)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os"])
def test_yaml_tags_execute_nothing(yaml, tmp_path: Path, tag: str, capsys: pytest.CaptureFixture[str]):
    created = tmp_path / "made"
    assert "could not determine a constructor" in refused([*NEEDED, *yaml(f"model_id: {tag} ['{created}']")], capsys)
    assert not created.exists()


def test_environment_variables_change_nothing(monkeypatch: pytest.MonkeyPatch):
    before = read(NEEDED)
    for name in ("LR", "MODEL_ID", "EPOCHS", "TRAIN_JSONL", "BF16", "VOXRAY_LR", "OUTPUT_DIR", "CONFIG"):
        monkeypatch.setenv(name, "7")
        monkeypatch.setenv(name.lower(), "7")
    assert read(NEEDED) == before
    monkeypatch.setattr(os, "environ", {"HOME": "/nowhere"})
    assert read(NEEDED) == before


@pytest.mark.parametrize(("model", "demo"), JOBS)
def test_no_flags_run_the_demo_recipe_and_say_so_first(
    model, demo: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    settings = read([], model, demo)
    assert capsys.readouterr().out.startswith(
        f"a_job: no flags given, so this runs the demo recipe (jobs/configs/{demo})"
    )
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if flag_metadata(field).path == "input" and name in settings.model_fields_set:
            for path in [value] if isinstance(value, str) else value:
                assert Path(path).is_absolute()
                assert not (PROJECT_FILES / "tests" / "assets").is_dir() or path.startswith(str(PROJECT_FILES))


def test_flags_can_be_checked_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, status in ((NEEDED, 0), ([*NEEDED, "--lora_rr", "2"], 2)):
        with pytest.raises(SystemExit) as end:
            read([*argv, "--check-flags"])
        assert end.value.code == status
    shown = capsys.readouterr()
    assert shown.out == "a_job: the flags are valid\n" and "--lora_rr: unknown flag" in shown.err


def test_submit_checks_the_jobs_flags_before_it_connects(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_job("submit").main(["--address", "http://127.0.0.1:9", "--", "train_text", "--lora_rr", "2"])
    assert end.value.code == 2 and "--lora_rr: unknown flag; did you mean --lora_r?" in capfd.readouterr().err


def test_fields_set_are_those_that_the_user_set(yaml):
    settings = read([*NEEDED, *yaml("lr: 2e-4"), "--jsonl", "v"])
    assert settings.model_fields_set == {"output_dir", "train_jsonl", "lr", "val_jsonl"}


def test_relative_inputs_become_absolute_and_outputs_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
    argv = ["--train_jsonl", "a,~/b,/c,~no-such-user/f", "--output_dir", "out", "--model_id"]
    settings = read([*argv, "base"])
    assert settings.train_jsonl == (
        f"{tmp_path}/a",
        "/home/someone/b",
        "/c",
        f"{tmp_path}/~no-such-user/f",
    )
    assert (settings.output_dir, settings.model_id) == ("out", f"{tmp_path}/base")
    assert read([*argv, "someone/model"]).model_id == "someone/model"  # a hub id, as there is no such folder
    assert read([*argv, "m"]).features_dir == ""


def test_settings_are_frozen_and_closed():
    with pytest.raises(ValueError, match="frozen"):
        read(NEEDED).lr = 1.0
    with pytest.raises(ValueError, match="Extra inputs"):
        MultitaskSettings(**{**dict(read(NEEDED)), "lora_rank": 4})


def test_evaluate_and_infer_name_what_they_miss(capsys: pytest.CaptureFixture[str]):
    stderr = refused(["--per_device_bsz", "0"], capsys, EvaluateSettings)
    assert "--val_jsonl" in stderr and "--per_device_bsz" in stderr
    assert "give one of them" in refused(["--audio_path", "a", "--jsonl", "b"], capsys, InferSettings)


def test_settings_load_neither_torch_nor_ray():
    code = """
import importlib, pathlib, sys
import voxray.config
for path in pathlib.Path(voxray.config.__path__[0]).glob("*.py"):
    importlib.import_module(f"voxray.config.{path.stem}")
from voxray.config.parse import parse
from voxray.config.train import MultitaskSettings
from voxray.core.project_files import PROJECT_FILES
try:
    parse(MultitaskSettings, ["--lr", "x"], job="a", about="", demo="demo.yaml")
except SystemExit as stop:
    heavy = [name for name in ("torch", "ray", "transformers", "pyarrow", "numpy") if name in sys.modules]
    print(stop.code, heavy)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT_FILES, timeout=60
    )
    assert process.stdout == "2 []\n", process.stdout + process.stderr


def test_positional_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positional arguments are accepted only by jobs that declare them, and only before the first flag."""

    def words(*argv: str) -> CompareSettings:
        return parse(CompareSettings, argv, job="compare", about="", demo="demo_compare.yaml", positional="runs")

    assert words("/a", "/b,c", "--seed", "3").runs == ("/a", "/b,c"), "a comma is part of a word"
    assert words("--runs", "/a,/b").runs == ("/a", "/b")
    (tmp_path / "c.yaml").write_text("runs: [/x]\nseed: 4\n")
    assert (words("/a", "--config", str(tmp_path / "c.yaml")).runs, words("/a").seed) == (("/a",), 0)
    for argv, message in (
        (["--seed", "3", "/a"], "/a: not a flag"),
        (["/a", "--runs", "/b"], "--runs: given twice"),
    ):
        with pytest.raises(SystemExit):
            words(*argv)
        assert message in capsys.readouterr().err
    assert "stray: not a flag" in refused(["stray", *NEEDED], capsys)


@pytest.mark.parametrize("flag", LISTS)
def test_a_file_counts_once_whatever_its_names(flag: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "m.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "m.jsonl")
    names = f"{tmp_path}/a/../m.jsonl,{tmp_path}/m.jsonl,{tmp_path}/link.jsonl,{tmp_path}/n.jsonl"
    settings = read([flag, names, "--output_dir", "o"], LISTS[flag])
    kept_files = getattr(settings, flag.removeprefix("--"))
    assert [Path(path).resolve().name for path in kept_files] == ["m.jsonl", "n.jsonl"]


def test_validation_manifests_that_the_run_trains_on(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "m.jsonl")
    flags = ["--output_dir", "o", "--train_jsonl", str(tmp_path / "m.jsonl"), "--val_jsonl"]
    assert read([*flags, f"{tmp_path}/link.jsonl,other.jsonl"]).shared_manifests == (str(tmp_path / "link.jsonl"),)
    assert read([*flags, "other.jsonl"]).shared_manifests == ()


@pytest.mark.parametrize(
    ("job", "flag", "value"),
    [
        ("train_text", "--train_jsonl", "s3://b/rows.jsonl"),
        ("train_whisper", "--model_id", "s3://b/models/whisper"),
        ("train_text", "--init_adapter", "gs://b/run"),
        ("featurize", "--manifest", "s3://b/rows.jsonl"),
        ("prepare", "--input", "s3://b/corpus"),
        ("prepare", "--train_output", "s3://b/train.jsonl"),
        ("export", "--output_dir", "s3://b/model"),
        ("audit", "--output_dir", "s3://b/audit"),
        ("tune", "--storage_path", "s3://b/x"),
        ("tune", "--output_dir", "s3://b/x"),
    ],
)
def test_urls_where_only_paths_work(job: str, flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = {
        "train_text": {"--train_jsonl": "a", "--output_dir": "b"},
        "train_whisper": {"--train_jsonl": "a", "--output_dir": "b"},
        "tune": {"--train_jsonl": "a", "--val_jsonl": "b", "--output_dir": "c"},
        "featurize": {"--manifest": "a"},
        "prepare": {"--input": "a", "--train_output": "b"},
        "export": {"--lora_dir": "a"},
        "audit": {"--input": "a"},
    }
    argv = [word for pair in {**required[job], flag: value}.items() for word in pair]
    with pytest.raises(SystemExit, match="2"):
        parse_only(job, argv)
    assert f"error: {flag} {value}: takes a path on a file system that every node mounts" in capsys.readouterr().err


def test_urls_where_they_work() -> None:
    argv = ["--train_jsonl", "a", "--output_dir", "s3://b/run", "--features_dir", "s3://b/features"]
    assert parse_only("train_text", argv).output_dir == "s3://b/run"
    assert parse_only("evaluate", ["--lora_dir", "s3://b/run", "--val_jsonl", "a"]).lora_dir == "s3://b/run"


def test_storage_path_is_absolute(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_only("train_text", ["--train_jsonl", "a", "--output_dir", "b", "--storage_path", "mnt/shared"])
    assert "--storage_path: must be absolute" in capsys.readouterr().err
