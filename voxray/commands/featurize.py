"""The featurize job: computes feature shards of manifests."""

from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.config.featurize import FeaturizeSettings
from voxray.core.console import console
from voxray.core.manifest import require_usable_row
from voxray.features.featurize import FeaturizeReport, write_ledger
from voxray.features.from_settings import log_folder, make_features, open_features_dir
from voxray.models.parts.arithmetic import with_default_dtype


def run_featurize_job(settings: FeaturizeSettings) -> FeaturizeReport:
    """Compute the feature shards of the manifests.

    Raises:
        RunError, SettingsError: The user has to fix an input or a setting.
    """
    require_usable_row(settings.manifest)
    if settings.store == "encoder":
        settings = with_default_dtype(settings, settings.model_id, on_ray=True)
    output_dir = open_features_dir(settings, settings.output_dir, settings.storage_path, flag="--output_dir")
    with ray_session(log_folder(output_dir) / "ray.log", max(MIN_ACTORS, settings.num_actors)):
        report = make_features(settings, settings.model_id, settings.manifest, output_dir, bf16=settings.bf16)
    write_ledger(output_dir / "quarantine.jsonl", report.folders)
    console.print(f"features of {len(report.folders)} manifest(s) in {output_dir}")
    return report
