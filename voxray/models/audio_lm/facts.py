"""Facts about the model types whose language model reads audio at placeholder tokens.

One row of ``FACTS`` makes a model type known: the registry, the training recipes and preflight derive from this table.
The module imports no torch, because settings read the table.

"Frames" are valid mel frames (10 ms) of a window. "Positions" are vectors that the language model reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from voxray.core.tasks import TASKS

MERGED = 4  # encoder outputs that GLM-ASR joins into one position

Positions = Callable[[Any, Any], Any]
"""(frames, configuration of the encoder) -> positions, for an int or a tensor of ints."""


@dataclass(frozen=True)
class Facts:
    """What distinguishes a model type.

    Attributes:
        model, config, encoder: Names of its classes in transformers.
        positions: Positions of a window by its frames.
        window_frames: Mel frames of a window, from the configuration of the encoder.
        output: Name of the encoder's attention layer that follows the heads.
        projector: Names of the projector's Linear layers.
        mask: Form in which the encoder gets the frames of a window: ``frames`` (a mask of mel frames), ``attention`` (a
            mask of attention), or ``""`` if it reads the padding too.
        pooled: Positions of the encoder's layers that it averages into one output.
        merged: Outputs of the encoder that the projector joins into one position.
        text_first: Whether a user turn has its text before the audio.
        request: The user's text of a transcription, if the processor has no transcription request.
        answer_mark: Token after which the transcript begins in an answer; the model names the language before it.
        languages: Path of the table {code: name} of the languages that a prompt can force.
        tasks: Tasks that its models answer.
        max_audio_sec: Longest clip, if the processor has no limit.
        timed: Whether the encoder's outputs are rotated by their time in the clip before the projector.
        compiles: Whether jobs/compile.py can compile encoder and projector.
    """

    model: str
    config: str
    encoder: str
    positions: Positions
    window_frames: Callable[[Any], int]
    output: str = "out_proj"
    projector: tuple[str, ...] = ("linear_1", "linear_2")
    mask: Literal["", "frames", "attention"] = "frames"
    pooled: int = 1
    merged: int = 1
    text_first: bool = False
    request: str = ""
    answer_mark: str = ""
    languages: str = ""
    tasks: tuple[str, ...] = tuple(TASKS)
    max_audio_sec: float = 0.0
    timed: bool = False
    compiles: bool = True


def _halved(frames: Any) -> Any:
    """Outputs of a convolution over three values with stride 2 and padding 1."""
    return (frames - 1) // 2 + 1


def _pooled(frames: Any, audio: Any) -> Any:
    """A convolution of stride 2, then averages of two."""
    return (_halved(frames) - 2) // 2 + 1


def _merged(frames: Any, audio: Any) -> Any:
    """A convolution of stride 2, then four outputs joined."""
    return (_halved(frames) - MERGED) // MERGED + 1


def _chunked(frames: Any, audio: Any) -> Any:
    """Three convolutions of stride 2 in chunks of ``2 * n_window`` frames."""
    chunk = 2 * audio.n_window
    whole, rest = (_halved(_halved(_halved(count))) for count in (chunk, frames % chunk))
    return frames // chunk * whole + rest


def _whole(frames: Any, audio: Any) -> Any:
    """Voxtral: all of a window, padding included; the projector joins encoder outputs up to ``intermediate_size``."""
    return 0 * frames + audio.max_source_positions * audio.hidden_size // audio.intermediate_size


def _twice_sources(audio: Any) -> int:
    return 2 * audio.max_source_positions


def _twice_rotary(audio: Any) -> int:
    return 2 * audio.max_position_embeddings


def _attention_frames(audio: Any) -> int:
    """The encoder attends within such windows, so a clip may be cut into them."""
    return audio.n_window_infer


FACTS: dict[str, Facts] = {
    "voxtral": Facts(
        "VoxtralForConditionalGeneration",
        "VoxtralConfig",
        "VoxtralEncoder",
        _whole,
        _twice_sources,
        mask="",
        merged=4,
    ),
    "qwen3_asr": Facts(
        "Qwen3ASRForConditionalGeneration",
        "Qwen3ASRConfig",
        "Qwen3ASREncoder",
        _chunked,
        _attention_frames,
        tasks=("asr",),  # its chat template leaves out the text of a user's turn
        answer_mark="<asr_text>",
        languages="transformers.models.qwen3_asr.processing_qwen3_asr:LANGUAGE_CODE_TO_NAME",
        max_audio_sec=1200.0,  # Qwen's own code divides longer recordings
        compiles=False,
    ),
    "qwen2_audio": Facts(
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        "Qwen2AudioEncoder",
        _pooled,
        _twice_sources,
        projector=("linear",),
        mask="attention",
        pooled=2,
        request="Transcribe the speech.",
        max_audio_sec=30.0,
    ),
    "audioflamingo3": Facts(
        "AudioFlamingo3ForConditionalGeneration",
        "AudioFlamingo3Config",
        "AudioFlamingo3Encoder",
        _pooled,
        _twice_sources,
        pooled=2,
        text_first=True,
    ),
    "musicflamingo": Facts(
        "MusicFlamingoForConditionalGeneration",
        "MusicFlamingoConfig",
        "AudioFlamingo3Encoder",
        _pooled,
        _twice_sources,
        pooled=2,
        text_first=True,
        request="Transcribe the input speech.",
        timed=True,
        compiles=False,
    ),
    "glmasr": Facts(
        "GlmAsrForConditionalGeneration",
        "GlmAsrConfig",
        "GlmAsrEncoder",
        _merged,
        _twice_rotary,
        output="o_proj",
        mask="",
        merged=MERGED,
    ),
}
"""{model type: its facts}."""
