"""Files of SALMONN's trainers and evaluators: every key becomes a flag, prints a warning, or is an error."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from voxray.config import salmonn_yaml
from voxray.config.compile import CompileSettings
from voxray.config.efficiency import EfficiencySettings
from voxray.config.evaluate import EvaluateSettings
from voxray.config.parse import Settings, flag_names, parse
from voxray.config.salmonn import SalmonnSettings

# The keys and values of the evaluators' salmonn_eval_config.yaml, with other paths.
EVALUATOR: dict[str, Any] = {
    "project_name": "Salmonn",
    "model": {
        **{"liger_kernel": True, "llama_path": "llm", "whisper_path": "whisper", "beats_path": "beats.pt"},
        **{"token": "hf_secret", "only_preprocessor": False, "ckpt": "salmonn_v1.pth", "freeze_whisper": True},
        **{"freeze_beats": True, "use_speech_Qformer": True, "freeze_speech_QFormer": False, "lora": True},
        **{"window_level_Qformer": True, "num_speech_query_token": 1, "second_per_window": 0.333333},
        **{"second_stride": 0.333333, "speech_llama_proj_model": "", "freeze_speech_llama_proj": False},
        **{"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.1, "multi_prompt": True, "max_txt_len": 300},
        **{"prompt_template": "USER: {}\nASSISTANT:", "prompt_path": "train_prompt.json"},
        **{"test_prompt_path": "test_prompt.json", "end_sym": "<|end_of_text|>"},
    },
    "generate": {
        **{"max_new_tokens": 100, "num_beams": 3, "do_sample": True, "min_length": 1, "temperature": 1.0},
        **{"top_p": 0.9, "repetition_penalty": 1.0, "length_penalty": 1.0, "end_sym": "<|end_of_text|>"},
    },
    "datasets": {
        **{"prefix": "sounds", "test_ann_path_asr": "asr.json", "test_ann_path_aac": "aac.json"},
        **{"whisper_path": "whisper", "valid_ann_path": "valid.json"},
    },
    "run": {
        **{"seed": 42, "batch_size_eval": 3, "num_workers": 1, "device": "cuda", "world-size": 2},
        **{"dist_url": "env://", "distributed": True, "tensorrt": True, "optimization_level": 3},
        **{"tensorrt_device": "cuda:1"},
    },
}
READERS = {
    SalmonnSettings: salmonn_yaml.TRAINER,
    EvaluateSettings: salmonn_yaml.EVALUATOR,
    EfficiencySettings: salmonn_yaml.EFFICIENCY,
    CompileSettings: salmonn_yaml.COMPILER,
}
Read = Callable[..., Any]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """A job's settings from a file and flags; ``changes`` are {"section.key": value}."""
    monkeypatch.chdir(tmp_path)

    def read(model: type[Settings], *flags: str, changes: dict[str, Any] | None = None) -> Any:
        content = copy.deepcopy(EVALUATOR)
        for name, value in (changes or {}).items():
            section, _, key = name.partition(".")
            content[section][key] = value
        Path("eval.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return parse(model, ["--cfg-path", "eval.yaml", *flags], job="a_job", about="", demo="demo.yaml")

    return read


@pytest.mark.parametrize("model", READERS)
def test_every_key_is_of_one_kind_and_flags_exist(model: type[Settings]) -> None:
    reader = READERS[model]
    kinds = [set(reader.flags), set(reader.no_effect), set(reader.only)]
    assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2] or kinds[1] & kinds[2])
    assert set(reader.flags.values()) <= set(flag_names(model))
    assert set(reader.flags) | set(reader.no_effect) | set(reader.only) >= {"model.beats_path", "run.seed"}


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        (["--mode", "submission_asr"], ["asr.json"]),
        (["--mode=submission_aac"], ["aac.json"]),
        (["--mode", "valid_aac"], ["valid.json"]),
        ([], ["asr.json", "aac.json"]),
        (["--mode", "submission_asr", "--val_jsonl", "mine.json"], ["mine.json"]),
    ],
)
def test_evaluate_reads_the_evaluators_file(
    read: Read, flags: list[str], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read(EvaluateSettings, *flags)
    assert [Path(path).name for path in settings.val_jsonl] == files
    assert (settings.whisper_path, settings.llama_path, settings.lora_dir) == ("whisper", "llm", "salmonn_v1.pth")
    assert settings.beats_path == str(tmp_path / "beats.pt") and settings.prompts == str(tmp_path / "test_prompt.json")
    assert (settings.num_beams, settings.gen_max_new_tokens, settings.per_device_bsz) == (3, 100, 3)
    assert (settings.end_sym, settings.seed, settings.temperature) == ("<|end_of_text|>", 42, 0)
    assert settings.audio_prefix == str(tmp_path / "sounds")
    stderr = capsys.readouterr().err
    assert "hf_secret" not in stderr and "model.token has no effect: no token is read from a file" in stderr
    assert "generate.do_sample, generate.temperature, generate.top_p have no effect: nothing is drawn" in stderr
    assert "run.tensorrt, run.optimization_level, run.tensorrt_device have no effect" in stderr


def test_flags_win_and_one_beam_draws(read: Read) -> None:
    settings = read(EvaluateSettings, "--end_sym", "</s>", "--batch_size", "7", changes={"generate.num_beams": 1})
    assert (settings.end_sym, settings.per_device_bsz) == ("</s>", 7)
    assert (settings.num_beams, settings.temperature, settings.top_p) == (1, 1.0, 0.9)


def test_one_file_of_rows_is_for_every_mode(read: Read) -> None:
    changes = {"datasets.test_ann_path": "rows.json", "datasets.valid_ann_path": ""}
    for mode in ("submission_asr", "valid_aac"):
        settings = read(EvaluateSettings, "--mode", mode, changes=changes)
        assert [Path(path).name for path in settings.val_jsonl] == ["rows.json"]


def test_all_that_is_wrong_is_said_at_once(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"generate.length_penalty": 0.5, "model.lora": False, "model.lore": 1, "generate.end_sym": "</s>"}
    wrong |= {"model.Ced_path": "ced.pt", "generate.num_beams": 0, "model.token": "hf_secret"}
    with pytest.raises(SystemExit) as end:
        read(EvaluateSettings, "--mode", "submission_xyz", changes=wrong)
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and "hf_secret" not in stderr
    for line in (
        "eval.yaml: generate.length_penalty: must be 1.0, as this job evaluates SALMONN (got 0.5)",
        "eval.yaml: model.lora: must be True",
        "eval.yaml: model.lore: unknown key",
        "eval.yaml: generate.end_sym: is '</s>', and another key of the same meaning '<|end_of_text|>'",
        "eval.yaml: model.Ced_path: must be ''",
        "eval.yaml: num_beams: Input should be greater than or equal to 1",
        "--mode: must be submission_ or valid_",
    ):
        assert f"error: {line}" in stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--whisper_path", "w"], "--whisper_path: needs --beats_path, --llama_path as well"),
        (["--prompts", "p"], "--prompts: needs --whisper_path, --beats_path, --llama_path as well"),
        (
            ["--model_id", "m", "--whisper_path", "w", "--beats_path", "b", "--llama_path", "l"],
            "--model_id and --whisper_path: give the folder, or its parts",
        ),
    ],
)
def test_parts_are_all_or_none(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    for model, more in ((EvaluateSettings, ["--val_jsonl", "x"]), (EfficiencySettings, []), (CompileSettings, [])):
        if model is CompileSettings and "--prompts" in flags:
            continue
        with pytest.raises(SystemExit):
            parse(model, [*flags, *more], job="a_job", about="", demo="demo.yaml")
        assert f"error: {line}" in capsys.readouterr().err


def test_efficiency_and_compile_read_it_too(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    settings = read(EfficiencySettings, "--num_it", "100", "--num_warmup", "10")
    assert (settings.batch_sizes, settings.seed, settings.repeats, settings.warmup) == ((3,), 42, 100, 10)
    assert (settings.llama_path, settings.lora_dir) == ("llm", "salmonn_v1.pth")
    assert "datasets.test_ann_path_aac" in capsys.readouterr().err
    compiled = read(CompileSettings)
    assert (compiled.windows, compiled.optimization_level, compiled.lora_dir) == ((3,), 3, "salmonn_v1.pth")
    assert "warning: --tensorrt_device has no effect" in capsys.readouterr().err


def test_a_file_of_flags_stays_one(tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text("val_jsonl: x.jsonl\nbatch_size_eval: 2\nckpt: runs/a\n")
    argv = ["--config", str(tmp_path / "flat.yaml")]
    settings = parse(EvaluateSettings, argv, job="a_job", about="", demo="demo.yaml")
    assert (settings.per_device_bsz, settings.lora_dir) == (2, "runs/a")
