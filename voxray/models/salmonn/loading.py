"""A SALMONN out of its official files."""

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, WhisperModel
from transformers.utils import logging

from voxray.core.errors import RunError, SettingsError, one_line
from voxray.models.salmonn.audio_path import TRAINED
from voxray.models.salmonn.beats import Beats
from voxray.models.salmonn.checkpoint import (
    Trained,
    load_beats_weights,
    load_trained,
    official_name,
    read_beats,
    read_tensors,
    read_trained,
)
from voxray.models.salmonn.config import BeatsConfig, SalmonnConfig, qformer_config
from voxray.models.salmonn.model import SalmonnForConditionalGeneration

PAD_TOKEN = "[PAD]"
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 8, 32, 0.1
LORA_LAYERS = ("q_proj", "v_proj")
BERT_WIDTH, BERT_HEADS, BERT_FFN, QFORMER_LAYERS = 768, 12, 3072, 2  # bert-base, of which two layers are built

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
    """Build a SALMONN in eval mode, in which exactly what SALMONN trains requires gradients.

    Args:
        whisper: Folder of a Whisper model; its encoder is taken.
        beats: A BEATs file.
        llm: Folder of a language model with its tokenizer.
        checkpoint: What was trained; without one, all of it is new.
        pad_rows: The [PAD] rows of the language model (see ``set_pad_rows``).
        dtype: Of the parts that do not train; what trains is float32.
        lora: Put LoRA around the language model, as a checkpoint has it or else as SALMONN's training starts. Without,
            a checkpoint's LoRA is left out.
        qformer_heads: Attention heads of the Q-Former, which no file tells; bert-base's if left out.
        llm_options: For ``from_pretrained`` of the language model.
    Raises:
        RunError: Files are missing, damaged, or do not fit each other.
    """
    logging.disable_progress_bar()
    trained = None if checkpoint is None else read_trained(checkpoint)
    beats_config, beats_weights = read_beats(beats)
    encoder = load_whisper_encoder(whisper, dtype)
    language_model = load_llm(llm, dtype, **llm_options)
    config = build_config(trained, encoder.config, beats_config, language_model.config, qformer_heads)
    model = SalmonnForConditionalGeneration(config, encoder, language_model)
    load_beats_weights(model.beats, beats_weights, str(beats))
    model.beats.to(dtype)
    if pad_rows is not None:
        set_pad_rows(model, pad_rows)
    freeze(model)
    if lora and (trained is None or trained.lora_rank):
        wrap_llm(model, trained)
    if trained is not None:
        load_trained(model, trained if lora else trained.without_lora())
    return model.eval()


