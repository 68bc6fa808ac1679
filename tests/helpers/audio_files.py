"""Audio files in memory, of a sound that every codec preserves."""

import io

import av
import numpy as np
import soundfile


def sound(rate_hz: int, seconds: float = 1.0) -> np.ndarray:
    """A chord with fade-in and fade-out that every codec preserves, float32."""
    time = np.arange(round(rate_hz * seconds)) / rate_hz
    chord = sum(np.sin(2 * np.pi * hz * time) for hz in (220, 440, 1000)) / 3
    return (0.5 * chord * np.hanning(len(time))).astype(np.float32)


def by_soundfile(samples: np.ndarray, rate_hz: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


def by_ffmpeg(
    samples: np.ndarray,
    rate_hz: int,
    container: str,
    codec: str,
    codec_options: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """Write a file with the options of FFmpeg's container, and those of its codec."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate_hz, options=codec_options)
        stream.layout = "stereo" if samples.ndim == 2 else "mono"
        planes = np.atleast_2d(samples.T)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=stream.layout.name)
        frame.sample_rate, frame.pts = rate_hz, 0
        for part in (frame, None):
            output.mux(stream.encode(part))
    return file.getvalue()
