"""Train the tiny Whisper from scratch on synthetic windows (see windows.py).

It learns to transcribe with and without timestamps, and to detect the language and silence.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from corpus import HeldOut
from pretrain import CtcHead, fit, speak_base, spec_augment
from torch.nn import functional
from transformers import WhisperForConditionalGeneration, WhisperTokenizer
from whisper_folder import build_model, feature_extractor, write_processor, write_weights
from windows import Window, Windows

NUM_CLIPS = {"ko": 5000, "en": 3000}
NUM_STEPS, BATCH_SIZE, PEAK_LR = 3000, 20, 1.5e-3


def collate(rows: list[Window], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Compute log-mels, (B, 80, 400), and pad the decoder's inputs and labels on the right, (B, T - 1)."""
    extract = feature_extractor()
    mels_BFT = extract([row.samples for row in rows], sampling_rate=16_000, return_tensors="pt")["input_features"]
    for mel_FT, row in zip(mels_BFT, rows, strict=True):
        mel_FT[:, row.num_frames :] = 0.0
    longest = max(len(row.tokens) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_token_id)
    labels_BT = torch.full((len(rows), longest), -100)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.tokens)] = torch.tensor(row.tokens)
        is_learnt = torch.tensor(row.learnt)
        labels_BT[b, : len(row.tokens)][is_learnt] = torch.tensor(row.tokens)[is_learnt]
    return {"input_features": mels_BFT, "decoder_input_ids": ids_BT[:, :-1], "labels": labels_BT[:, 1:]}


def losses(
    model: WhisperForConditionalGeneration, ctc_head: CtcHead, rows: list[Window], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on the learnt tokens (mean over them), and CTC loss of the windows without a cut utterance."""
    audio_BTD = model.model.encoder(batch["input_features"]).last_hidden_state
    decoder = model.model.decoder
    hidden_BTD = decoder(input_ids=batch["decoder_input_ids"], encoder_hidden_states=audio_BTD).last_hidden_state
    is_learnt = batch["labels"] != -100
    logits = model.proj_out(hidden_BTD[is_learnt])
    answer_loss = functional.cross_entropy(logits, batch["labels"][is_learnt])
    complete = [i for i, row in enumerate(rows) if row.spoken]
    return answer_loss, ctc_head.loss(audio_BTD[complete], [row.spoken or () for row in (rows[i] for i in complete)])


def train_whisper(folder: Path) -> None:
    """Train the base model and write the model folder beside its tokenizer."""
    torch.set_num_threads(1)  # such small products gain little from a second thread, and lose much on a busy machine
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    rng = random.Random(12)
    windows = Windows(*speak_base(rng, HeldOut().guard, NUM_CLIPS), tokenizer)
    model = build_model(folder)
    known = {token for one in windows.utterances for token in windows.spoken_ids(one.text)}
    ctc_head = CtcHead(model.config.d_model, known)

    def draw_losses() -> tuple[torch.Tensor, torch.Tensor]:
        rows = [windows.draw(rng) for _ in range(BATCH_SIZE)]
        batch = collate(rows, tokenizer.pad_token_id)
        spec_augment(batch["input_features"], rng)
        return losses(model, ctc_head, rows, batch)

    write_processor(folder)
    model.train()
    fit([model, ctc_head], draw_losses, lambda: write_weights(folder, model), NUM_STEPS, PEAK_LR)
