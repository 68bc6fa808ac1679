"""Train the tiny Voxtral from scratch on synthetic speech.

It learns transcription and questions (spoken and written). Its answers have full endings, where the corpus has single
words: that is left to fine-tuning too.
"""

from __future__ import annotations

import random
from pathlib import Path

import texts
import torch
from corpus import HeldOut
from examples import Encoder, Example, collate, feature_extractor, log_mels
from pretrain import CtcHead, fit, safe_utterance, speak_base, spec_augment
from torch.nn import functional
from transformers import GenerationConfig, VoxtralForConditionalGeneration, VoxtralProcessor
from transformers.models.whisper.modeling_whisper import sinusoids
from transformers.tokenization_mistral_common import MistralCommonBackend

from voxray.models.voxtral.tiny import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, tiny_voxtral_config

NUM_CLIPS = {"ko": 5000, "en": 2500}
NUM_STEPS, PEAK_LR = 3500, 1.5e-3
NUM_AUDIO_ROWS, NUM_TEXT_ROWS = 24, 8  # of a batch
SPOKEN_QUESTION_SHARE = 0.4  # of the audio rows
TRANSCRIBE_TOKEN_ID = 34


class Material:
    """Source of the batches: spoken utterances with their log-mels, and any number of written ones."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.rng, self.guard = encoder, random.Random(11), HeldOut().guard
        self.utterances, clips = speak_base(self.rng, self.guard, NUM_CLIPS)
        self.mels = log_mels(clips)

    def batch(self) -> tuple[list[Example], dict[str, torch.Tensor]]:
        """Draw a batch: transcriptions, spoken questions, written questions."""
        rows = [self._spoken(i) for i in self.rng.sample(range(len(self.utterances)), NUM_AUDIO_ROWS)]
        rows += [self._written() for _ in range(NUM_TEXT_ROWS)]
        batch = collate(rows, self.mels)
        spec_augment(batch["input_features"], self.rng)
        return rows, batch

    def _spoken(self, clip: int) -> Example:
        utterance = self.utterances[clip]
        if self.rng.random() < SPOKEN_QUESTION_SHARE:
            question, answer = texts.ask(self.rng, utterance)
            answer = texts.polite(answer, utterance.language)
            return Example(self.encoder.spoken_question(question), self.encoder.answer(answer), clip)
        return Example(self.encoder.transcription(utterance.language), self.encoder.answer(utterance.text), clip)

    def _written(self) -> Example:
        about = safe_utterance(self.rng, self.rng.choice(["ko", "ko", "en"]), self.guard)
        question, answer = texts.ask(self.rng, about)
        instruction, body = (f"{about.text}. {question}", "") if self.rng.random() < 0.15 else (question, about.text)
        answer = self.encoder.answer(texts.polite(answer, about.language))
        return Example(self.encoder.text_question(instruction, body), answer, None)


def build_model(vocab_size: int) -> VoxtralForConditionalGeneration:
    """Build an untrained model from a fixed seed."""
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration(tiny_voxtral_config(vocab_size))
    positions = model.model.audio_tower.embed_positions.weight
    positions.data.copy_(sinusoids(*positions.shape))
    return model


def losses(
    model: VoxtralForConditionalGeneration, ctc_head: CtcHead, rows: list[Example], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer loss (mean over answer tokens), and CTC loss of the transcriptions in the batch."""
    audio = model.get_audio_features(batch["input_features"]).pooler_output
    embeds_BTD = model.get_input_embeddings()(batch["input_ids"])
    is_audio = (batch["input_ids"] == model.config.audio_token_id)[..., None]
    embeds_BTD = embeds_BTD.masked_scatter(is_audio, audio)
    hidden_BTD = model.model.language_model(inputs_embeds=embeds_BTD, attention_mask=batch["attention_mask"])[0]
    labels_BT = batch["labels"][:, 1:]
    on_answer = labels_BT != -100
    logits = model.lm_head(hidden_BTD[:, :-1][on_answer])
    answer_loss = functional.cross_entropy(logits, labels_BT[on_answer])

    spoken = [row for row in rows if row.clip is not None]
    audio_BTD = audio.reshape(len(spoken), -1, audio.shape[-1])
    transcribed = [i for i, row in enumerate(spoken) if row.prompt[-1] == TRANSCRIBE_TOKEN_ID]
    return answer_loss, ctc_head.loss(audio_BTD[transcribed], [spoken[i].answer[:-1] for i in transcribed])


def train_base(folder: Path) -> None:
    """Train the base model and write the model folder beside its ``tekken.json``."""
    torch.set_num_threads(2)
    encoder = Encoder(folder / "tekken.json")
    model = build_model(encoder.tekken.n_words)
    material = Material(encoder)
    known = {t for one in material.utterances for t in encoder.answer(one.text)[:-1]}
    ctc_head = CtcHead(model.config.text_config.hidden_size, known)
    model.train()
    fit(
        [model, ctc_head],
        lambda: losses(model, ctc_head, *material.batch()),
        lambda: write_model(folder, model),
        NUM_STEPS,
        PEAK_LR,
    )


def write_model(folder: Path, model: VoxtralForConditionalGeneration) -> None:
    """Write float16 weights with a float32 config: half the bytes, and a loaded model computes in float32."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_TOKEN_ID, eos_token_id=EOS_TOKEN_ID, pad_token_id=PAD_TOKEN_ID, do_sample=False
    )
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    feature_extractor().save_pretrained(folder)  # the published folder has preprocessor_config.json as well
    processor = VoxtralProcessor(feature_extractor(), MistralCommonBackend.from_pretrained(folder))
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # save_pretrained makes it readable for its owner only
