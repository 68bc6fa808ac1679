"""``--help``: groups, 80 columns, common flags; ``--help-all``: every flag with its text."""

import pytest
from helpers.running import JOBS, load_job

from voxray.config.compare import CompareSettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.featurize import FeaturizeSettings
from voxray.config.flags import flag_metadata
from voxray.config.help import COMMON, FIELDS, GROUPS, help_text
from voxray.config.parse import Settings, parse
from voxray.config.prepare import PrepareSettings
from voxray.config.quickstart import QuickstartSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, WhisperSettings
from voxray.config.tune import TuneMultitaskSettings

CLASSES = [
    (TextSettings, "demo_train_text.yaml"),
    (AsrAdapterSettings, "demo_train_asr_adapter.yaml"),
    (MultitaskSettings, "demo.yaml"),
    (WhisperSettings, "demo_train_whisper.yaml"),
    (PrepareSettings, "demo_prepare.yaml"),
    (EvaluateSettings, "demo_evaluate.yaml"),
    (InferSettings, "demo_infer.yaml"),
    (FeaturizeSettings, "demo_featurize.yaml"),
    (TuneMultitaskSettings, "demo_tune.yaml"),
    (QuickstartSettings, "quickstart.yaml"),
    (CompareSettings, "demo_compare.yaml"),
]


def show(argv: list[str], model: type[Settings], demo: str) -> Settings:
    return parse(model, argv, job="a_job", about="About it.", demo=demo)


def test_positional_arguments_are_in_the_usage() -> None:
    text = help_text(CompareSettings, job="compare", about="", demo="", positional="runs")
    assert "compare.py [RUNS ...] [--config" in text


@pytest.mark.parametrize("job", JOBS)
def test_the_examples_of_a_script_fit_80_columns(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_job(job).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code in (0, None) and all(len(line) <= 80 or "|" in line for line in lines)


@pytest.mark.parametrize(("model", "demo"), CLASSES)
def test_help_lists_every_field_with_its_text(model, demo: str, capsys: pytest.CaptureFixture[str]):
    for spelling in ("--help-all", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            show([spelling, "--no-such-flag"], model, demo)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert demo in shown and "About it." in shown
    for name, field in model.model_fields.items():
        assert f"  --{name} " in shown
        assert field.description, f"{name} has no docstring"
        assert " ".join(field.description.split()) in words
        for alias in flag_metadata(field).aliases:
            assert f"--{alias}" in words


def test_help_shows_types_and_defaults():
    text = help_text(MultitaskSettings, job="train_multitask", about="", demo="demo.yaml", everything=True)
    assert "--lr_schedule cosine|linear|constant  (default cosine)" in text
    assert "--num_workers auto|N|TEXT  (default auto)" in text
    assert "--train_jsonl TEXT,...  (required)" in text
    assert "--pin_memory / --no_pin_memory  (default True)" in text


@pytest.mark.parametrize(("model", "demo"), CLASSES)
@pytest.mark.parametrize("spelling", ["--help", "-h"])
def test_help_shows_the_common_flags_in_80_columns(model, demo: str, spelling: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        show([spelling], model, demo)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) < 200
    assert all(len(line) <= 80 or "|" in line for line in lines), "only lists of choices may be longer"
    text = "\n".join(lines)
    for name, field in model.model_fields.items():
        if field.is_required():
            assert text.index("required:") < text.index(f"--{name} ") and "(required)" in text


def test_the_groups_name_what_exists() -> None:
    fields = {name for model, _ in CLASSES for name in model.model_fields}
    fields |= {name for job in JOBS for model in job_settings(job) for name in model.model_fields}
    named = {*COMMON.split(), *" ".join(FIELDS.values()).split()}
    assert not named - fields
    classes = {parent.__name__.removesuffix("Flags") for job in JOBS for m in job_settings(job) for parent in m.__mro__}
    assert not {name for names in GROUPS.values() for name in names} - classes


def job_settings(job: str) -> list[type[Settings]]:
    values = vars(load_job(job)).values()
    return [value for value in values if isinstance(value, type) and issubclass(value, Settings)]
