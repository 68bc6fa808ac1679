"""Voxtral: Whisper encoder -> projector (four encoder positions each) -> Mistral-type language model.

A row of ``audio_lm`` with its own front end (mistral-common instead of a processor), whole windows of audio tokens, and
their trimming. Window length, mel bins and positions per window come from the model's configuration: 30 s, 128 and 375
for the released Voxtral, other values for the tiny one.

Shape letters: T mel frames of a window, F mel bins, W windows, N audio positions of all windows, D width.
"""

from typing import Any

import torch

from voxray.core.errors import library_errors
from voxray.models.audio_lm.family import AudioLm
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import AudioPath, Batch
from voxray.models.parts.audio_encoder import EncoderMethods, replace_audio_encoder
from voxray.models.voxtral.audio import EncoderAndProjector, silent_audio_features
from voxray.models.voxtral.front_end import VoxtralFrontEnd


class Voxtral(AudioLm):
    """Voxtral's model side (see ``ModelFamily``)."""

    files: tuple[str, ...] = ("tekken.json", "preprocessor_config.json", "processor_config.json", "params.json")
    encode = EncoderMethods.encode

    def __init__(self, model_type: str = "voxtral") -> None:
        super().__init__(model_type)

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> VoxtralFrontEnd:
        with library_errors(f"--model_id {model_id}: its configuration or tokenizer cannot be used"):
            return VoxtralFrontEnd(model_id, trim_audio=trim_audio)

    def audio_path(self, model: Any) -> torch.nn.Module:
        """Encoder and projector: mel_WFT -> states_ND, the positions of all windows in order."""
        base = unwrap_peft(model)
        return EncoderAndProjector(base.model.audio_tower, base.model.multi_modal_projector, base.config.audio_config)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Make a model call ``run`` instead of encoder and projector."""
        inner = unwrap_peft(model).model
        replace_audio_encoder(inner.audio_tower, inner, "get_audio_features", "pooler_output", run)

    def audio_embeds(self, base: Any, batch: Batch) -> torch.Tensor:
        return base.model.get_audio_features(batch["input_features"], return_dict=True).pooler_output

    def silent_audio(self, base: Any, with_encoder: bool, device: torch.device) -> torch.Tensor:
        return silent_audio_features(base, with_encoder, device)
