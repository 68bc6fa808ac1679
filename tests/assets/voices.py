"""Synthetic speakers: espeak-ng voices, one process per utterance.

Each utterance has a new process, because espeak's second call in a process is not bit-identical to its first. Silence
at both ends is cut off, and the samples are resampled to 16 kHz.
"""

from __future__ import annotations

import io
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

SAMPLE_RATE_HZ = 16_000
MAX_SEC = 3.8
SILENCE = 0.01  # of full scale; espeak's speech peaks at 0.6 or more

# The base is trained on English voices and Korean men's voices. The adaptation set has Korean women's voices.
BASE_VOICES = {"ko": ["ko", "ko+m1", "ko+m3", "ko+m4", "ko+m7"], "en": ["en-us", "en-gb", "en-us+m2", "en-gb+m5"]}
ADAPTATION_VOICES = {"ko": ["ko+f1", "ko+f2", "ko+f3", "ko+f4"]}
BASE_PITCH, ADAPTATION_PITCH = (30, 60), (50, 80)
BASE_SPEED, ADAPTATION_SPEED = (145, 195), (150, 190)


@dataclass(frozen=True)
class Speaker:
    """An espeak voice with its speed (words per minute) and pitch (0 to 99)."""

    voice: str
    speed: int
    pitch: int


def draw_speaker(rng: random.Random, language: str, adaptation: bool) -> Speaker:
    """Draw a speaker of the adaptation set or of the base's own voices."""
    voices = ADAPTATION_VOICES if adaptation else BASE_VOICES
    speed = ADAPTATION_SPEED if adaptation else BASE_SPEED
    pitch = ADAPTATION_PITCH if adaptation else BASE_PITCH
    return Speaker(rng.choice(voices[language]), rng.randint(*speed), rng.randint(*pitch))


def speak(text: str, speaker: Speaker) -> np.ndarray:
    """Synthesise a text: float32 mono at 16 kHz, with silence at the ends cut to 20 and 40 ms."""
    command = ["espeak-ng", "-v", speaker.voice, "-s", str(speaker.speed), "-p", str(speaker.pitch), "--stdout", text]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    # The header was written to a pipe, so its length fields are placeholders. The samples follow its 44 bytes.
    rate = int.from_bytes(wav[24:28], "little")
    samples = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], dtype="<i2").astype(np.float32) / 32768
    samples = soxr.resample(samples, rate, SAMPLE_RATE_HZ, quality="HQ")
    loud = np.flatnonzero(np.abs(samples) > SILENCE)
    return samples[max(0, loud[0] - 320) : loud[-1] + 640]


def speak_all(lines: list[tuple[str, Speaker]]) -> list[np.ndarray]:
    """Synthesise many texts, two at a time; the clips are in the order of the texts."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda line: speak(*line), lines))


def encode(samples: np.ndarray, suffix: str) -> bytes:
    """Encode a clip as Ogg Opus, FLAC or 16-bit WAV, depending on the suffix."""
    formats = {".ogg": ("OGG", "OPUS"), ".flac": ("FLAC", "PCM_16"), ".wav": ("WAV", "PCM_16")}
    container, subtype = formats[suffix]
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE_HZ, format=container, subtype=subtype)
    return buffer.getvalue()
