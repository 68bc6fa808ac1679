"""Settings of jobs/featurize.py."""

from typing import Annotated

from pydantic import Field

from voxray.config.flag_groups import BaseModelFlags, FeatureFlags, OutputFlags, TrimFlags, VariantFlags
from voxray.config.parse import CommaStrings, Flag


class FeaturizeSettings(BaseModelFlags, OutputFlags, FeatureFlags, VariantFlags, TrimFlags):
    manifest: Annotated[CommaStrings, Flag(("input", "train_jsonl"), path="input"), Field(min_length=1)]
    """Manifests (JSONL) to turn into feature shards, comma separated."""
    output_dir: Annotated[str, Flag(("out_dir", "features_dir"), path="output")] = "runs/features"
    """Folder of the feature shards, or its URL; a training job with this --features_dir finds them there."""
    bf16: bool = False
    """Compute the outputs of --store encoder in bfloat16, as a training run with --bf16 does."""
    verify: bool = False
    """Check the checksums of shards that are there already, and make damaged ones again."""
