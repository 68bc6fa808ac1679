"""Extracts from manifest rows everything that a shard stores."""

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from voxray.audio.augment import NO_AUGMENTATION, WaveformAugmentation, augment
from voxray.audio.decode import Part, decode, to_pcm16
from voxray.core.content_hash import combined_hash
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, sha256_hex
from voxray.core.source import stretch
from voxray.core.tasks import TASK_CODES, own_definitions
from voxray.features.shards import LAYOUT
from voxray.models.front_end import FrontEnd, row_target_ids
from voxray.models.interface import ModelFamily
from voxray.models.parts.cpu_16bit import use_float32_products
from voxray.models.parts.logmel_windows import padded_windows, samples_by_window
from voxray.models.registry import get_family, require_language
from voxray.models.weight_sizes import loaded_bytes

FeatureValues = dict[str, Any]
"""The columns of one row (see ``shards``)."""
MAX_WHOLE_BYTES = 256 << 20  # larger files are not read into memory as a whole
ENCODER_WINDOWS = 8  # windows of one forward pass of the encoder


@dataclass(frozen=True)
class FeatureSpec:
    """What a feature set stores.

    Attributes:
        store: One of ``shards.STORES``.
        dtype: Data type of stored encoder outputs.
        bf16: Whether the encoder computes in bfloat16, as a training run with --bf16 does.
        waveform: Variants of every clip.
        trim_audio: Leave the audio tokens of padding out of prompts; the stored audio is the same.
        language: Code of the language of rows that name none, "" if unknown.
    """

    store: Literal["mel", "pcm16", "encoder"] = "mel"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    bf16: bool = False
    waveform: WaveformAugmentation = NO_AUGMENTATION
    trim_audio: bool = False
    language: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Data type of the stored audio."""
        return {"mel": torch.float16, "pcm16": torch.int16, "encoder": getattr(torch, self.dtype)}[self.store]


class Extractor:
    """Extracts rows. It can be pickled; the encoder, if one is needed, is loaded at its first use.

    Args:
        model_id: Base model.
        spec: What to store.
    Attributes:
        fingerprint: Hash of everything that determines what is stored of a row.
        plain_fingerprint: The same without variants.
    Raises:
        SettingsError: The base does not have the language of the spec (``--language``).
    """

    def __init__(self, model_id: str, spec: FeatureSpec | None = None) -> None:
        self.model_id, self.spec = model_id, spec or FeatureSpec()
        self.front_end: FrontEnd = get_family(model_id).front_end(model_id, trim_audio=self.spec.trim_audio)
        require_language(self.front_end, self.spec.language, model_id)
        inputs: list[Any] = [LAYOUT, self.front_end.fingerprint, self.spec.store, *filter(None, [self.spec.language])]
        if self.spec.store == "encoder":
            weights = get_family(model_id).encoder_fingerprint(model_id)
            inputs += [self.spec.dtype, "bf16" if self.spec.bf16 else "fp32", weights]
        definitions = own_definitions()
        if definitions:  # shards store the codes of tasks; metrics change nothing that is stored
            inputs.append([[TASK_CODES[name], name, {**task, "metrics": []}] for name, task in definitions.items()])
        self.plain_fingerprint = combined_hash(inputs)
        variants = self.spec.waveform.fingerprint
        inputs += [variants, self.front_end.max_audio_sec]  # the longest that a variant may get
        with_variants = combined_hash(inputs)
        self.fingerprint = with_variants if variants else self.plain_fingerprint
        self._encoder: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of a clip's stored audio without its first axis."""
        encoder = (self.front_end.encoder_positions, self.front_end.encoder_dim)
        return {"mel": (self.front_end.num_mel_bins,), "pcm16": (), "encoder": encoder}[self.spec.store]

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Type in which ``encode`` computes."""
        return torch.bfloat16 if self.spec.bf16 else torch.float32

    @property
    def encoder_bytes(self) -> int:
        """Memory that each process takes for the encoder's weights."""
        family = get_family(self.model_id)
        return loaded_bytes(family, self.model_id, dtype=self.encoder_dtype, role=family.encoder_role)

    def sample_rows(
        self, sample: Sample, *, augmented: bool = True
    ) -> tuple[list[FeatureValues], dict[str, Any] | None]:
        """Extract the rows of one sample. For ``encoder`` sets they hold log-mel in float16 until ``encode`` is called.

        Returns:
            A row per variant, and for clips the state of the file (path, size, times, hash), by which later runs
            detect changes.
        Raises:
            BadRow: The clip is missing or unusable, or the text cannot be encoded.
        """
        sample = replace(sample, language=sample.language or self.spec.language)
        shared = {"target_ids": row_target_ids(self.front_end, sample), "task": sample.task.name}
        for name in ("id", "language", "source", "audio_path", "prompt", "answer"):
            shared[name] = getattr(sample, name)
        if not sample.task.has_audio:
            empty = {"num_frames": 0, "fill": 0.0, "num_windows": 0, "num_samples": 0, "variant": 0}
            no_audio = np.empty(0, np.int16 if self.spec.store == "pcm16" else np.float32)
            return [{**shared, **empty, "audio": no_audio, "prompt_ids": self.front_end.prompt_ids(sample, 0)}], None
        samples, clip = self._read(sample)
        waveform, limit = self.spec.waveform, self.front_end.max_audio_sec
        rows, rate_hz, key = [], self.front_end.sample_rate_hz, f"{clip['sha256'] or clip['path']}:{sample.start_sec}"
        for variant in range(waveform.num_variants if augmented else 1):
            signal = augment(samples, rate_hz, variant, key, waveform, max_sec=limit) if variant else samples
            audio = self._pcm(signal) if self.spec.store == "pcm16" else self._mel(signal)
            timed = replace(sample, segments=stretch(sample.segments, len(signal) / len(samples)))
            row = {**shared, **audio, "num_samples": len(signal), "variant": variant}
            row["prompt_ids"] = self.front_end.prompt_ids(timed, len(signal))
            if variant and timed.segments:  # its times are those of the faster or slower clip
                row["target_ids"] = row_target_ids(self.front_end, timed)
            rows.append(row)
        return rows, clip

    def _read(self, sample: Sample) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode a sample's clip; returns its samples and the state of the file."""
        part = Part(sample.start_sec, sample.duration_sec, sample.channel)
        try:
            clip = file_state(sample.audio_path)
            # A whole file is read once, hashed and decoded from memory. Of a segment's file only the segment is read,
            # and of a huge file only as much as the longest clip needs.
            whole = not (part.start_sec or part.duration_sec) and clip["size"] <= MAX_WHOLE_BYTES
            raw = Path(sample.audio_path).read_bytes() if whole else None
            clip["sha256"] = "" if raw is None else sha256_hex(raw)
            rate_hz, max_sec = self.front_end.sample_rate_hz, self.front_end.max_audio_sec
            return decode(sample.audio_path, rate_hz, raw, part=part, max_sec=max_sec), clip
        except OSError as error:
            raise BadRow("audio_unreadable", f"cannot read {sample.audio_path}: {error.strerror}") from None

    def _mel(self, samples: np.ndarray) -> dict[str, Any]:
        features = self.front_end.features(samples)
        # shards of log-mel round it too, and faster (shard_bytes)
        mel_KF = features.mel_KF.astype(np.float16) if self.spec.store == "encoder" else features.mel_KF
        audio = {"audio": mel_KF, "num_frames": len(mel_KF), "fill": features.fill}
        return {**audio, "num_windows": features.num_windows}

    def _pcm(self, samples: np.ndarray) -> dict[str, Any]:
        num_windows = self.front_end.num_windows(len(samples))
        return {"audio": to_pcm16(samples), "num_frames": 0, "fill": 0.0, "num_windows": num_windows}

    def encode(self, rows: Sequence[FeatureValues]) -> None:
        """Replace the rows' log-mel by encoder outputs, in place. Does nothing for the other stores.

        The encoder gets log-mel that ``sample_rows`` has rounded to float16, as in a run from ``mel`` shards.
        """
        with_audio = [row for row in rows if row["num_windows"]] if self.spec.store == "encoder" else []
        if not with_audio:
            return
        family: ModelFamily = get_family(self.model_id)
        if self._encoder is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._encoder = family.load_encoder(self.model_id, dtype=self.encoder_dtype, device=device)
            use_float32_products(self._encoder)
        windows: list[np.ndarray] = []
        lengths: list[int] = []
        for row in with_audio:
            windows.extend(padded_windows(row["audio"], row["fill"], row["num_windows"], self.front_end))
            lengths.extend(samples_by_window(self.front_end, row["num_samples"]))
        states = []
        for start in range(0, len(windows), ENCODER_WINDOWS):
            batch = slice(start, start + ENCODER_WINDOWS)
            mel_WFT, num_samples_W = torch.from_numpy(np.stack(windows[batch])), torch.tensor(lengths[batch])
            states.append(family.encode(self._encoder, mel_WFT, num_samples_W).float().cpu().numpy())
        states_WPD, start = np.concatenate(states), 0
        for row in with_audio:
            row["audio"] = states_WPD[start : start + row["num_windows"]]
            start += row["num_windows"]


def file_state(path: str) -> dict[str, Any]:
    """Path, size and times of a clip's file.

    Raises:
        OSError: It does not exist, or is a pipe, a device or a folder.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    return {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
