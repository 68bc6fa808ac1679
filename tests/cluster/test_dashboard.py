"""cluster/grafana.json: a valid dashboard of metrics that voxray and Ray publish."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from helpers.training import train as train_here
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.recipes.training_data import TrainingData
from voxray.training.callbacks import Callbacks

BOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana.json").read_text(encoding="utf-8"))


def expressions() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_runs_publish_every_metric_of_the_panels(
    one_thread: None, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    """The run is resumed, and validates on transcripts and answers."""
    published = set[str]()
    callbacks = Callbacks(publish=lambda name, task, value: published.add(f"ray_voxray_{name}"))
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(tmp_path)}
    values |= {"eval_max_rows": 1, "eval_max_new_tokens": 2}
    data = TrainingData(make_features(small["tqa.train"]), make_features(small["asr.val"], small["tqa.val"]))
    for steps in (1, 2):
        settings = MultitaskSettings.model_validate({**values, "max_steps": steps})
        train_here(settings, tmp_path, data, Worker(), callbacks)
    names = {name for text in expressions() for name in metric_names(text) if name.startswith("ray_voxray_")}
    assert names and names <= published, f"no run publishes {sorted(names - published)}"


def test_other_metrics_are_published_by_ray() -> None:
    names = {name.removeprefix("ray_") for text in expressions() for name in metric_names(text)}
    of_ray = {name for name in names if not name.startswith("voxray_")}
    assert of_ray and of_ray <= set(METRICS_GAUGES)


def test_panels_do_not_overlap() -> None:
    positions = [panel["gridPos"] for panel in BOARD["panels"]]
    assert len({(position["x"], position["y"]) for position in positions}) == len(positions)
    assert all(position["x"] + position["w"] <= 24 for position in positions)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(positions)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([BOARD["panels"], BOARD["templating"]]))) - {"__all"}
    assert used <= {variable["name"] for variable in BOARD["templating"]["list"]}


@pytest.mark.parametrize("name", ["ray_voxray_nothing", "ray_nothing"])
def test_an_unknown_metric_is_detected(name: str) -> None:
    assert metric_names(f'sum({name}{{run=~"$run"}})') == {name} and name.removeprefix("ray_") not in METRICS_GAUGES
