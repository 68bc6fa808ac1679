"""Models on a server: a family without weights and tokenizer, whose rows hold samples and texts for requests."""

from collections.abc import Sequence

import numpy as np

from voxray.core.content_hash import combined_hash
from voxray.core.errors import SettingsError
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.core.tasks import TASKS
from voxray.models.family_defaults import FamilyDefaults
from voxray.models.front_end import AudioFeatures

SERVED = "served:"
"""Prefix of the model id of a model on a server; its name on the server follows."""


class ServedFrontEnd:
    """Prompts of one token that stands for the whole request, and clips as samples (``--store pcm16``).

    All servers share the fingerprint, and so the feature sets. A server divides long clips by itself.
    """

    fingerprint = "served-1"
    sample_rate_hz = 16_000
    max_audio_sec = 2 * 3600.0
    max_windows: int | None = 1
    max_positions = 1 << 30
    cross_attention_positions = encoder_positions = encoder_dim = positions_per_window = 0
    window_frames = int(max_audio_sec * 100)
    num_mel_bins = 1
    pad_id = eos_id = 0
    audio_id: int | None = None
    needs_language = trims_audio = needs_num_samples = False
    languages: frozenset[str] | None = None

    def features(self, samples: np.ndarray) -> AudioFeatures:
        raise SettingsError("--server: needs --store pcm16")

    def num_windows(self, num_samples: int) -> int:
        return 1

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        return [0]

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        return ""

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        return [self.eos_id]

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def show(self, ids: Sequence[int]) -> str:
        return ""


class Served(FamilyDefaults):
    """What feature sets and evaluation read of a family. Only ``engines.server`` answers with it."""

    name = "served"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(TASKS)

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> ServedFrontEnd:
        return ServedFrontEnd()

    def content_hash(self, model_id: str) -> str:
        """Hash of the name, because a server does not show what it loads."""
        return combined_hash([model_id])
