"""Whisper: an encoder over one window of 30 s, and a decoder that writes what it hears.

The tokens of a row are the decoder's alone; what the encoder makes of the clip is looked at by cross attention. Longer
recordings go through Whisper's own algorithm, window by window, each beginning where the last one says that it ended.

Shape letters: B rows (one window each, so W too), R some of them, L tokens, T mel frames of a window, F mel bins, P
encoder positions, D width, N answer positions, V vocabulary.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from voxray.audio.logmel import HOP_SAMPLES
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.models.hf_files import base_of, model_file, outlined
from voxray.models.interface import AudioPath, UsualFamily
from voxray.models.parts.audio_encoder import (
    Outputs,
    PassThrough,
    encode,
    hear_through,
    load_alone,
    weights_fingerprint,
)
from voxray.models.parts.cpu_lm_head import linear_of_few
from voxray.models.parts.cross_kv_cache import CrossDecoding
from voxray.models.parts.layer_compile import compile_layers, uncompiled
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel
from voxray.models.parts.quantize import load_frozen

TEMPLATE_VERSION = "whisper-1"
ENCODER = "encoder"
MAX_AUDIO_SEC = 2 * 3600.0  # of one recording; 230 MB of log-mel
ENGLISH_VOCABULARY = 51_864  # tokens of the English-only checkpoints; the others have one more at least
TIME_STEP_SEC = 0.02  # of Whisper's time tokens: two mel frames


class WhisperFrontEnd(WindowedLogMel):
    """Whisper's features and prompts, equal to ``WhisperProcessor``'s (tests hold the two against each other).

    Args:
        model_id: Base model.
        trim_audio: Not possible: a clip has no tokens in the prompt.
    """

    max_audio_sec = MAX_AUDIO_SEC
    max_windows: int | None = 1
    trims_audio = False

    def __init__(self, model_id: str, *, trim_audio: bool = False) -> None:
        from transformers import GenerationConfig, WhisperConfig, WhisperTokenizer
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        if trim_audio:
            raise SettingsError("--trim_audio_tokens: Whisper has no audio tokens in its prompts; leave it out")
        config: Any = WhisperConfig.from_pretrained(model_id)
        super().__init__(model_id, config.num_mel_bins, config.max_source_positions)
        self.encoder_dim: int = config.d_model
        self.outside_positions: int = config.max_source_positions
        self.max_positions: int = config.max_target_positions
        try:
            self._tokenizer: Any = WhisperTokenizer.from_pretrained(model_id)
        except (OSError, ValueError) as error:
            raise RunError(
                f"--model_id {model_id}: no usable tokenizer: {' '.join(str(error).split())[:200]}"
            ) from None
        try:
            generation: Any = GenerationConfig.from_pretrained(model_id)
        except OSError:
            generation = None  # checkpoints of old trainers have none
        self.eos_id = self.pad_id = self._id("<|endoftext|>")
        self.start_id = self._id("<|startoftranscript|>")
        self.no_times_id = self._id("<|notimestamps|>")
        # English-only checkpoints have neither language nor task in their prompts
        self.is_multilingual = bool(getattr(generation, "is_multilingual", config.vocab_size != ENGLISH_VOCABULARY))
        self.needs_language = self.is_multilingual
        known = {f"<|{code}|>": self._tokenizer.convert_tokens_to_ids(f"<|{code}|>") for code in LANGUAGES}
        known = {token: number for token, number in known.items() if number != self.eos_id}
        self.language_ids: dict[str, int] = getattr(generation, "lang_to_id", known) if self.is_multilingual else {}
        how = [FEATURES_VERSION, TEMPLATE_VERSION, self.num_mel_bins, self.window_frames, self.is_multilingual]
        self.fingerprint = hashlib.sha256(json.dumps([*how, self._tokenizer_hash()]).encode()).hexdigest()

    def _id(self, token: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(token)
        if self._tokenizer.convert_ids_to_tokens(found) != token:  # what it does not know is <|endoftext|> to it
            raise RunError(f"--model_id {self.model_id}: its tokenizer has no {token}")
        return found

    def _tokenizer_hash(self) -> str:
        names = ("tokenizer.json",)
        try:
            paths = [model_file(self.model_id, name) for name in names]
        except RunError:  # older checkpoints have the vocabulary in two files
            paths = [model_file(self.model_id, name) for name in ("vocab.json", "merges.txt")]
        return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to where the answer starts: ``<|startoftranscript|><|ko|><|transcribe|><|notimestamps|>``.

        A row that names no language has no token of one; the model finds it out before it answers. A row that says when
        its parts are said is written with times, so ``<|notimestamps|>`` is left out.

        Raises:
            BadRow: Whisper does not answer such a row, or does not know the language.
        Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022), figure 1.
        """
        if sample.task.name not in Whisper.tasks:
            raise BadRow(
                "unsupported_task", f"Whisper transcribes and does nothing else; this is a row of {sample.task.name}"
            )
        ids = [self.start_id]
        if self.is_multilingual:
            if sample.language:
                ids.append(self._language_id(sample.language))
            ids.append(self._id("<|transcribe|>"))
        return ids if sample.segments else [*ids, self.no_times_id]

    def _language_id(self, language: str) -> int:
        token = f"<|{language}|>"
        if token not in self.language_ids:
            raise BadRow(
                "bad_language", f"language {language!r} is none of the {len(self.language_ids)} that this model has"
            )
        return self.language_ids[token]

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the transcript, with the times of its segments if it has any, and the end of text."""
        ids: list[int] = []
        if not segments:
            ids = self._encode(text)
        for start, end, part in segments:
            ids += [self._time_id(start), *self._encode(f" {part}"), self._time_id(end)]
        return [*ids, self.eos_id]

    def _time_id(self, sec: float) -> int:
        longest = self.window_samples / self.sample_rate_hz
        return self.no_times_id + 1 + round(min(sec, longest) / TIME_STEP_SEC)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None

    def is_answered_alone(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Recordings of several windows and rows with times: what is written next depends on the times before it."""
        return num_windows > 1 or self.no_times_id not in prompt_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens and times, which all come after the tokens of text."""
        return self._tokenizer.decode([int(token) for token in ids if token < self.eos_id])

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people, control tokens and times kept."""
        runs = itertools.groupby((int(token) for token in ids), lambda token: token < self.eos_id)
        convert = self._tokenizer.convert_ids_to_tokens
        return "".join(
            self.decode(run) if text else "".join(convert(run)) for text, run in ((t, list(r)) for t, r in runs)
        )


