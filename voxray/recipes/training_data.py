"""From a training job's manifests to the feature sets that it trains on and validates with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.config.train import TrainSettings
from voxray.core.console import console
from voxray.core.storage import AnyPath
from voxray.features.from_settings import make_features, open_features_dir
from voxray.features.split_long_rows import write_parts
from voxray.models.registry import get_family
from voxray.runs.remote_sync import RemoteSync


@dataclass(frozen=True)
class TrainingData:
    """Feature sets of a run.

    Attributes:
        divided: Sources of rows that are too long to train on and stand again, in parts, in another set.
    """

    train: tuple[AnyPath, ...]
    validation: tuple[AnyPath, ...]
    divided: frozenset[str] = frozenset()


def training_data(settings: TrainSettings, run_dir: Path, *, use_ray: bool) -> TrainingData:
    """Bring the feature sets of a training job up to date."""
    where = settings.features_dir or RemoteSync.from_settings(settings).features_url or str(run_dir / "features")
    features_dir = open_features_dir(settings, where, settings.storage_path, flag="--features_dir")
    train, validation = (tuple(dict.fromkeys(names)) for names in (settings.train_jsonl, settings.val_jsonl))
    how: dict[str, Any] = {"bf16": settings.bf16, "use_ray": use_ray}
    made = make_features(settings, settings.model_id, train, features_dir, plain_manifests=validation, **how)
    data = TrainingData(made.folders[: len(train)], made.folders[len(train) :])
    front_end = get_family(settings.model_id).front_end(settings.model_id)
    paths = [run_dir / f"divided.{part}.jsonl" for part in ("train", "validation")]
    divided = [
        write_parts(sets, front_end, path) for sets, path in zip((data.train, data.validation), paths, strict=True)
    ]
    parts, plain = ([str(path)] if found else [] for path, found in zip(paths, divided, strict=True))
    if not (parts or plain):
        return data
    console.print(f"{len(divided[0] | divided[1])} row(s) too long for the model, divided at their segments")
    made = make_features(settings, settings.model_id, parts, features_dir, plain_manifests=plain, **how)
    train_sets, plain_sets = made.folders[: len(parts)], made.folders[len(parts) :]
    return TrainingData((*data.train, *train_sets), (*data.validation, *plain_sets), divided[0] | divided[1])
