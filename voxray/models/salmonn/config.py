"""Configurations of SALMONN and of its BEATs encoder, as stored in ``config.json``."""

from typing import Any, ClassVar

from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from voxray.core.errors import RunError

WHISPER_FRAMES_PER_SEC = 50  # 100 mel frames, and the encoder's second convolution has stride 2
SUPPORTED = {
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "conv_bias": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
"""Options of every published BEATs file. Files with other values would need other code."""


class BeatsConfig(PreTrainedConfig):
    """Configuration of BEATs, with the names of its official files. The defaults are BEATs iter3+."""

    model_type = "beats"

    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    embed_dim: int = 512
    input_patch_size: int = 16
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    predictor_class: int = 0
    """Sound classes of a fine-tuned BEATs' classifier; 0 omits the classifier, as SALMONN does."""

    @classmethod
    def of_file(cls, settings: dict[str, Any], path: str, *, classes: bool = False) -> "BeatsConfig":
        """Read the shapes in a BEATs file's ``cfg``.

        Args:
            settings: The ``cfg``.
            path: Path of the file, for messages.
            classes: Keep the classifier.
        Raises:
            RunError: The file is of an unsupported kind of BEATs.
        """
        for name, value in SUPPORTED.items():
            if settings.get(name, value) != value:
                raise RunError(f"{path}: BEATs with {name} {settings[name]!r} is not supported, only {value!r}")
        shapes = {name: settings[name] for name in cls.__annotations__ if name in settings}
        if not (classes and settings.get("finetuned_model")):
            shapes["predictor_class"] = 0
        return cls(**shapes)


class SalmonnConfig(PreTrainedConfig):
    """Configuration of SALMONN: Whisper's encoder, BEATs, a Q-Former over windows of both, and a language model.

    Attributes:
        num_query: LLM positions of one Q-Former window.
        seconds_per_window: Length of a Q-Former window (17 frames of 20 ms).
        seconds_per_stride: Distance from one window to the next.
        audio_token_id: Placeholder of one LLM position of audio in ``input_ids``; outside the vocabulary.
        prompt_template: Template that every prompt is put into.
        end_sym: Text that ends an answer.
        alone: Whether a clip's embeddings are independent of the other clips in the batch. In the reference they
            depend on the longest clip: BEATs' outputs for the padding up to its length are passed on.
        parts: {part: path} of the official files, for a folder that names them instead of holding weights.
    """

    model_type = "salmonn"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "speech_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "beats_config": BeatsConfig,
        "qformer_config": Blip2QFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    speech_config: dict | PreTrainedConfig | None = None
    beats_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query: int = 1
    seconds_per_window: float = 0.333333
    seconds_per_stride: float = 0.333333
    audio_token_id: int | None = None
    prompt_template: str = "USER: {}\nASSISTANT:"
    end_sym: str = "</s>"
    alone: bool = False
    parts: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        if self.audio_token_id is None:
            self.audio_token_id = text.vocab_size

    @property
    def window_frames(self) -> int:
        """Encoder frames of one Q-Former window: round(50 x 0.333333) = 17."""
        return round(WHISPER_FRAMES_PER_SEC * self.seconds_per_window)

    @property
    def stride_frames(self) -> int:
        """Encoder frames from one Q-Former window to the next."""
        return round(WHISPER_FRAMES_PER_SEC * self.seconds_per_stride)

    @property
    def positions_per_clip(self) -> int:
        """LLM positions of one 30 s window, however short its clip: (1,500 - 17) // 17 + 1 = 88."""
        speech: Any = self.speech_config
        return ((speech.max_source_positions - self.window_frames) // self.stride_frames + 1) * self.num_query


def qformer_config(*, width: int, heads: int, ffn: int, layers: int, encoder_width: int) -> Blip2QFormerConfig:
    """Configuration of the Q-Former: BLIP-2's, with cross-attention in every layer and otherwise BERT's values.

    Args:
        encoder_width: Width of Whisper's and BEATs' frames together.
    """
    return Blip2QFormerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        encoder_hidden_size=encoder_width,
        cross_attention_frequency=1,
        use_qformer_text_input=False,
    )


AutoConfig.register(
    SalmonnConfig.model_type, SalmonnConfig, exist_ok=True
)  # else transformers warns about every folder
