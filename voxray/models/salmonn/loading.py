"""Build SALMONN from its official files."""

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, WhisperModel
from transformers.utils import logging

from voxray.core.errors import RunError, SettingsError, library_errors
from voxray.models.salmonn.audio_path import TRAINED_MODULES
from voxray.models.salmonn.beats import Beats
from voxray.models.salmonn.compat.checkpoint import (
    SalmonnCheckpoint,
    load_beats_weights,
    load_checkpoint,
    official_name,
    read_beats,
    read_checkpoint,
    read_tensors,
)
from voxray.models.salmonn.config import BeatsConfig, SalmonnConfig, qformer_config
from voxray.models.salmonn.model import SalmonnForConditionalGeneration

PAD_TOKEN = "[PAD]"
LORA_RANK, LORA_DROPOUT, LORA_LAYERS = 8, 0.1, ("q_proj", "v_proj")
"""LoRA options that SALMONN's training starts with; for alpha see ``compat.checkpoint.LORA_ALPHA``."""
BERT_WIDTH, BERT_HEADS, BERT_FFN, QFORMER_LAYERS = 768, 12, 3072, 2  # of bert-base, with two of its layers

PadRows = Mapping[str, torch.Tensor]


def load(
    whisper: str | Path,
    beats: str | Path,
    llm: str | Path,
    checkpoint: str | Path | None = None,
    *,
    pad_rows: str | Path | PadRows | None = None,
    dtype: torch.dtype = torch.float32,
    lora: bool = True,
    qformer_heads: int | None = None,
    **llm_options: Any,
) -> SalmonnForConditionalGeneration:
    """Build SALMONN in eval mode. Exactly the weights that SALMONN trains require gradients.

    Args:
        whisper: Folder of a Whisper model, whose encoder is used.
        beats: A BEATs file.
        llm: Folder of a language model with its tokenizer.
        checkpoint: Checkpoint of the trained weights; without one they are initialized.
        pad_rows: The [PAD] rows of the language model (see ``set_pad_rows``).
        dtype: Type of the weights that do not train; the others are float32.
        lora: Add LoRA to the language model, with the checkpoint's options or else those that SALMONN's training
            starts with. If False, a checkpoint's LoRA is ignored.
        qformer_heads: Attention heads of the Q-Former, which no file states; see ``build_config`` for the default.
        llm_options: Arguments of ``from_pretrained`` for the language model.
    Raises:
        RunError: Files are missing, damaged, or do not fit each other.
    """
    logging.disable_progress_bar()
    stored = None if checkpoint is None else read_checkpoint(checkpoint)
    beats_config, beats_weights = read_beats(beats)
    encoder = load_whisper_encoder(whisper, dtype)
    language_model = load_llm(llm, dtype, **llm_options)
    config = build_config(stored, encoder.config, beats_config, language_model.config, qformer_heads)
    model = SalmonnForConditionalGeneration(config, encoder, language_model)
    load_beats_weights(model.beats, beats_weights, str(beats))
    model.beats.to(dtype)
    if pad_rows is not None:
        set_pad_rows(model, pad_rows)
    freeze(model)
    if lora and (stored is None or stored.lora_rank):
        wrap_llm(model, stored)
    if stored is not None:
        load_checkpoint(model, stored if lora else stored.without_lora())
    return model.eval()


