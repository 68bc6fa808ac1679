"""Brings the feature sets of a job up to date, as its settings require."""

import os
from collections.abc import Sequence
from pathlib import Path

from voxray.audio.augment import NO_AUGMENTATION, WaveformAugmentation, list_audio
from voxray.config.featurize import FeaturizeSettings
from voxray.config.flag_groups import FeatureFlags, TrimFlags, VariantFlags
from voxray.core.console import console, progress_bar
from voxray.core.errors import SettingsError
from voxray.core.storage import AnyPath, CacheLimits, RemotePath, num_bytes, remote_path, require_writable
from voxray.core.units import GIB
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import FeaturizeReport, featurize
from voxray.runs.run_folder import make_folder, output_url, resolve_output_dir

FLAG_NAMES = {
    "num_variants": "variants",
    "noise_snr_db": "noise_snr",
    "noise_paths": "noise_dir",
    "room_paths": "room_dir",
}
"""Flags of the fields of ``WaveformAugmentation``, where the names differ."""


def open_features_dir(settings: FeatureFlags, path: str, storage_path: str, *, flag: str) -> AnyPath:
    """Open the folder of a job's feature sets and make sure that it can be written to.

    Args:
        path: A folder or a URL.
    Raises:
        SettingsError, RunError: It is no usable path, or cannot be written to; the message names the flag.
    """
    path = output_url(path, storage_path) or path
    if "://" not in path:
        folder = resolve_output_dir(path, storage_path, flag=flag)
        make_folder(folder, flag)
        return folder
    if "://" in settings.features_cache_dir:
        raise SettingsError(f"--features_cache_dir {settings.features_cache_dir}: must be a folder of this machine")
    cache = Path(os.path.expanduser(settings.features_cache_dir)).absolute()
    remote_dir = remote_path(path, flag, CacheLimits(str(cache), int(settings.features_cache_gib * GIB)))
    require_writable(remote_dir, flag)
    return remote_dir


def feature_spec(settings: FeatureFlags, *, bf16: bool) -> FeatureSpec:
    """FeatureSpec of a job's settings.

    Raises:
        SettingsError: The settings of variants are invalid; the message names the flag.
        RunError: A folder of noises or rooms is missing or holds no audio.
    """
    waveform = NO_AUGMENTATION
    if isinstance(settings, VariantFlags) and settings.variants > 1:
        if len(settings.noise_snr) == 1:
            raise SettingsError("--noise_snr: needs two numbers, the lowest and the highest level in dB")
        try:
            waveform = WaveformAugmentation(
                num_variants=settings.variants,
                speeds=settings.speeds,
                noise_snr_db=(settings.noise_snr[0], settings.noise_snr[1]) if settings.noise_snr else None,
                noise_paths=list_audio(settings.noise_dir) if settings.noise_dir else (),
                room_paths=list_audio(settings.room_dir) if settings.room_dir else (),
                noise_share=settings.noise_share,
                room_share=settings.room_share,
                seed=settings.variant_seed,
            )
        except ValueError as error:
            message = str(error)
            for name, flag in FLAG_NAMES.items():
                message = message.replace(name, f"--{flag}")
            raise SettingsError(f"--variants {settings.variants}: {message}") from None
    elif isinstance(settings, VariantFlags):
        unused = sorted(settings.model_fields_set & set(VariantFlags.model_fields) - {"variants"})
        if unused:
            console.print(f"warning: --{unused[0]} has no effect without --variants", markup=False)
    trim_audio = isinstance(settings, TrimFlags) and settings.trim_audio_tokens
    return FeatureSpec(settings.store, settings.cache_dtype, bf16, waveform, trim_audio, settings.language)


def make_features(
    settings: FeatureFlags,
    model_id: str,
    manifests: Sequence[str],
    features_dir: AnyPath,
    *,
    bf16: bool,
    plain_manifests: Sequence[str] = (),
    use_ray: bool = True,
) -> FeaturizeReport:
    """Featurize with a progress bar, and print a summary.

    Args:
        manifests: Manifests whose clips get the variants of the settings.
        plain_manifests: Manifests whose clips get no variants.
    """
    extractor = Extractor(model_id, feature_spec(settings, bf16=bf16))
    with progress_bar("features") as bar:
        report = featurize(
            tuple(dict.fromkeys(manifests)),
            extractor,
            features_dir,
            plain_manifests=tuple(dict.fromkeys(plain_manifests)),
            rows_per_shard=settings.rows_per_shard,
            num_actors=settings.num_actors,
            use_ray=use_ray,
            strict=settings.strict,
            verify=isinstance(settings, FeaturizeSettings) and settings.verify,
            max_bytes=settings.cache_budget_gib * GIB,
            on_estimate=lambda total: bar.say(f"encoder outputs will take {total / GIB:.3g} GiB at most"),
            on_progress=bar.update,
        )
    new = f", {report.num_made} of them made now" if report.num_made else ", all of them already stored"
    console.print(f"features: {report.num_rows + report.num_bad} rows{new}, by {report.num_processes} process(es)")
    if report.num_bad:
        ledgers = [folder / "quarantine.jsonl" for folder in dict.fromkeys(report.folders)]
        shown = ", ".join(str(ledger) for ledger in ledgers if num_bytes(ledger))
        console.print(f"features: {report.num_bad} bad row(s) left out, listed in {shown}", markup=False)
    return report


def log_folder(features_dir: AnyPath) -> Path:
    """Local folder for Ray's log: the feature folder itself, or the local cache of a remote one."""
    folder = Path(features_dir.cache.folder) if isinstance(features_dir, RemotePath) else features_dir
    folder.mkdir(parents=True, exist_ok=True)
    return folder
