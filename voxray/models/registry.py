"""Model families by the ``model_type`` in config.json.

An installed package adds families with the entry point group ``voxray.families``: the name is the model type, and the
value a class or function without arguments that returns a ``ModelFamily``. The package has to be installed on every
machine of the cluster.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any

from voxray.config.recipes import load_object
from voxray.core.errors import BadRow, SettingsError
from voxray.core.languages import check_language
from voxray.models.audio_lm.facts import FACTS as AUDIO_LM_FACTS
from voxray.models.audio_seq2seq.facts import FACTS as AUDIO_SEQ2SEQ_FACTS
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import read_config
from voxray.models.interface import ModelFamily
from voxray.models.library_log import log_library_messages
from voxray.models.served import SERVED

ENTRY_POINTS = "voxray.families"
FAMILIES = {
    "voxtral": "voxray.models.voxtral.family:Voxtral",
    "whisper": "voxray.models.whisper.family:Whisper",
    "salmonn": "voxray.models.salmonn.family:Salmonn",
}
"""{model type: ``package.module:name``}. A family is imported on first use, because Ray starts many processes."""

SHARED = (
    ("voxray.models.audio_lm.family:AudioLm", AUDIO_LM_FACTS),
    ("voxray.models.audio_seq2seq.family:AudioSeq2Seq", AUDIO_SEQ2SEQ_FACTS),
)
"""(path of a class, model types that share it). It is called with the model type."""

CTC = "it is trained with CTC, and voxray does not have this loss"
TRANSDUCER = "it is a transducer, and voxray does not have its loss"
STREAMS = "it adds a stream of audio to a stream of text, and voxray reads audio at placeholder tokens"
WHOLE_CLIPS = "its encoder reads clips as a whole, and voxray encodes them in windows before a language model"
POSITIONS = "its positions have three dimensions, and those of packed rows have one"
UNSUPPORTED = {
    "voxtral_realtime": STREAMS,
    "kyutai_speech_to_text": STREAMS,
    "phi4_multimodal": "its weights hold LoRA layers of their own, and its attention layers are fused",
    "granite_speech": WHOLE_CLIPS,
    "granite_speech_plus": WHOLE_CLIPS,
    "fun_asr_nano": WHOLE_CLIPS,
    "moss_transcribe_diarize": "its prompts hold time marks between the tokens of audio",
    "vibevoice_asr": "it reads samples at 24 kHz through two encoders",
    "qwen2_5_omni": POSITIONS,
    "qwen2_5_omni_thinker": POSITIONS,
    "qwen3_omni_moe": POSITIONS,
    "qwen3_omni_moe_thinker": POSITIONS,
    "gemma3n": "its language model has inputs per layer, which packed rows lack",
    "nemo_speechlm": "its language model has Mamba layers, whose state would pass from one packed row to the next",
    **dict.fromkeys(("wav2vec2", "wav2vec2-bert", "hubert", "lasr_ctc", "parakeet_ctc"), CTC),
    **dict.fromkeys(("parakeet_rnnt", "parakeet_tdt", "nemotron3_5_asr", "nemotron_asr_streaming"), TRANSDUCER),
}
"""{model type that reads speech: why it is not supported}."""


@cache
def families() -> Mapping[str, Callable[[], Any]]:
    """Loaders of the family classes, by model type. Installed packages cannot replace voxray's own families."""
    installed = {point.name: point.load for point in entry_points(group=ENTRY_POINTS)}
    own: dict[str, Callable[[], Any]] = {name: partial(load_object, path) for name, path in FAMILIES.items()}
    others = {name: partial(_load_shared, path, name) for path, facts in SHARED for name in facts if name not in own}
    return installed | own | others


def _load_shared(path: str, model_type: str) -> Callable[[], Any]:
    """A function that returns the family of a model type without a class of its own."""
    return partial(load_object(path), model_type)


def get_family(model_id: str) -> ModelFamily:
    """Find the family of a base model by its configuration, or that of a model on a server (``SERVED``).

    Raises:
        RunError: The model has no readable configuration.
        SettingsError: No family is registered for its model type.
    """
    log_library_messages()
    if model_id.startswith(SERVED):
        return load_object("voxray.models.served:Served")()
    model_type = str(read_config(model_id).get("model_type"))
    if model_type not in families():
        missing = UNSUPPORTED.get(model_type, f"supported are {', '.join(families())}")
        raise SettingsError(f"--model_id {model_id}: model type {model_type!r} is not supported: {missing}")
    return families()[model_type]()()


def require_language(front_end: FrontEnd, language: str, model_id: str) -> None:
    """Check ``--language`` against the languages of a base.

    Raises:
        SettingsError: The base does not have it. The message lists those that it has.
    """
    try:
        check_language(language, front_end.languages, model_id)
    except BadRow as error:
        raise SettingsError(f"--language: {error}") from None
