"""Whisper: an encoder over one window of 30 s, and a decoder that writes the transcript or its English translation.

Prompt and answer tokens are the decoder's only; it cross-attends to the encoder's outputs. Longer recordings go through
Whisper's own algorithm, window by window: each window begins at the end time that was written for the previous one.

Shape letters: B rows (one window each, so W too), R some of the rows, L tokens, T mel frames of a window, F mel bins, P
encoder positions, D width, N predicted positions, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from voxray.audio.logmel import HOP_SAMPLES
from voxray.core.errors import library_errors
from voxray.models.audio_seq2seq.family import ENCODER, AudioSeq2Seq, pad_rows
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import AudioPath, Batch
from voxray.models.parts.audio_encoder import (
    EncoderMethods,
    EncoderOutputs,
    PassThrough,
    first_columns,
    replace_audio_encoder,
)
from voxray.models.parts.layer_compile import eager_mode
from voxray.models.whisper.front_end import WhisperFrontEnd


class Whisper(AudioSeq2Seq):
    """Whisper's model side (see ``ModelFamily``). It reads whole windows, detects languages and translates."""

    tasks: tuple[str, ...] = ("asr", "ast")
    always_frozen: tuple[str, ...] = (f"{ENCODER}.embed_positions",)  # sinusoids
    files: tuple[str, ...] = (*AudioSeq2Seq.files, "normalizer.json")
    load_encoder = EncoderMethods.load_encoder
    encode = EncoderMethods.encode

    def __init__(self, model_type: str = "whisper") -> None:
        super().__init__(model_type)

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> WhisperFrontEnd:
        with library_errors(f"--model_id {model_id}: its configuration or tokenizer cannot be used"):
            return WhisperFrontEnd(model_id, trim_audio=trim_audio)

    def prepare(self, model: Any, model_id: str) -> None:
        """Complete the generation config of a loaded base."""
        model.generation_config.forced_decoder_ids = None  # our prompts contain language and task
        _set_token_ids(model.generation_config, self.front_end(model_id))

    def audio_path(self, model: Any) -> EncoderOutputs:
        """The encoder: mel_WFT -> states_WPD."""
        return EncoderOutputs(unwrap_peft(model).model.encoder)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Make a model call ``run`` instead of the encoder."""
        encoder = unwrap_peft(model).model.encoder
        replace_audio_encoder(encoder, encoder, "forward", "last_hidden_state", run)

    def encode_audio(self, base: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Inputs of the decoder: the encoder's outputs states_BPD for whole windows, all of which count."""
        return {"encoder_hidden_states": _encode(base, batch["input_features"])}

    def complete_prompts(self, base: Any, batch: Batch, states_BPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Insert the language that the model detects into prompts of the batch that have no language token.

        Returns:
            ids_BL and mask_BL, left-padded; one token longer if a prompt lacked a language. The batch holds them too.
        """
        ids_BL, mask_BL = batch["input_ids"], batch["attention_mask"]
        languages = torch.tensor(sorted(_language_ids(base).values()), device=ids_BL.device)
        prompts = [ids[mask.bool()] for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        rows = [row for row, ids in enumerate(prompts) if len(languages) and not torch.isin(ids, languages).any()]
        if not rows:
            return ids_BL, mask_BL
        start_id = base.config.decoder_start_token_id
        starts = [int((prompts[row] == start_id).nonzero()[0]) for row in rows]  # a context may stand before it
        start_R1 = torch.full((len(rows), 1), start_id, device=ids_BL.device)
        with eager_mode(base.model.decoder):
            hidden_R1D = base.model.decoder(
                input_ids=start_R1, encoder_hidden_states=states_BPD[rows], use_cache=False
            ).last_hidden_state
        detected_R = languages[base.proj_out(hidden_R1D[:, -1])[:, languages].argmax(-1)]
        for row, start, language in zip(rows, starts, detected_R, strict=True):
            prompts[row] = torch.cat([prompts[row][: start + 1], language[None], prompts[row][start + 1 :]])
        batch["input_ids"], batch["attention_mask"] = ids_BL, mask_BL = pad_rows(prompts, "left")
        return ids_BL, mask_BL

    @torch.no_grad()
    def generate(self, model: Any, batch: Batch, *, num_samples: Sequence[int] = (), **options: Any) -> torch.Tensor:
        """Generate transcripts or translations, by the tokens of the prompts.

        Recordings of several windows go through transformers' sequential algorithm.

        Prompts without a language get the language that the model detects, in ``batch`` as well.

        Returns:
            ids_BL of the new tokens, padded on the right, with time tokens if the prompt asks for them.
        Raises:
            ValueError: A recording of several windows, or a row with times, is stored as encoder outputs.
        """
        from transformers.modeling_outputs import BaseModelOutput

        base, features = unwrap_peft(model), batch["input_features"]
        with_times = base.generation_config.no_timestamps_token_id not in batch["input_ids"][0]
        is_long = len(features) > len(batch["input_ids"])
        if (with_times or is_long) and isinstance(base.model.encoder, PassThrough):
            raise ValueError(
                "long recordings and rows with times are transcribed window by window, which needs --store mel or pcm16"
            )
        with eager_mode(base.model.decoder):
            if is_long:
                return self._generate_long(base, batch, num_samples, options)
            states_BPD = _encode(base, features)
            ids_BL, mask_BL = self.complete_prompts(base, batch, states_BPD)
            free_positions = base.config.max_target_positions - ids_BL.shape[1]  # a detected language takes one
            options["max_new_tokens"] = min(options["max_new_tokens"], free_positions)
            # With times transformers may run the encoder again on the audio after the last time token.
            encoder_outputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states_BPD)}
            return base.generate(
                **({"input_features": features.to(base.dtype)} if with_times else encoder_outputs),
                decoder_input_ids=ids_BL,  # replaces the prompt that generate would build from the language below
                decoder_attention_mask=mask_BL,
                return_timestamps=with_times,
                **({"language": "en", "task": "transcribe"} if _language_ids(base) else {}),
                **options,
            )

    def _generate_long(
        self, base: Any, batch: Batch, num_samples: Sequence[int], options: dict[str, Any]
    ) -> torch.Tensor:
        """Transcribe or translate recordings of several windows together. In each of them, a window begins at the end
        time that was written for the previous one. A context stands before every window of its recording."""
        mel_WFT = batch["input_features"]
        counts = [-(-number // (mel_WFT.shape[-1] * HOP_SAMPLES)) for number in num_samples]
        firsts = [0, *accumulate(counts[:-1])]
        ids_BL, mask_BL = self.complete_prompts(base, batch, _encode(base, mel_WFT[firsts]))
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        frames = [number // HOP_SAMPLES for number in num_samples]
        clips = [
            torch.cat(list(windows), -1)[:, :end].T for windows, end in zip(mel_WFT.split(counts), frames, strict=True)
        ]
        requests = [_task_and_context(base, prompt) for prompt in prompts]
        answers: dict[int, torch.Tensor] = {}
        for request in dict.fromkeys(requests):  # transformers takes one task and context for all recordings
            rows = [row for row, each in enumerate(requests) if each == request]
            languages = [_language(base, prompts[row]) for row in rows]
            ids_BL = _generate_recordings(base, [clips[row] for row in rows], languages, *request, options)
            answers |= zip(rows, ids_BL, strict=True)
        ordered = [answers[row] for row in range(len(prompts))]
        return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=base.config.eos_token_id)


def _generate_recordings(
    base: Any,
    clips: Sequence[torch.Tensor],
    languages: Sequence[str | None],
    task: str,
    context: Sequence[int],
    options: dict[str, Any],
) -> torch.Tensor:
    """Token ids ids_BL of recordings of one task and context, by transformers' algorithm.

    Args:
        clips: Log-mel of each recording, shape (frames, F).
    """
    named: dict[str, Any] = {"language": list(languages) if languages[1:] else languages[0], "task": task}
    request = named if _language_ids(base) else {}
    request |= {"prompt_ids": torch.tensor(context, device=clips[0].device)} if context else {}
    mel_BFT = torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True).transpose(1, 2).to(base.dtype)
    if languages[1:]:  # a single recording has no padding
        frames = torch.tensor([len(clip) for clip in clips], device=mel_BFT.device)
        request["attention_mask"] = first_columns(frames, mel_BFT.shape[2])
    return base.generate(input_features=mel_BFT, return_timestamps=True, **request, **options)


def _language(base: Any, prompt: Sequence[int]) -> str | None:
    """transformers' name of the language in a prompt."""
    tokens = {token_id: token.strip("<|>") for token, token_id in _language_ids(base).items()}
    return next((tokens[each] for each in prompt if each in tokens), None)


def _task_and_context(base: Any, prompt: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """transformers' name of the task that a prompt asks for, and the token ids before the start of the transcript."""
    translate = (getattr(base.generation_config, "task_to_id", None) or {}).get("translate", -1)
    context = prompt[: prompt.index(base.config.decoder_start_token_id)]
    return "translate" if translate in prompt else "transcribe", tuple(context)


def _language_ids(base: Any) -> dict[str, int]:
    """{language token: id}; empty for English-only models."""
    return getattr(base.generation_config, "lang_to_id", None) or {}


def _set_token_ids(config: Any, front_end: WhisperFrontEnd) -> None:
    """Set the ids of control tokens in a generation config. Those of 2022 and early 2023 lack them."""
    config.no_timestamps_token_id, config.is_multilingual = front_end.no_times_id, front_end.is_multilingual
    if front_end.is_multilingual:
        config.lang_to_id, config.task_to_id = front_end.lang_to_id, front_end.task_to_id


def _encode(base: Any, features: torch.Tensor) -> torch.Tensor:
    """Encoder outputs states_BPD of whole windows; stored encoder outputs are returned as they are."""
    features = features if isinstance(base.model.encoder, PassThrough) else features.to(base.dtype)
    return base.model.encoder(features, return_dict=True).last_hidden_state
