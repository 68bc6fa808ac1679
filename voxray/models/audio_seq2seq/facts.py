"""Facts about the model types whose decoder cross-attends to an audio encoder.

One row of ``FACTS`` makes a model type known: the registry, the training recipe and preflight derive from this table.
The module imports no torch, because settings read the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HOP_SAMPLES = 160  # samples between two mel frames: 10 ms at 16 kHz

OutputCount = Callable[[Any, Any], Any]
"""(samples of a clip, configuration of the encoder) -> outputs of the encoder, for an int or a tensor of ints."""


@dataclass(frozen=True)
class Seq2SeqFacts:
    """What distinguishes a model type.

    Attributes:
        model, config: Names of its classes in transformers.
        encoder: Path of the encoder's class.
        positions: Outputs of the encoder for a clip.
        max_audio_sec: Longest clip.
        languages: Path of the table of the languages that a prompt has to name; "" if prompts name none.
        is_waveform: Whether the encoder reads samples. It then runs on every clip by itself, because the library's
            encoder averages over padding too.
    """

    model: str
    config: str
    encoder: str
    positions: OutputCount
    max_audio_sec: float = 30.0
    languages: str = ""
    is_waveform: bool = False


def encoder_config(config: Any) -> Any:
    """Configuration of the encoder; some bases have one for encoder and decoder together."""
    return getattr(config, "encoder_config", config)


def _whole(samples: Any, audio: Any) -> Any:
    """Whisper: all of a window, padding included."""
    return 0 * samples + audio.max_source_positions


def _parakeet(samples: Any, audio: Any) -> Any:
    """Convolutions that divide the mel frames by ``subsampling_factor``."""
    kernel, length = audio.subsampling_conv_kernel_size, samples // HOP_SAMPLES
    for _ in range(audio.subsampling_factor.bit_length() - 1):
        length = (length + (kernel - 1) // 2 * 2 - kernel) // audio.subsampling_conv_stride + 1
    return length


def _moonshine(samples: Any, audio: Any) -> Any:
    """Three convolutions over samples."""
    return (((samples - 127) // 64 - 6) // 3 - 2) // 2 + 1


PARAKEET = "transformers.models.parakeet.modeling_parakeet:ParakeetEncoder"
FACTS: dict[str, Seq2SeqFacts] = {
    "whisper": Seq2SeqFacts(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "transformers.models.whisper.modeling_whisper:WhisperEncoder",
        _whole,
    ),
    "cohere_asr": Seq2SeqFacts(
        "CohereAsrForConditionalGeneration",
        "CohereAsrConfig",
        PARAKEET,
        _parakeet,
        max_audio_sec=35.0,  # its preprocessor divides longer clips
        languages="transformers.models.cohere_asr.processing_cohere_asr:LANGUAGES",
    ),
    "canary": Seq2SeqFacts(
        "CanaryForConditionalGeneration",
        "CanaryConfig",
        PARAKEET,
        _parakeet,
        max_audio_sec=40.0,
        languages="transformers.models.canary.processing_canary:LANGUAGE_CODE_TO_NAME",
    ),
    "moonshine": Seq2SeqFacts(
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        "transformers.models.moonshine.modeling_moonshine:MoonshineEncoder",
        _moonshine,
        is_waveform=True,
    ),
}
"""{model type: its facts}."""
