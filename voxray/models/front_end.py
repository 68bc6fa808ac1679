"""The half of a model family without weights: it turns rows into features and token ids.

Shape letters: F mel bins, K valid mel frames of a clip.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from voxray.core.manifest import Sample
from voxray.core.source import Segment


@dataclass(frozen=True)
class AudioFeatures:
    """Features of one clip without its padding.

    Attributes:
        mel_KF: float32, shape (valid frames, ``num_mel_bins``).
        fill: Value of every padded frame after them.
        num_windows: Whole model windows that the padded clip fills.
    """

    mel_KF: np.ndarray
    fill: float
    num_windows: int


class FrontEnd(Protocol):
    """Turns rows into features and token ids. Picklable, without weights.

    The functions ``stop_ids`` and ``row_target_ids`` of this module, and ``parts.logmel_windows.samples_by_window``,
    read what only some front ends have.

    Attributes:
        fingerprint: Hash of everything that determines the output. Shards with another fingerprint are stale.
        sample_rate_hz: Rate that clips are resampled to.
        max_audio_sec: Longest clip that the family accepts, in seconds.
        max_windows: Longest clip that the family trains on, in windows; None for no limit.
        max_positions: Longest prompt and answer together, in tokens.
        cross_attention_positions: Encoder positions per window that the decoder cross-attends to. They cost memory but
            are not prompt tokens (Whisper: 1,500; 0 for models whose language model reads audio as tokens).
        window_frames: Mel frames of one model window.
        num_mel_bins: Values of one frame.
        encoder_positions: Outputs of the audio encoder for one window.
        encoder_dim: Width of each encoder output.
        pad_id: Token id of padding.
        positions_per_window: Audio tokens of a whole window; 0 if prompts have none.
        eos_id: Token id that ends an answer.
        needs_language: Whether training rows must have a ``language``.
        languages: Codes of the languages that the base has; None if it takes any.
        trims_audio: Whether prompts omit the audio tokens that stand for padding only.
        needs_num_samples: Whether batches need ``num_samples``, the unpadded samples of each window.
    """

    fingerprint: str
    sample_rate_hz: int
    max_audio_sec: float
    max_windows: int | None
    max_positions: int
    cross_attention_positions: int
    window_frames: int
    num_mel_bins: int
    encoder_positions: int
    encoder_dim: int
    pad_id: int
    positions_per_window: int
    eos_id: int
    needs_language: bool
    languages: frozenset[str] | None
    trims_audio: bool
    needs_num_samples: bool

    @property
    def audio_id(self) -> int | None:
        """Token id that stands for one position of audio in a prompt; None if prompts have no audio tokens."""
        ...

    def features(self, samples: np.ndarray) -> AudioFeatures:
        """Compute the features of one clip, once per clip in featurize workers or while batches load.

        Args:
            samples: float32, shape (num_samples,), at ``sample_rate_hz``.
        """
        ...

    def num_windows(self, num_samples: int) -> int:
        """Number of whole windows that a clip of ``num_samples`` samples is padded to."""
        ...

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids from the start of the text up to the first token of the answer, audio tokens included.

        Tokens of a chat's earlier answers are marked by ``with_labels``.

        Args:
            num_samples: Length of the row's clip at ``sample_rate_hz``; 0 without audio.
        Raises:
            BadRow: The family cannot answer this row.
        """
        ...

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        """Code of the language in a prompt, which the row named or the model detected; "" if it has none."""
        ...

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of an answer, including the token that ends it.

        Args:
            segments: Times of the parts of the answer. Families without time tokens ignore them.
        Raises:
            BadRow: The text cannot be tokenized.
        """
        ...

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Whether a row is generated window by window, or with times, through ``ModelFamily.generate``.

        All other rows are generated through ``ModelFamily.prefill``.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without control tokens, as it is scored."""
        ...

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people: with control tokens, runs of audio tokens shortened."""
        ...


CONTEXT_LINE = "Context: "


def with_context_line(request: str, context: str) -> str:
    """The text of a transcription request with the row's context on a line of its own; without one, unchanged."""
    return f"{request}\n{CONTEXT_LINE}{context}" if context else request


def stop_ids(front_end: FrontEnd) -> frozenset[int]:
    """Token ids that end an answer when they are generated: ``eos_id``, and others if the front end has any."""
    return getattr(front_end, "stop_ids", frozenset()) | {front_end.eos_id}


def with_labels(ids: Iterable[int]) -> list[int]:
    """Mark token ids of a prompt that have a label: id t becomes -1 - t, which ``features.reader`` turns back."""
    return [-1 - token for token in ids]


def row_target_ids(front_end: FrontEnd, sample: Sample) -> list[int]:
    """Token ids of a row's answer (see ``FrontEnd.target_ids``). Some models name the language before it."""
    if getattr(front_end, "answer_names_language", False):
        return front_end.target_ids(sample.answer, sample.segments, language=sample.language)  # type: ignore[call-arg]
    return front_end.target_ids(sample.answer, sample.segments)
