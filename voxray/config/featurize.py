"""Settings of jobs/featurize.py."""

from typing import Annotated, ClassVar

from pydantic import Field

from voxray.config.flag_groups import (
    BaseModelFlags,
    EncoderPrecisionFlags,
    FeatureFlags,
    OutputFlags,
    TrimFlags,
    VariantFlags,
)
from voxray.config.flags import Flag
from voxray.config.parse import InputFiles
from voxray.config.task_flags import OwnTaskFlags


class FeaturizeSettings(
    BaseModelFlags, EncoderPrecisionFlags, OutputFlags, FeatureFlags, VariantFlags, TrimFlags, OwnTaskFlags
):
    url_flags: ClassVar[tuple[str, ...]] = ("output_dir", "storage_path", "features_dir")
    manifest: Annotated[InputFiles, Flag(("input", "train_jsonl"), path="input"), Field(min_length=1)]
    """Manifests (JSONL) to compute feature shards for, comma separated."""
    output_dir: Annotated[str, Flag(("out_dir", "features_dir"), path="output")] = "runs/features"
    """Folder or URL for the feature shards; pass it to a training job as --features_dir."""
    verify: bool = False
    """Verify the checksums of existing shards and rewrite damaged ones."""