class Whisper(UsualFamily):
    """Whisper's model side."""

    name = "whisper"
    job = "train_whisper"
    tasks: tuple[str, ...] = ("asr",)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType({ENCODER: (ENCODER,), "decoder": ("decoder", "proj_out")})
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType(
        dict.fromkeys((ENCODER, "decoder"), ("q_proj", "v_proj"))
    )
    fixed: tuple[str, ...] = ("encoder.embed_positions",)  # sinusoids
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

    def outline(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """The model without weights (see ``models.family.Family``)."""
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        config = WhisperConfig.from_pretrained(model_id)
        return outlined(lambda: WhisperForConditionalGeneration._from_config(config, dtype=dtype), model_id)

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
        base = base_of(model)
        base.model.encoder = PassThrough(base.dtype)

    def audio_path(self, model: Any) -> Outputs:
        """The encoder: mel_WFT -> states_WPD."""
        return Outputs(base_of(model).model.encoder)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Let what ``audio_path`` gives come from elsewhere, and free the memory of the encoder's layers."""
        hear_through(base_of(model).model.encoder, run)

    def compile_layers(self, model: Any) -> None:
        """Let ``answer_logits`` run compiled layers of encoder and decoder; ``generate`` leaves them as they are.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        parts = base_of(model).model
        for part in (parts.encoder, parts.decoder):
            if not isinstance(part, PassThrough):
                compile_layers(part, model.device)

    def answer_logits(
        self, model: Any, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor, *, touched: Sequence[str] = ()
    ) -> torch.Tensor:
        """Logits at the chosen positions only.

        Args:
            model: The base or its PEFT wrapper.
            batch: As ``collate`` makes it, padded or packed, without labels and tasks.
            keep_BL: True where the next token is to be predicted.
            touched: Roles that take part even in a batch without audio; there is none here.
        Returns:
            logits_NV.
        """
        base = base_of(model)
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
    def begin(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CrossDecoding, torch.Tensor]:
        """Read left-padded prompts, to continue them token by token (see ``models.family.Family``).

        What generation_config.json suppresses is suppressed here too: some tokens always, some at the beginning.
        """
        base = base_of(model)
        generation = base.generation_config
        always, first = generation.suppress_tokens or [], generation.begin_suppress_tokens or []

        def run(encoder_hidden_states: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
            if encoder_hidden_states is None:  # what a row heard is remembered; this only says that there is something
                encoder_hidden_states = states_BPD[: len(inputs["input_ids"]), :0]
            with uncompiled(base.model.decoder):
                hidden_BLD = base.model.decoder(
                    encoder_hidden_states=encoder_hidden_states, use_cache=True, **inputs
                ).last_hidden_state
            logits_BV = linear_of_few(base.proj_out, hidden_BLD[:, -1])
            logits_BV[:, always] = -torch.inf
            return logits_BV

        with uncompiled(base.model.decoder):
            states_BPD = _heard(base, batch["input_features"])
        ids_BL, mask_BL = self._with_languages(base, batch["input_ids"], batch["attention_mask"], states_BPD)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "encoder_hidden_states": states_BPD}
        state, logits_BV = CrossDecoding.begin(run, inputs)
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

        base, features = base_of(model), batch["input_features"]
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
