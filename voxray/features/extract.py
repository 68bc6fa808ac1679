"""Manifest rows -> everything that a shard holds of them."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from voxray.audio.augment import NONE, WaveformAugmentation, augment
from voxray.audio.decode import Part, decode, to_pcm16
from voxray.audio.logmel import HOP_SAMPLES
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, sha256_hex
from voxray.features.shards import LAYOUT
from voxray.models.interface import FrontEnd, ModelFamily
from voxray.models.parts.logmel_windows import padded_windows, window_lengths
from voxray.models.registry import get_family

FeatureValues = dict[str, Any]
"""The columns of one row (see ``shards``)."""
MAX_WHOLE_BYTES = 256 << 20  # a larger file is not read into memory as a whole
ENCODER_WINDOWS = 8  # windows of one forward pass of the encoder


@dataclass(frozen=True)
class FeatureSpec:
    """What is stored of a clip.

    Attributes:
        store: One of ``shards.STORES``.
        dtype: Of stored encoder outputs.
        bf16: Whether the encoder computes in bfloat16, as a training run with --bf16 does.
        waveform: Variants of every clip.
        trim_audio: Leave audio tokens that stand for padding out of prompts; what is stored of the clip is the same.
        language: Two-letter code of the language of rows that name none, "" if it is not known.
    """

    store: Literal["mel", "pcm16", "encoder"] = "mel"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    bf16: bool = False
    waveform: WaveformAugmentation = NONE
    trim_audio: bool = False
    language: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored audio."""
        return {"mel": torch.float16, "pcm16": torch.int16, "encoder": getattr(torch, self.dtype)}[self.store]


