"""Hashes and keys by which prepare and audit detect duplicates, leaks and rows of the same speaker."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from voxray.audio.decode import to_pcm16
from voxray.core.tasks import Task
from voxray.text.normalize import normalize_ko_v1


def short_hash(value: str | bytes) -> str:
    """The first 128 bits of SHA-256, as 32 hex digits."""
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:32]


def audio_hash(samples: np.ndarray, rate_hz: int) -> str:
    """Hash of decoded samples as 16-bit integers, so that a WAV file and its FLAC copy have the same hash.

    Args:
        samples: float32, shape (num_samples,), full scale 1.
        rate_hz: Their rate: the same samples at another rate are another sound.
    """
    return short_hash(f"{rate_hz}:".encode() + to_pcm16(samples).tobytes())


def row_text(prompt: str, answer: str) -> str:
    """Normalised prompt and answer of a row."""
    return normalize_ko_v1(f"{prompt}\n{answer}")


def leak_text(task: Task, text: str) -> str:
    """Hash of a row's normalised texts, which leak if another split has the same hash. "" if texts cannot leak.

    Many clips may share one question and answer, or the empty transcript of silence. For these rows only the audio can
    leak.
    """
    if task.has_audio and (task.asks or not text):
        return ""
    return short_hash(task.name + text)


def duplicate_key(task: Task, audio: str, text: str) -> str:
    """Key that is equal for duplicate rows.

    Args:
        audio, text: Hashes of the decoded samples ("" without audio), and of the task and its texts.
    """
    if not audio:
        return text
    # One clip may have many questions.
    return f"{task.name}:{audio}{text if task.asks else ''}"


def speaker_key(row: Mapping[str, Any]) -> str:
    """``speaker:<name>``, else ``session:<name>``, else ""."""
    return next((f"{key}:{row[key]}" for key in ("speaker", "session") if row.get(key)), "")
