"""Faults in the samples of a clip: clipping, silence, DC offset, zeros at the end, upsampling from a lower rate."""

from dataclasses import dataclass

import numpy as np

from voxray.core.errors import BadRow

FULL_SCALE = 0.999  # |x| from here on counts as clipped
SILENT_DB = -160.0  # level of a clip of zeros
HIGH_BAND_HZ = 4_200  # just above the highest frequency of a recording at 8 kHz
SPECTRUM_SAMPLES = 1_024


@dataclass(frozen=True)
class Quality:
    """Measurements of a clip.

    Attributes:
        duration_sec: Length.
        peak_db: Largest magnitude, dB of full scale.
        rms_db: Root mean square, dB of full scale.
        clip_share: Share of samples at full scale.
        dc: Magnitude of the mean.
        zero_tail_sec: Length of the run of exact zeros at the end.
        high_band_db: Power above 4.2 kHz relative to all power, dB; 0 if the sample rate is too low for that band.
    """

    duration_sec: float
    peak_db: float
    rms_db: float
    clip_share: float
    dc: float
    zero_tail_sec: float
    high_band_db: float


@dataclass(frozen=True)
class QualityLimits:
    """Limits of ``Quality``. Infinity turns a limit off."""

    min_sec: float = 0.0
    max_sec: float = float("inf")
    min_peak_db: float = -float("inf")
    min_rms_db: float = -float("inf")
    max_clip_share: float = float("inf")
    max_dc: float = float("inf")
    max_zero_tail_sec: float = float("inf")
    min_high_band_db: float = -float("inf")


def measure(samples: np.ndarray, rate_hz: int) -> Quality:
    """Measure one clip.

    Args:
        samples: float32, shape (num_samples,), at least one.
    """
    magnitude = np.abs(samples)
    nonzero = np.flatnonzero(magnitude)
    tail = len(samples) - (nonzero[-1] + 1 if len(nonzero) else 0)
    return Quality(
        duration_sec=len(samples) / rate_hz,
        peak_db=_db(float(magnitude.max())),
        rms_db=_db(float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))),
        clip_share=float(np.mean(magnitude >= FULL_SCALE)),
        dc=abs(float(np.mean(samples, dtype=np.float64))),
        zero_tail_sec=tail / rate_hz,
        high_band_db=_high_band_db(samples, rate_hz),
    )


def _db(value: float) -> float:
    return max(SILENT_DB, 20 * float(np.log10(value))) if value > 0 else SILENT_DB


def _high_band_db(samples: np.ndarray, rate_hz: int) -> float:
    if rate_hz < 2 * HIGH_BAND_HZ or len(samples) < SPECTRUM_SAMPLES:
        return 0.0
    frames = samples[: len(samples) // SPECTRUM_SAMPLES * SPECTRUM_SAMPLES].reshape(-1, SPECTRUM_SAMPLES)
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(SPECTRUM_SAMPLES)))).sum(axis=0)
    high = power[int(HIGH_BAND_HZ / rate_hz * SPECTRUM_SAMPLES) :].sum()
    return _db(float(np.sqrt(high / power.sum()))) if power.sum() > 0 else 0.0


def faults(quality: Quality, limits: QualityLimits) -> list[tuple[str, str]]:
    """All faults of a clip, worst first.

    Returns:
        (reason, message) of each. The reason is too_short, too_long, too_quiet, near_silence, clipping, dc_offset,
        zero_tail or narrow_band; the message has the value.
    """
    q, lim = quality, limits
    checks = (
        (q.duration_sec < lim.min_sec, "too_short", f"{q.duration_sec:.2f} s, under {lim.min_sec:g} s"),
        (q.duration_sec > lim.max_sec, "too_long", f"{q.duration_sec:.2f} s, over {lim.max_sec:g} s"),
        (q.peak_db < lim.min_peak_db, "too_quiet", f"peak {q.peak_db:.1f} dB, under {lim.min_peak_db:g} dB"),
        (q.rms_db < lim.min_rms_db, "near_silence", f"rms {q.rms_db:.1f} dB, under {lim.min_rms_db:g} dB"),
        (q.clip_share > lim.max_clip_share, "clipping", f"{q.clip_share:.3%} of the samples at full scale"),
        (q.dc > lim.max_dc, "dc_offset", f"mean {q.dc:.3f}, over {lim.max_dc:g}"),
        (q.zero_tail_sec > lim.max_zero_tail_sec, "zero_tail", f"the last {q.zero_tail_sec:.2f} s are zeros"),
        (
            q.high_band_db < lim.min_high_band_db,
            "narrow_band",
            f"nothing above {HIGH_BAND_HZ} Hz ({q.high_band_db:.0f} dB): recorded at a lower rate than it says",
        ),
    )
    return [(reason, message) for failed, reason, message in checks if failed]


def check(quality: Quality, limits: QualityLimits) -> None:
    """Refuse a clip outside the limits.

    Raises:
        BadRow: The first of ``faults``.
    """
    for reason, message in faults(quality, limits):
        raise BadRow(reason, message)
