"""Strange values for every setting of every job: accepted, or refused in clear lines with exit status 2."""

import random
from pathlib import Path

import pytest
import yaml
from helpers.mutate import STRANGE, strange_value
from helpers.running import JOBS, load_job, parse_only

from voxray.config.parse import Settings


def settings_class(job: str) -> type[Settings] | None:
    module = load_job(job)
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Settings)]
    return classes[0] if classes else None


def try_yaml(job: str, values: dict[str, object], path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(yaml.safe_dump(values, allow_unicode=False), encoding="utf-8")
    try:
        parse_only(job, ["--config", str(path)])
    except SystemExit as end:
        assert end.code == 2, values
    output = capsys.readouterr().err
    assert "Traceback" not in output and all(len(line) < 1100 for line in output.splitlines()), values


@pytest.mark.parametrize("job", JOBS)
def test_strange_values_in_yaml(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = settings_class(job)
    names = list(model.model_fields) if model else []
    chooser = random.Random(job)
    for name in names:
        for value in chooser.sample(STRANGE, 5):
            try_yaml(job, {name: value}, tmp_path / "s.yaml", capsys)
    for _ in range(40 if names else 0):
        chosen = {name: strange_value(chooser) for name in chooser.sample(names, min(3, len(names)))}
        try_yaml(job, chosen, tmp_path / "s.yaml", capsys)


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in settings_class("train_whisper").model_fields:  # type: ignore[union-attr]
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump({name: ["\ud800"] if name == "report_to" else "\ud800"}, allow_unicode=False))
        with pytest.raises(SystemExit) as end:
            parse_only("train_whisper", ["--config", str(path)])
        assert end.value.code == 2
        assert f"s.yaml: {name}: holds half of a surrogate pair" in capsys.readouterr().err, name
