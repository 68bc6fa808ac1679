"""cluster/grafana.json: a dashboard that Grafana takes, of figures that voxray and Ray publish."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.recipes import multitask
from voxray.training.callbacks import Callbacks

BOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana.json").read_text(encoding="utf-8"))


def expressions() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_every_panel_shows_what_a_run_publishes(
    one_thread: None, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    """By a run that is resumed and validates on transcripts and answers."""
    published = set[str]()
    host = Callbacks(publish=lambda name, task, value: published.add(f"ray_voxray_{name}"))
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(tmp_path)}
    values |= {"eval_max_rows": 1, "eval_max_new_tokens": 2}
    data = multitask.TrainingData(make_features(small["tqa.train"]), make_features(small["asr.val"], small["tqa.val"]))
    for steps in (1, 2):
        settings = MultitaskSettings.model_validate({**values, "max_steps": steps})
        multitask.train(settings, tmp_path, data, Worker(), host)
    ours = {name for expression in expressions() for name in metrics(expression) if name.startswith("ray_voxray_")}
    assert ours and ours <= published, f"nobody publishes {sorted(ours - published)}"


def test_other_figures_are_rays() -> None:
    found = {name.removeprefix("ray_") for text in expressions() for name in metrics(text)}
    rays = {name for name in found if not name.startswith("voxray_")}
    assert rays and rays <= set(METRICS_GAUGES)


def test_panels_lie_side_by_side() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
    asked = set(re.findall(r"\$\{?(\w+)", json.dumps([BOARD["panels"], BOARD["templating"]]))) - {"__all"}
    assert asked <= {variable["name"] for variable in BOARD["templating"]["list"]}


@pytest.mark.parametrize("name", ["ray_voxray_nothing", "ray_nothing"])
def test_a_figure_that_nobody_has_would_be_seen(name: str) -> None:
    assert metrics(f'sum({name}{{run=~"$run"}})') == {name} and name.removeprefix("ray_") not in METRICS_GAUGES