def load_whisper_encoder(folder: str | Path, dtype: torch.dtype) -> Any:
    """The encoder of a Whisper model.

    Raises:
        RunError: It cannot be read.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a decoder's head is in some files, and has no place here
    try:
        model: Any = WhisperModel.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: cannot load Whisper: {one_line(error, 200)}") from None
    finally:
        logging.set_verbosity(before)
    return model.encoder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, with [PAD] after all its tokens.

    Raises:
        RunError: It cannot be read.
    """
    files = Path(folder)
    if (files / "tokenizer.model").is_file() and not (files / "tokenizer.json").is_file() and not _has_sentencepiece():
        raise RunError(f"{folder}: its only tokenizer is tokenizer.model, which needs: pip install sentencepiece")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise RunError(f"{folder}: cannot load the tokenizer: {one_line(error, 200)}") from None
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def end_token(tokenizer: Any, end_sym: str) -> int:
    """The token that ends an answer.

    Raises:
        SettingsError: The text is several tokens, which no answer would end with.
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
    """A language model with a row for [PAD].

    SALMONN draws that row at random and never stores it. No [PAD] is ever read here, but as an answer it is one more
    choice, so the row is made the same every time: the mean of the others.

    Raises:
        RunError: It cannot be read.
    """
    num_tokens = len(load_tokenizer(folder))
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: cannot load the language model: {one_line(error, 200)}") from None
    num_rows = model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_rows:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[num_rows:] = layer.weight[:num_rows].float().mean(0).to(layer.weight.dtype)
    return model


def build_config(
    trained: Trained | None, speech: Any, beats: BeatsConfig, text: Any, qformer_heads: int | None = None
) -> SalmonnConfig:
    """The shapes of a SALMONN, of which a checkpoint tells the Q-Former's."""
    width, ffn, layers, num_query, settings = BERT_WIDTH, BERT_FFN, QFORMER_LAYERS, 1, {}
    if trained is not None:
        settings = trained.settings
        _, num_query, width = trained.shape("speech_query_tokens")
        layer = "speech_Qformer.bert.encoder.layer.{}.intermediate_query.dense.weight"
        ffn = trained.shape(layer.format(0))[0]
        layers = sum(layer.format(number) in trained.tensors for number in range(len(trained.tensors)))
    # Q-Former and BEATs are equally wide in every known SALMONN; another width than BERT's is cut as BEATs cuts it.
    heads = qformer_heads or (BERT_HEADS if width == BERT_WIDTH else beats.encoder_attention_heads)
    seconds = float(settings.get("second_per_window", 0.333333))
    qformer = qformer_config(
        width=width, heads=heads, ffn=ffn, layers=layers, encoder_width=speech.d_model + beats.encoder_embed_dim
    )
    return SalmonnConfig(
        # Copies: a configuration of parts sets theirs back, and a language model that lost its kind of attention there
        # would see what comes after.
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
    """Let only what SALMONN trains require gradients: LoRA, wherever there is some, and all between the towers and the
    language model.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.split(".")[0] in TRAINED or ".lora_" in name)


def wrap_llm(model: SalmonnForConditionalGeneration, trained: Trained | None = None) -> None:
    """Put LoRA around the language model: a checkpoint's shapes and scale, or those that SALMONN starts with."""
    from peft import LoraConfig, get_peft_model

    settings = trained.settings if trained is not None else {}
    config = LoraConfig(
        r=(trained.lora_rank if trained is not None else 0) or LORA_RANK,
        lora_alpha=int(settings.get("lora_alpha", LORA_ALPHA)),
        lora_dropout=float(settings.get("lora_dropout", LORA_DROPOUT)),
        target_modules=(trained.lora_layers if trained is not None else []) or list(LORA_LAYERS),
    )
    model.llama_model = get_peft_model(model.llama_model, config)


def set_pad_rows(model: SalmonnForConditionalGeneration, rows: str | Path | PadRows) -> None:
    """Set the [PAD] rows of the language model's embedding and head.

    Args:
        rows: {name of a weight: row}, or a file that holds that as its ``pad_rows``, or its content.
    Raises:
        RunError: The file cannot be read, or the rows are not the two.
    """
    path = "pad_rows" if isinstance(rows, Mapping) else str(rows)
    found: Any = rows.get("pad_rows", rows) if isinstance(rows, Mapping) else read_tensors(rows, "pad_rows")
    weights = {official_name(name): weight for name, weight in model.named_parameters()}
    for name, row in found.items():
        if name not in weights or weights[name].shape[1:] != row.shape:
            raise RunError(f"{path}: {name} is no row of the language model")
        with torch.no_grad():
            weights[name][-1] = row


def load_beats(path: str | Path, *, classes: bool = False) -> Beats:
    """BEATs alone, in float32 and eval mode.

    Args:
        classes: Keep the classifier of a fine-tuned file, for ``Beats.probabilities``.
    Raises:
        RunError: See ``checkpoint.read_beats``.
    """
    config, weights = read_beats(path, classes=classes)
    beats = Beats(config)
    load_beats_weights(beats, weights, str(path))
    return beats.requires_grad_(False).eval()
