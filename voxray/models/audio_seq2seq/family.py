"""Encoder-decoders: a decoder that cross-attends to the outputs of an audio encoder writes the transcript.

``facts.FACTS`` lists the model types and what distinguishes them. Prompt and answer tokens are the decoder's only.

Shape letters: B rows (one window each, so W too), L tokens, T mel frames of a window, F mel bins, P encoder positions,
D width, N predicted positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from voxray.config.recipes import load_object
from voxray.core.errors import RunError, library_errors
from voxray.models.audio_seq2seq.encoder import encode_windows, fix_training_mode
from voxray.models.audio_seq2seq.facts import FACTS, HOP_SAMPLES, encoder_config
from voxray.models.audio_seq2seq.front_end import AudioSeq2SeqFrontEnd
from voxray.models.family_defaults import FamilyDefaults
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import build_on_meta, library_class, unwrap_peft
from voxray.models.interface import AudioPath, Batch, OutputFn, apply_layer
from voxray.models.parts.audio_encoder import EncoderMethods, PassThrough, first_columns
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.cross_kv_cache import CrossDecodeState
from voxray.models.parts.layer_compile import compile_layers, eager_mode
from voxray.models.parts.losses import at_positions
from voxray.models.parts.packed_attention import use_training_attention
from voxray.models.parts.quantize import load_frozen

ENCODER = "encoder"


class AudioSeq2Seq(EncoderMethods, FamilyDefaults):
    """The model side of one model type of ``FACTS`` (see ``ModelFamily``)."""

    tasks: tuple[str, ...] = ("asr",)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType({ENCODER: (ENCODER,), "decoder": ("decoder", "proj_out")})
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType(
        dict.fromkeys((ENCODER, "decoder"), ("q_proj", "v_proj"))
    )
    always_frozen: tuple[str, ...] = ("decoder.pos_emb",)  # sinusoids
    quantized: tuple[str, ...] = (ENCODER, "decoder")
    files: tuple[str, ...] = (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template.jinja"),
    )
    encoder_name = ENCODER
    projector_role = ""

    def __init__(self, model_type: str) -> None:
        self.name, self.facts = model_type, FACTS[model_type]
        self.reads_samples = self.facts.is_waveform

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> FrontEnd:
        with library_errors(f"--model_id {model_id}: its configuration or processor cannot be used"):
            return AudioSeq2SeqFrontEnd(model_id, self.facts, trim_audio=trim_audio)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base; ``quantize`` applies to the layers of encoder and decoder."""
        options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize, "keep": ("proj_out",)}
        model = load_frozen(library_class(self.facts.model), model_id, **options)
        self.prepare(model, model_id)
        return model

    def prepare(self, model: Any, model_id: str) -> None:
        """Adjust a base after it is loaded."""
        fix_training_mode(model)

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """Build the base on the meta device."""
        config = self.config(model_id)
        return build_on_meta(lambda: library_class(self.facts.model)._from_config(config, dtype=dtype), model_id)

    def encoder_class(self, model_id: str) -> tuple[Any, Any]:
        return load_object(self.facts.encoder), encoder_config(self.config(model_id))

    def config(self, model_id: str) -> Any:
        """Configuration of a base."""
        return library_class(self.facts.config).from_pretrained(model_id)

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the audio encoder with the whole base, because the names in the weight files differ from its own."""
        return self.load_model(model_id, dtype=dtype, device=device).model.encoder

    @torch.inference_mode()
    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Run the encoder on whole windows; returns states_WPD, with zeros for padding."""
        features_WFT = features_WFT.to(next(encoder.parameters()).device)
        states_WPD = encode_windows(encoder, self.facts, features_WFT, num_samples_W)
        whole = int(self.facts.positions(features_WFT.shape[2] * HOP_SAMPLES, encoder.config))
        return torch.nn.functional.pad(states_WPD, (0, 0, 0, whole - states_WPD.shape[1]))

    def audio_path(self, model: Any) -> torch.nn.Module:
        """Not supported.

        Raises:
            RunError: Always.
        """
        reason = f"the encoder of a {self.name} model reads clips at their own length, so it cannot be compiled"
        raise RunError(f"--model_id {unwrap_peft(model).name_or_path}: {reason}")

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        raise AssertionError("audio_path returned no module")

    def compile_layers(self, model: Any) -> None:
        """Compile the layers of encoder and decoder for ``answer_logits``."""
        inner = unwrap_peft(model).model
        for part in (inner.encoder, inner.decoder):
            if not isinstance(part, PassThrough):
                compile_layers(part, model.device)

    def encode_audio(self, base: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Inputs of the decoder: the encoder's outputs states_BPD, and a mask of those that count."""
        features, num_samples_B = batch["input_features"], batch["num_samples"]
        positions = [self.facts.positions(count, encoder_config(base.config)) for count in num_samples_B.tolist()]
        longest = max(positions)
        if isinstance(base.model.encoder, PassThrough):
            states_BPD = features[:, :longest].to(base.dtype).contiguous()
        else:
            states_BPD = encode_windows(base.model.encoder, self.facts, features, num_samples_B)
        # transformers applies a mask of four dimensions as it is, in every step.
        positions_B = torch.tensor(positions).to(features.device, non_blocking=True)
        mask_B11P = first_columns(positions_B, longest)[:, None, None]
        return {"encoder_hidden_states": states_BPD, "encoder_attention_mask": mask_B11P}

    def complete_prompts(self, base: Any, batch: Batch, states_BPD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of the prompts, ids_BL and mask_BL, after the clips have been encoded."""
        return batch["input_ids"], batch["attention_mask"]

    def answer_logits(
        self,
        model: Any,
        batch: Batch,
        positions_N: torch.Tensor,
        output: OutputFn = apply_layer,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """Compute logits_NV at selected positions; every row has audio, so ``roles_in_every_pass`` has no effect."""
        base, decoder = unwrap_peft(model), unwrap_peft(model).model.decoder
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if "segment_ends" in batch:
            inputs, index_L = _unpack_rows(batch["input_ids"][0], batch["segment_ends"].tolist())
            positions_N = index_L.index_select(0, positions_N)
        assert len(inputs["input_ids"]) == len(batch["input_features"]), "one window a row"
        inputs = use_training_attention(decoder, inputs, positions_N.device)
        hidden_BLD = decoder(use_cache=False, **inputs, **self.encode_audio(base, batch)).last_hidden_state
        return output(base.proj_out, at_positions(hidden_BLD, positions_N))

    @torch.no_grad()
    def prefill(self, model: Any, batch: Batch) -> tuple[CrossDecodeState, torch.Tensor]:
        """Run left-padded prompts; returns their state and logits_BV of the first new token.

        Tokens that generation_config.json suppresses, always or at the first position, get logits of minus infinity.
        """
        base = unwrap_peft(model)
        config = base.generation_config
        suppressed, suppressed_first = (
            torch.tensor(ids or [], dtype=torch.int64, device=base.device)
            for ids in (config.suppress_tokens, config.begin_suppress_tokens)
        )
        with eager_mode(base.model.decoder):
            audio = self.encode_audio(base, batch)
        states_BPD = audio["encoder_hidden_states"]
        ids_BL, mask_BL = self.complete_prompts(base, batch, states_BPD)
        no_states_BPD = states_BPD[:, :0].clone()

        def forward(encoder_hidden_states: torch.Tensor = no_states_BPD, **inputs: Any) -> torch.Tensor:
            # After the first call, keys and values are cached; the decoder only checks that there are states.
            with eager_mode(base.model.decoder):
                hidden_BLD = base.model.decoder(
                    encoder_hidden_states=encoder_hidden_states, use_cache=True, **inputs
                ).last_hidden_state
            logits_BV = few_rows_linear(base.proj_out, hidden_BLD[:, -1])
            return logits_BV.index_fill_(1, suppressed, -torch.inf)

        state, logits_BV = CrossDecodeState.prefill(forward, {"input_ids": ids_BL, "attention_mask": mask_BL, **audio})
        return state, logits_BV.index_fill_(1, suppressed_first, -torch.inf)

    @torch.no_grad()
    def generate(self, model: Any, batch: Batch, *, num_samples: Sequence[int] = (), **options: Any) -> torch.Tensor:
        """Generate transcripts with transformers; returns ids_BL of the new tokens, padded on the right."""
        from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderModelOutput

        base = unwrap_peft(model)
        with eager_mode(base.model.decoder):
            audio = self.encode_audio(base, batch)
            encoder_outputs = ParakeetEncoderModelOutput(
                last_hidden_state=audio["encoder_hidden_states"], attention_mask=audio["encoder_attention_mask"]
            )
            ids_BL = base.generate(
                encoder_outputs=encoder_outputs,
                decoder_input_ids=batch["input_ids"],
                decoder_attention_mask=batch["attention_mask"],
                decoder_start_token_id=int(batch["input_ids"][0, 0]),  # generate puts another one before the prompt
                **options,
            )
        return ids_BL[:, batch["input_ids"].shape[1] :]


def _unpack_rows(ids_L: torch.Tensor, ends: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Split a packed row into rows padded on the right.

    Each row cross-attends to its own encoder outputs, and its tokens are few, so packing would gain nothing.

    Args:
        ends: Of every row, the index after its last token.
    Returns:
        ``input_ids`` (B, L), and ``attention_mask`` if any row is padded; and index_L, the position of every token of
        the pack in these rows.
    """
    lengths = np.diff(ends, prepend=0)
    longest = int(lengths.max())
    parts = [row * longest + np.arange(length) for row, length in enumerate(lengths)]
    index_L = torch.from_numpy(np.concatenate(parts)).to(ids_L.device, non_blocking=True)
    zeros = ids_L.new_zeros(len(lengths) * longest)
    inputs = {"input_ids": zeros.index_copy(0, index_L, ids_L).view(len(lengths), longest)}
    if lengths.min() < longest:
        inputs["attention_mask"] = zeros.index_fill(0, index_L, 1).view(len(lengths), longest)
    return inputs, index_L


def pad_rows(rows: Sequence[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded with zeros to ids_BL, and mask_BL, 1 for tokens."""
    masks = [torch.ones_like(row) for row in rows]
    ids_BL, mask_BL = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_side=side) for part in (rows, masks)
    )
    return ids_BL, mask_BL
