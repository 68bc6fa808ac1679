"""Whisper: an encoder over one window of 30 s, and a decoder that writes what it hears.

The tokens of a row are the decoder's alone; what the encoder makes of the clip is looked at by cross attention. Longer
recordings go through Whisper's own algorithm, window by window, each beginning where the last one says that it ended.

Shape letters: B rows (one window each, so W too), R some of them, L tokens, T mel frames of a window, F mel bins, P
encoder positions, D width, N answer positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from voxray.audio.logmel import HOP_SAMPLES
from voxray.models.hf_files import build_on_meta, unwrap_peft
from voxray.models.interface import AudioPath, FamilyDefaults
from voxray.models.parts.audio_encoder import (
    EncoderOutputs,
    PassThrough,
    encode,
    load_alone,
    replace_audio_encoder,
    weights_fingerprint,
)
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.cross_kv_cache import CrossDecodeState
from voxray.models.parts.layer_compile import compile_layers, uncompiled
from voxray.models.parts.quantize import load_frozen
from voxray.models.whisper.front_end import WhisperFrontEnd

ENCODER = "encoder"


class Whisper(FamilyDefaults):
    """Whisper's model side."""

    name = "whisper"
    job = "train_whisper"
    tasks: tuple[str, ...] = ("asr",)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType({ENCODER: (ENCODER,), "decoder": ("decoder", "proj_out")})
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType(
        dict.fromkeys((ENCODER, "decoder"), ("q_proj", "v_proj"))
    )
    always_frozen: tuple[str, ...] = ("encoder.embed_positions",)  # sinusoids
    quantized: tuple[str, ...] = (ENCODER, "decoder")
    files: tuple[str, ...] = (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("merges.txt", "normalizer.json", "preprocessor_config.json", "processor_config.json"),
    )

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> WhisperFrontEnd:
        return WhisperFrontEnd(model_id, trim_audio=trim_audio)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base with every weight frozen.

        Args:
            dtype: Type of the weights and of computing.
            quantize: ``8bit`` or ``4bit`` quantises the layers of encoder and decoder.
        Raises:
            RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
        """
        from transformers import WhisperForConditionalGeneration

        options = {"dtype": dtype, "device": device, "quantize": quantize, "keep": ("proj_out",)}
        model = load_frozen(WhisperForConditionalGeneration, model_id, **options)
        model.generation_config.forced_decoder_ids = None  # prompts say language and task
        return model

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """The model without weights (see ``models.family.Family``)."""
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        config = WhisperConfig.from_pretrained(model_id)
        return build_on_meta(lambda: WhisperForConditionalGeneration._from_config(config, dtype=dtype), model_id)

    def encoder_fingerprint(self, model_id: str) -> str:
        """Hash of the encoder's weights as they are stored."""
        return weights_fingerprint(model_id, ENCODER)

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the encoder alone, as ``load_model`` would load it.

        Raises:
            RunError: Its weights are missing or do not fit the configuration.
        """
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        config = WhisperConfig.from_pretrained(model_id)
        return load_alone(WhisperEncoder, config, model_id, ENCODER, dtype=dtype, device=device)

    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Outputs of the encoder for whole windows, states_WPD."""
        return encode(encoder, features_WFT)

    def skip_encoder(self, model: Any) -> None:
        """Make a model take the encoder's outputs as ``input_features``, and free the encoder's memory."""
        base = unwrap_peft(model)
        base.model.encoder = PassThrough(base.dtype)

    def audio_path(self, model: Any) -> EncoderOutputs:
        """The encoder: mel_WFT -> states_WPD."""
        return EncoderOutputs(unwrap_peft(model).model.encoder)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Let what ``audio_path`` gives come from elsewhere, and free the memory of the encoder's layers."""
        replace_audio_encoder(unwrap_peft(model).model.encoder, run)

    def compile_layers(self, model: Any) -> None:
        """Let ``answer_logits`` run compiled layers of encoder and decoder; ``generate`` leaves them as they are.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        parts = unwrap_peft(model).model
        for part in (parts.encoder, parts.decoder):
            if not isinstance(part, PassThrough):
                compile_layers(part, model.device)

    def answer_logits(
        self,
        model: Any,
        batch: dict[str, torch.Tensor],
        keep_BL: torch.Tensor,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """Logits at the chosen positions only.

        Args:
            model: The base or its PEFT wrapper.
            batch: As ``collate`` makes it, padded or packed, without labels and tasks.
            keep_BL: True where the next token is to be predicted.
            roles_in_every_pass: Roles that take part even in a batch without audio; there is none here.
        Returns:
            logits_NV.
        """
        base = unwrap_peft(model)
        ids_BL, mask_BL = (batch["input_ids"], batch.get("attention_mask"))
        if "segment_ends" in batch:
            ids_BL, mask_BL = _unpacked(ids_BL[0], batch["segment_ends"])
        assert len(ids_BL) == len(batch["input_features"]), "one window a row"
        hidden_BLD = base.model.decoder(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            encoder_hidden_states=_heard(base, batch["input_features"]),
            use_cache=False,
        ).last_hidden_state
        if "segment_ends" in batch:
            assert mask_BL is not None
            return base.proj_out(hidden_BLD[mask_BL.bool()][keep_BL[0]])
        return base.proj_out(hidden_BLD[keep_BL])

    @torch.no_grad()
    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CrossDecodeState, torch.Tensor]:
        """Read left-padded prompts, to continue them token by token (see ``models.family.Family``).

        What generation_config.json suppresses is suppressed here too: some tokens always, some at the beginning.
        """
        base = unwrap_peft(model)
        generation = base.generation_config
        always, first = generation.suppress_tokens or [], generation.begin_suppress_tokens or []

        def run(encoder_hidden_states: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
            if encoder_hidden_states is None:  # what a row heard is remembered; this only says that there is something
                encoder_hidden_states = states_BPD[: len(inputs["input_ids"]), :0]
            with uncompiled(base.model.decoder):
                hidden_BLD = base.model.decoder(
                    encoder_hidden_states=encoder_hidden_states, use_cache=True, **inputs
                ).last_hidden_state
            logits_BV = few_rows_linear(base.proj_out, hidden_BLD[:, -1])
            logits_BV[:, always] = -torch.inf
            return logits_BV

        with uncompiled(base.model.decoder):
            states_BPD = _heard(base, batch["input_features"])
        ids_BL, mask_BL = self._with_languages(base, batch["input_ids"], batch["attention_mask"], states_BPD)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "encoder_hidden_states": states_BPD}
        state, logits_BV = CrossDecodeState.prefill(run, inputs)
        logits_BV[:, first] = -torch.inf
        return state, logits_BV

    def _with_languages(
        self, base: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, states_BPD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts with a language in every row: that which the model hears where the row names none."""
        known = torch.tensor(sorted(getattr(base.generation_config, "lang_to_id", {}).values()), device=ids_BL.device)
        prompts = [ids[mask.bool()] for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        unknown = [row for row, prompt in enumerate(prompts) if len(known) and not torch.isin(prompt, known).any()]
        if not unknown:
            return ids_BL, mask_BL
        start_R1 = torch.stack([prompts[row][:1] for row in unknown])
        with uncompiled(base.model.decoder):
            hidden_R1D = base.model.decoder(
                input_ids=start_R1, encoder_hidden_states=states_BPD[unknown], use_cache=False
            ).last_hidden_state
        heard_R = known[base.proj_out(hidden_R1D[:, -1])[:, known].argmax(-1)]
        for row, language in zip(unknown, heard_R, strict=True):
            prompts[row] = torch.cat([prompts[row][:1], language[None], prompts[row][1:]])
        masks = [torch.ones_like(prompt) for prompt in prompts]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(prompts, batch_first=True, padding_side="left"), pad(masks, batch_first=True, padding_side="left")

    @torch.no_grad()
    def generate(
        self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Sequence[int] = (), **options: Any
    ) -> torch.Tensor:
        """Continue left-padded prompts by transformers' generate; a recording of several windows by its sequential
        algorithm.

        Returns:
            ids_BL of the continuations alone, padded on the right, times included where the prompt has them.
        Raises:
            ValueError: A recording of several windows, or one with times, is stored as the encoder's outputs.
        """
        from transformers.modeling_outputs import BaseModelOutput

        base, features = unwrap_peft(model), batch["input_features"]
        ids_BL, mask_BL, generation = batch["input_ids"], batch["attention_mask"], base.generation_config
        with_times = generation.no_timestamps_token_id not in ids_BL[0]
        if (with_times or len(features) > len(ids_BL)) and isinstance(base.model.encoder, PassThrough):
            raise ValueError("what is written with times is heard window by window, from --store mel or pcm16")
        with uncompiled(base.model.decoder):
            if len(features) > len(ids_BL):
                return self._long(base, ids_BL[0], features, num_samples[0], options)
            states_BPD = _heard(base, features)
            ids_BL, mask_BL = self._with_languages(base, ids_BL, mask_BL, states_BPD)
            room = base.config.max_target_positions - ids_BL.shape[1]  # a language that was found takes a position
            options["max_new_tokens"] = min(options["max_new_tokens"], room)
            # With times the library may hear what follows the last of them once more.
            heard = {"encoder_outputs": BaseModelOutput(last_hidden_state=states_BPD)}
            return base.generate(
                **({"input_features": features.to(base.dtype)} if with_times else heard),
                decoder_input_ids=ids_BL,  # in the place of what the language named below would give
                decoder_attention_mask=mask_BL,
                return_timestamps=with_times,
                **({"language": "en", "task": "transcribe"} if getattr(generation, "lang_to_id", None) else {}),
                **options,
            )

    def _long(
        self, base: Any, prompt_L: torch.Tensor, mel_WFT: torch.Tensor, num_samples: int, options: dict[str, Any]
    ) -> torch.Tensor:
        """One recording of several windows; every window begins where the times written for the last one end."""
        languages = getattr(base.generation_config, "lang_to_id", None) or {}
        named = {token.strip("<|>") for token, number in languages.items() if number in prompt_L.tolist()}
        how = {"language": next(iter(named), None), "task": "transcribe"} if languages else {}
        num_frames = num_samples // HOP_SAMPLES
        mel_1FT = torch.cat(list(mel_WFT), dim=-1)[None, :, :num_frames].to(base.dtype)
        return base.generate(input_features=mel_1FT, return_timestamps=True, **how, **options)


def _heard(base: Any, features: torch.Tensor) -> torch.Tensor:
    """What the encoder makes of whole windows, states_BPD; its stored outputs are given on."""
    features = features if isinstance(base.model.encoder, PassThrough) else features.to(base.dtype)
    return base.model.encoder(features, return_dict=True).last_hidden_state


def _unpacked(ids_L: torch.Tensor, ends_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a pack below each other, padded on the right, and their mask: every row has an encoder of its own to look
    at, and its tokens are few."""
    lengths = torch.diff(ends_B, prepend=ends_B.new_zeros(1)).tolist()
    rows = list(torch.split(ids_L, lengths))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True)