class Extractor:
    """Makes rows; picklable, and the encoder, where one is needed, is loaded by whoever uses it first.

    Args:
        model_id: Base model.
        spec: What to store.
    Attributes:
        fingerprint: Hash of everything that decides what is stored of a row.
        plain_fingerprint: The same without variants.
    """

    def __init__(self, model_id: str, storing: FeatureSpec | None = None) -> None:
        self.model_id, self.spec = model_id, storing or FeatureSpec()
        self.front_end: FrontEnd = get_family(model_id).front_end(model_id, trim_audio=self.spec.trim_audio)
        how: list[Any] = [
            LAYOUT,
            self.front_end.fingerprint,
            self.spec.store,
            *filter(None, [self.spec.language]),
        ]
        if self.spec.store == "encoder":
            weights = get_family(model_id).encoder_fingerprint(model_id)
            how += [self.spec.dtype, "bf16" if self.spec.bf16 else "fp32", weights]
        self.plain_fingerprint = hashlib.sha256(json.dumps(how).encode()).hexdigest()
        variants = self.spec.waveform.fingerprint
        both = json.dumps([*how, variants, self.front_end.max_audio_sec])  # a variant never gets longer than that
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest() if variants else self.plain_fingerprint
        self._encoder: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of what is stored of a clip, without its first axis."""
        encoder = (self.front_end.encoder_positions, self.front_end.encoder_dim)
        return {"mel": (self.front_end.num_mel_bins,), "pcm16": (), "encoder": encoder}[self.spec.store]

    def sample_rows(
        self, sample: Sample, *, augmented: bool = True
    ) -> tuple[list[FeatureValues], dict[str, Any] | None]:
        """Everything that a shard holds of one sample, except that ``encoder`` sets hold log-mel until ``encode``.

        Returns:
            A row per variant, and for clips what the file was (path, size, times, hash), to tell later whether it
            changed.
        Raises:
            BadRow: The clip is missing or unusable, or the text cannot be encoded.
        """
        sample = replace(sample, language=sample.language or self.spec.language)
        shared = {"target_ids": self.front_end.target_ids(sample.answer, sample.segments), "task": sample.task.name}
        for name in ("id", "language", "source", "audio_path", "prompt", "answer"):
            shared[name] = getattr(sample, name)
        if not sample.task.has_audio:
            empty = {"num_frames": 0, "fill": 0.0, "num_windows": 0, "num_samples": 0, "variant": 0}
            none = np.empty(0, np.int16 if self.spec.store == "pcm16" else np.float32)
            return [{**shared, **empty, "audio": none, "prompt_ids": self.front_end.prompt_ids(sample, 0)}], None
        samples, clip = self._read(sample)
        waveform, limit = self.spec.waveform, self.front_end.max_audio_sec
        rows, rate_hz, key = [], self.front_end.sample_rate_hz, f"{clip['sha256'] or clip['path']}:{sample.start_sec}"
        for variant in range(waveform.num_variants if augmented else 1):
            heard = augment(samples, rate_hz, variant, key, waveform, max_sec=limit) if variant else samples
            audio = self._pcm(heard) if self.spec.store == "pcm16" else self._mel(heard)
            prompt_ids = self.front_end.prompt_ids(sample, len(heard))
            rows.append({**shared, **audio, "num_samples": len(heard), "variant": variant, "prompt_ids": prompt_ids})
        return rows, clip

    def _read(self, sample: Sample) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode a sample's clip and note what the file was."""
        part = Part(sample.start_sec, sample.duration_sec, sample.channel)
        try:
            clip = file_state(sample.audio_path)
            # A whole file is read once, hashed and decoded from memory; of a segment's file only the segment is read,
            # and of a huge one only what the longest clip needs.
            whole = not (part.start_sec or part.duration_sec) and clip["size"] <= MAX_WHOLE_BYTES
            raw = Path(sample.audio_path).read_bytes() if whole else None
            clip["sha256"] = "" if raw is None else sha256_hex(raw)
            rate_hz, max_sec = self.front_end.sample_rate_hz, self.front_end.max_audio_sec
            return decode(sample.audio_path, rate_hz, raw, part=part, max_sec=max_sec), clip
        except OSError as error:
            raise BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error.strerror}") from None

    def _mel(self, samples: np.ndarray) -> dict[str, Any]:
        features = self.front_end.features(samples)
        found = {"audio": features.mel_KF, "num_frames": len(features.mel_KF), "fill": features.fill}
        return {**found, "num_windows": features.num_windows}

    def _pcm(self, samples: np.ndarray) -> dict[str, Any]:
        num_windows = self.front_end.num_windows(len(samples))
        return {"audio": to_pcm16(samples), "num_frames": 0, "fill": 0.0, "num_windows": num_windows}

    def encode(self, rows: Sequence[FeatureValues]) -> None:
        """Put the encoder's outputs in the place of log-mel; does nothing for the other stores.

        The encoder hears what a run from ``mel`` shards hears: features rounded to float16.
        """
        spoken = [row for row in rows if row["num_windows"]] if self.spec.store == "encoder" else []
        if not spoken:
            return
        family: ModelFamily = get_family(self.model_id)
        if self._encoder is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = torch.bfloat16 if self.spec.bf16 else torch.float32
            self._encoder = family.load_encoder(self.model_id, dtype=dtype, device=device)
        waiting: list[np.ndarray] = []
        lengths: list[int] = []
        for row in spoken:
            mel_KF = row["audio"].astype(np.float16)
            waiting.extend(padded_windows(mel_KF, row["fill"], row["num_windows"], self.front_end))
            lengths.extend(window_lengths(row["num_samples"], self.front_end.window_frames * HOP_SAMPLES))
        states = []
        for start in range(0, len(waiting), ENCODER_WINDOWS):
            some = slice(start, start + ENCODER_WINDOWS)
            mel_WFT, num_samples_W = torch.from_numpy(np.stack(waiting[some])), torch.tensor(lengths[some])
            states.append(family.encode(self._encoder, mel_WFT, num_samples_W).float().cpu().numpy())
        states_WPD, start = np.concatenate(states), 0
        for row in spoken:
            row["audio"] = states_WPD[start : start + row["num_windows"]]
            start += row["num_windows"]


def file_state(path: str) -> dict[str, Any]:
    """Size and times of a clip's file.

    Raises:
        OSError: There is none, or it is a pipe, a device or a folder.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
