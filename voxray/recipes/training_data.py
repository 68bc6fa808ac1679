"""Computes the feature sets of a training run from its manifests."""

from dataclasses import dataclass
from typing import Any

from voxray.core.console import console
from voxray.core.storage import AnyPath
from voxray.features.from_settings import make_features, open_features_dir
from voxray.features.split_long_rows import write_parts
from voxray.recipes.run_context import RunContext


@dataclass(frozen=True)
class TrainingData:
    """Feature sets of a run.

    Attributes:
        divided: Sources of rows that are too long to train on. Their parts are rows of an additional set.
        replay: Sets of ``--replay_jsonl``.
    """

    train: tuple[AnyPath, ...]
    validation: tuple[AnyPath, ...]
    divided: frozenset[str] = frozenset()
    replay: tuple[AnyPath, ...] = ()

    @property
    def folders(self) -> tuple[AnyPath, ...]:
        """All sets."""
        return (*self.train, *self.replay, *self.validation)


def training_data(run: RunContext, *, use_ray: bool) -> TrainingData:
    """Compute the feature sets of a run, or update existing ones."""
    settings = run.settings
    folder = settings.features_dir or run.remote.features_url or str(run.run_dir / "features")
    features_dir = open_features_dir(settings, folder, settings.storage_path, flag="--features_dir")
    named = (settings.train_jsonl, settings.replay_jsonl, settings.val_jsonl)
    train, replay, validation = (tuple(dict.fromkeys(names)) for names in named)
    options: dict[str, Any] = {"bf16": settings.bf16, "use_ray": use_ray}
    plain_manifests = (*replay, *validation)
    report = make_features(settings, settings.model_id, train, features_dir, plain_manifests=plain_manifests, **options)
    first, last = len(train), len(train) + len(replay)
    data = TrainingData(report.folders[:first], report.folders[last:], replay=report.folders[first:last])
    paths = [run.run_dir / f"divided.{part}.jsonl" for part in ("train", "validation")]
    divided = [
        write_parts(sets, run.front_end, path) for sets, path in zip((data.train, data.validation), paths, strict=True)
    ]
    parts, plain = ([str(path)] if sources else [] for path, sources in zip(paths, divided, strict=True))
    if not (parts or plain):
        return data
    console.print(f"{len(divided[0] | divided[1])} row(s) too long for the model, divided at their segments")
    report = make_features(settings, settings.model_id, parts, features_dir, plain_manifests=plain, **options)
    train_sets, plain_sets = report.folders[: len(parts)], report.folders[len(parts) :]
    sources = divided[0] | divided[1]
    return TrainingData((*data.train, *train_sets), (*data.validation, *plain_sets), sources, data.replay)