def load_whisper_encoder(folder: str | Path, dtype: torch.dtype) -> Any:
    """Load the encoder of a Whisper model.

    Raises:
        RunError: The model cannot be read.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns about files that also hold the output layer
    try:
        with library_errors(f"{folder}: cannot load Whisper"):
            model: Any = WhisperModel.from_pretrained(folder, dtype=dtype)
    finally:
        logging.set_verbosity(before)
    return model.encoder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model, and add [PAD] as its last token.

    Raises:
        RunError: It cannot be read.
    """
    files = Path(folder)
    if (files / "tokenizer.model").is_file() and not (files / "tokenizer.json").is_file() and not _has_sentencepiece():
        raise RunError(f"{folder}: its only tokenizer is tokenizer.model, which needs: pip install sentencepiece")
    with library_errors(f"{folder}: cannot load the tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def end_token_id(tokenizer: Any, end_sym: str) -> int:
    """Id of the token that ends an answer.

    Raises:
        SettingsError: ``end_sym`` is not one token, so generation would not stop at it.
    """
    ids = tokenizer.encode(end_sym, add_special_tokens=False)
    if len(ids) != 1:
        raise SettingsError(
            f"--end_sym {end_sym!r}: is {len(ids)} tokens of this language model, so no answer would end; give a text "
            f"that is one, the same in both stages and in evaluation; its own end of text is {tokenizer.eos_token!r}"
        )
    return ids[0]


def _has_sentencepiece() -> bool:
    return importlib.util.find_spec("sentencepiece") is not None


def load_llm(folder: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """Load a language model, and add a row for [PAD] to its embeddings and output layer.

    SALMONN initializes that row at random and never stores it. [PAD] is never a model input here, but it has a logit,
    so the row must always be the same: the mean of the other rows.

    Raises:
        RunError: The model cannot be read.
    """
    num_tokens = len(load_tokenizer(folder))
    with library_errors(f"{folder}: cannot load the language model"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    num_rows = model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_rows:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[num_rows:] = layer.weight[:num_rows].float().mean(0).to(layer.weight.dtype)
    return model


def build_config(
    stored: SalmonnCheckpoint | None, speech: Any, beats: BeatsConfig, text: Any, qformer_heads: int | None = None
) -> SalmonnConfig:
    """Build the configuration from those of the parts. The Q-Former's shapes come from a checkpoint, or else BERT's.

    Args:
        stored: The checkpoint, if any.
        speech, beats, text: Configurations of Whisper, BEATs and the language model.
        qformer_heads: Attention heads of the Q-Former; if None bert-base's, or BEATs' if it is not as wide as BERT.
    Raises:
        RunError: The checkpoint lacks tensors of the Q-Former.
    """
    width, ffn, layers, num_query, settings = BERT_WIDTH, BERT_FFN, QFORMER_LAYERS, 1, {}
    if stored is not None:
        settings = stored.settings
        _, num_query, width = stored.shape("speech_query_tokens")
        layer = "speech_Qformer.bert.encoder.layer.{}.intermediate_query.dense.weight"
        ffn = stored.shape(layer.format(0))[0]
        layers = sum(layer.format(index) in stored.tensors for index in range(len(stored.tensors)))
    # Q-Former and BEATs have the same width in every known SALMONN, so heads of another width are BEATs'.
    heads = qformer_heads or (BERT_HEADS if width == BERT_WIDTH else beats.encoder_attention_heads)
    seconds = float(settings.get("second_per_window", 0.333333))
    qformer = qformer_config(
        width=width, heads=heads, ffn=ffn, layers=layers, encoder_width=speech.d_model + beats.encoder_embed_dim
    )
    return SalmonnConfig(
        # Copies, because SalmonnConfig resets the attention implementation of its parts. The language model shares its
        # configuration object, and without its implementation it would attend to later tokens.
        speech_config=copy.deepcopy(speech),
        beats_config=beats,
        qformer_config=qformer,
        text_config=copy.deepcopy(text),
        num_query=num_query,
        seconds_per_window=seconds,
        seconds_per_stride=float(settings.get("second_stride", seconds)),
        prompt_template=settings.get("prompt_template") or SalmonnConfig.prompt_template,
        end_sym=settings.get("end_sym") or SalmonnConfig.end_sym,
    )


def freeze(model: SalmonnForConditionalGeneration) -> None:
    """Let only what SALMONN trains require gradients: LoRA, and everything between encoders and language model."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.split(".")[0] in TRAINED_MODULES or ".lora_" in name)


def wrap_llm(model: SalmonnForConditionalGeneration, stored: SalmonnCheckpoint | None = None) -> None:
    """Add LoRA to the language model, with a checkpoint's options or those that SALMONN's training starts with."""
    from peft import LoraConfig, get_peft_model

    stored = stored or SalmonnCheckpoint("", {})
    config = LoraConfig(
        r=stored.lora_rank or LORA_RANK,
        lora_alpha=int(stored.lora_alpha),
        lora_dropout=float(stored.settings.get("lora_dropout", LORA_DROPOUT)),
        target_modules=stored.lora_layers or list(LORA_LAYERS),
    )
    model.llama_model = get_peft_model(model.llama_model, config)


def set_pad_rows(model: SalmonnForConditionalGeneration, rows: str | Path | PadRows) -> None:
    """Set the [PAD] rows of the language model's embeddings and output layer.

    Args:
        rows: {official name of a weight: row}, the same under the key ``pad_rows``, or a file of the latter.
    Raises:
        RunError: The file cannot be read, or a row does not fit.
    """
    path = "pad_rows" if isinstance(rows, Mapping) else str(rows)
    new_rows: Any = rows.get("pad_rows", rows) if isinstance(rows, Mapping) else read_tensors(rows, "pad_rows")
    weights = {official_name(name): weight for name, weight in model.named_parameters()}
    for name, row in new_rows.items():
        if name not in weights or weights[name].shape[1:] != row.shape:
            raise RunError(f"{path}: {name} is no row of the language model")
        with torch.no_grad():
            weights[name][-1] = row


def load_beats(path: str | Path, *, classes: bool = False) -> Beats:
    """Load BEATs alone, frozen, in float32 and eval mode.

    Args:
        classes: Keep the classifier of a fine-tuned file, for ``Beats.probabilities``.
    Raises:
        RunError: See ``compat.checkpoint.read_beats``.
    """
    config, weights = read_beats(path, classes=classes)
    beats = Beats(config)
    load_beats_weights(beats, weights, str(path))
    return beats.requires_grad_(False).eval()
