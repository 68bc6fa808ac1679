"""A trainable tiny SALMONN: the tiny Whisper's encoder, the reference's BEATs, the tiny Voxtral's language model, and
new weights between them."""

from pathlib import Path

import torch
from conftest import ASSETS, TINY, WHISPER
from transformers import VoxtralForConditionalGeneration
from transformers.integrations.mistral import convert_tekken_tokenizer

REFERENCE = ASSETS / "salmonn-reference"
QFORMER = {"width": 96, "heads": 4, "ffn": 192, "layers": 2}


def write_llm(folder: Path) -> Path:
    """The tiny Voxtral's language model by itself, with its tokenizer."""
    from transformers import LlamaForCausalLM

    voxtral = VoxtralForConditionalGeneration.from_pretrained(TINY)
    llm = LlamaForCausalLM(voxtral.config.text_config)
    llm.model.load_state_dict(voxtral.model.language_model.state_dict())
    llm.lm_head.load_state_dict(voxtral.lm_head.state_dict())
    llm.save_pretrained(folder)
    convert_tekken_tokenizer(str(Path(TINY) / "tekken.json")).save_pretrained(folder)
    return folder


def write_parts(folder: Path) -> dict[str, str]:
    """{flag: path} of the parts, as the training job takes them instead of a folder."""
    llm = write_llm(folder / "llm")
    return {"whisper_path": WHISPER, "beats_path": str(REFERENCE / "beats.pt"), "llama_path": str(llm)}


def write_tiny(folder: Path, parts: dict[str, str]) -> str:
    """Write the whole model into one folder, with a Q-Former narrower than BERT."""
    from voxray.models.salmonn.compat.checkpoint import load_beats_weights, read_beats
    from voxray.models.salmonn.config import SalmonnConfig, qformer_config
    from voxray.models.salmonn.folder import copy_files, write_folder
    from voxray.models.salmonn.loading import load_llm, load_whisper_encoder
    from voxray.models.salmonn.model import SalmonnForConditionalGeneration

    torch.manual_seed(0)
    parts_folder = folder / "parts"
    write_folder(parts_folder, whisper=parts["whisper_path"], beats=parts["beats_path"], llm=parts["llama_path"])
    encoder, llm = load_whisper_encoder(WHISPER, torch.float32), load_llm(parts["llama_path"], torch.float32)
    beats, weights = read_beats(parts["beats_path"])
    width = encoder.config.d_model + beats.encoder_embed_dim
    config = SalmonnConfig(
        speech_config=encoder.config,
        beats_config=beats,
        qformer_config=qformer_config(**QFORMER, encoder_width=width),
        text_config=llm.config,
        alone=True,
    )
    model = SalmonnForConditionalGeneration(config, encoder, llm)
    load_beats_weights(model.beats, weights, parts["beats_path"])
    whole = folder / "whole"
    model.save_pretrained(whole)
    copy_files(str(parts_folder), whole)
    return str(whole)
