"""From a job's settings to feature sets that are up to date."""

import os
from collections.abc import Sequence
from pathlib import Path

from voxray.audio.augment import NONE, WaveformAugmentation, list_audio
from voxray.config.featurize import FeaturizeSettings
from voxray.config.flag_groups import FeatureFlags, TrimFlags, VariantFlags
from voxray.core.console import console, progress_bar
from voxray.core.errors import SettingsError
from voxray.core.storage import AnyPath, CacheLimits, RemotePath, num_bytes, refuse_unwritable, remote_path
from voxray.core.units import GIB
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import FeaturizeReport, featurize
from voxray.runs.run_folder import make_folder, output_url, resolve_output_dir

FLAG_OF = {
    "num_variants": "variants",
    "noise_snr_db": "noise_snr",
    "noise_paths": "noise_dir",
    "room_paths": "room_dir",
}
"""What users call the fields of ``WaveformAugmentation``, where the names differ."""


def open_features_dir(settings: FeatureFlags, path: str, storage_path: str, *, flag: str) -> AnyPath:
    """The folder of a job's feature sets, made ready to be written to.

    Args:
        path: A folder or a URL.
    Raises:
        SettingsError, RunError: It cannot be placed or written to; the message names the flag.
    """
    path = output_url(path, storage_path) or path
    if "://" not in path:
        folder = resolve_output_dir(path, storage_path, flag=flag)
        make_folder(folder, flag)
        return folder
    if "://" in settings.features_cache_dir:
        raise SettingsError(f"--features_cache_dir {settings.features_cache_dir}: must be a folder of this machine")
    cache = Path(os.path.expanduser(settings.features_cache_dir)).absolute()
    place = remote_path(path, flag, CacheLimits(str(cache), int(settings.features_cache_gib * GIB)))
    refuse_unwritable(place, flag)
    return place


def feature_spec(settings: FeatureFlags, *, bf16: bool) -> FeatureSpec:
    """What the settings ask to be stored.

    Raises:
        SettingsError: The variants asked for cannot be had; the message names the flag.
        RunError: A folder of noises or rooms is missing or holds no audio.
    """
    waveform = NONE
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
            for name, flag in FLAG_OF.items():
                message = message.replace(name, f"--{flag}")
            raise SettingsError(f"--variants {settings.variants}: {message}") from None
    elif isinstance(settings, VariantFlags):
        given = sorted(settings.model_fields_set & set(VariantFlags.model_fields) - {"variants"})
        if given:
            console.print(f"warning: --{given[0]} has no effect without --variants", markup=False)
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
    """Featurize with a progress bar and a line about what came of it.

    Args:
        manifests: Those whose clips get the variants that the settings ask for.
        plain_manifests: Those whose clips get none.
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
            on_estimate=lambda wanted: bar.say(f"encoder outputs will take {wanted / GIB:.3g} GiB at most"),
            on_progress=bar.update,
        )
    new = f", {report.num_made} of them made now" if report.num_made else ", all of them there already"
    console.print(f"features: {report.num_rows + report.num_bad} rows{new}, by {report.num_processes} process(es)")
    if report.num_bad:
        ledgers = [folder / "quarantine.jsonl" for folder in dict.fromkeys(report.folders)]
        shown = ", ".join(str(ledger) for ledger in ledgers if num_bytes(ledger))
        console.print(f"features: {report.num_bad} bad row(s) left out, listed in {shown}", markup=False)
    return report


def log_folder(place: AnyPath) -> Path:
    """A local folder for Ray's log: the place itself, or the cache of a remote one."""
    folder = Path(place.cache.folder) if isinstance(place, RemotePath) else place
    folder.mkdir(parents=True, exist_ok=True)
    return folder
