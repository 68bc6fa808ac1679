"""Train the tiny base model from scratch, on speech made on the fly.

It learns transcription and questions (spoken and written) from English voices and Korean men, so it can hear but knows
no Korean woman and no bare-word answers: that is left to fine-tuning. A CTC loss on the projector's output, with a
head that is thrown away, teaches the ear first; without it attention takes far longer to find the audio.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import texts
import torch
import voices
from corpus import HeldOut
from examples import Encoder, Example, collate, feature_extractor, log_mels
from torch.nn import functional
from transformers import GenerationConfig, VoxtralForConditionalGeneration, VoxtralProcessor
from transformers.tokenization_mistral_common import MistralCommonBackend

from voxray.models.tiny import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, tiny_voxtral_config

NUM_CLIPS = {"ko": 5000, "en": 2500}
NUM_STEPS, WARMUP_STEPS, PEAK_LR = 3500, 200, 1.5e-3
NUM_AUDIO_ROWS, NUM_TEXT_ROWS = 24, 8  # of a batch
SPOKEN_QUESTION_SHARE = 0.4  # of the audio rows
CTC_WEIGHT = 0.3
TRANSCRIBE_TOKEN_ID = 34


class Material:
    """Everything a batch is drawn from: spoken utterances with their log-mels, and endless written ones."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.rng, self.guard = encoder, random.Random(11), HeldOut().guard
        self.said: list[texts.Utterance] = []
        for language, num in NUM_CLIPS.items():
            self.said += [self._safe_utterance(language) for _ in range(num)]
        lines = [(one.text, voices.draw_speaker(self.rng, one.language, adaptation=False)) for one in self.said]
        started = time.perf_counter()
        clips = voices.speak_all(lines)
        short = [i for i, clip in enumerate(clips) if len(clip) <= voices.MAX_SEC * voices.SAMPLE_RATE_HZ]
        self.said = [self.said[i] for i in short]
        self.mels = log_mels([clips[i] for i in short])
        print(f"base: {len(short)} clips in {time.perf_counter() - started:.0f} s", flush=True)

    def batch(self) -> tuple[list[Example], dict[str, torch.Tensor]]:
        """Draw a batch: transcriptions, spoken questions, written questions."""
        rows = [self._spoken(i) for i in self.rng.sample(range(len(self.said)), NUM_AUDIO_ROWS)]
        rows += [self._written() for _ in range(NUM_TEXT_ROWS)]
        batch = collate(rows, self.mels)
        spec_augment(batch["input_features"], self.rng)
        return rows, batch

    def _safe_utterance(self, language: str) -> texts.Utterance:
        while self.guard.leaks((one := texts.utterance(self.rng, language)).text):
            pass
        return one

    def _spoken(self, clip: int) -> Example:
        said = self.said[clip]
        if self.rng.random() < SPOKEN_QUESTION_SHARE:
            question, answer = texts.ask(self.rng, said)
            answer = texts.polite(answer, said.language)
            return Example(self.encoder.spoken_question(question), self.encoder.answer(answer), clip)
        return Example(self.encoder.transcription(said.language), self.encoder.answer(said.text), clip)

    def _written(self) -> Example:
        about = self._safe_utterance(self.rng.choice(["ko", "ko", "en"]))
        question, answer = texts.ask(self.rng, about)
        instruction, body = (f"{about.text}. {question}", "") if self.rng.random() < 0.15 else (question, about.text)
        answer = self.encoder.answer(texts.polite(answer, about.language))
        return Example(self.encoder.text_question(instruction, body), answer, None)


def spec_augment(mels_BFT: torch.Tensor, rng: random.Random) -> None:
    """Mask, in place, one band of up to 16 mel bins and two spans of up to 12 frames in each clip."""
    for mel_FT in mels_BFT:
        fill = mel_FT.mean()
        width, low = rng.randint(0, 16), rng.randint(0, 111)
        mel_FT[low : low + width] = fill
        for _ in range(2):
            width, start = rng.randint(0, 12), rng.randint(0, 250)
            mel_FT[:, start : start + width] = fill


def sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """Compute Whisper's fixed positions, (num_positions, width): transformers leaves them to the checkpoint."""
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(num_positions)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_model(vocab_size: int) -> VoxtralForConditionalGeneration:
    """Build an untrained model from a fixed seed."""
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration(tiny_voxtral_config(vocab_size))
    positions = model.model.audio_tower.embed_positions.weight
    positions.data.copy_(sinusoids(*positions.shape))
    return model


def losses(
    model: VoxtralForConditionalGeneration,
    ctc_head: torch.nn.Linear,
    labels_of: dict[int, int],
    rows: list[Example],
    batch: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the answer loss (mean over answer tokens) and the CTC loss of the transcriptions in the batch."""
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
    log_probs = ctc_head(audio.reshape(len(spoken), -1, audio.shape[-1])).log_softmax(-1)
    heard = [i for i, row in enumerate(spoken) if row.prompt[-1] == TRANSCRIBE_TOKEN_ID]
    targets = [[labels_of[t] for t in spoken[i].answer[:-1]] for i in heard]
    ctc_loss = functional.ctc_loss(
        log_probs[heard].transpose(0, 1),
        torch.tensor([t for target in targets for t in target]),
        torch.full((len(heard),), log_probs.shape[1]),
        torch.tensor([len(target) for target in targets]),
        zero_infinity=True,
    )
    return answer_loss, ctc_loss


def train_base(folder: Path) -> None:
    """Train the base model and write the model folder beside its ``tekken.json``."""
    torch.set_num_threads(2)
    encoder = Encoder(folder / "tekken.json")
    model = build_model(encoder.tekken.n_words)
    material = Material(encoder)
    known = sorted({t for one in material.said for t in encoder.answer(one.text)[:-1]})
    labels_of = {token: i + 1 for i, token in enumerate(known)}  # 0 is the blank
    ctc_head = torch.nn.Linear(model.config.text_config.hidden_size, len(known) + 1)
    params = [p for p in [*model.parameters(), *ctc_head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / NUM_STEPS)))
        return min((step + 1) / WARMUP_STEPS, 1.0) * max(decay, 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.perf_counter()
    model.train()
    for step in range(NUM_STEPS):
        rows, batch = material.batch()
        answer_loss, ctc_loss = losses(model, ctc_head, labels_of, rows, batch)
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + CTC_WEIGHT * ctc_loss).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == NUM_STEPS - 1:
            took = time.perf_counter() - started
            print(f"step {step} answer {answer_loss:.3f} ctc {ctc_loss:.3f} {took:.0f} s", flush=True)
        if step % 500 == 499:
            write_model(folder, model)


def write_model(folder: Path, model: VoxtralForConditionalGeneration) -> None:
    """Write weights in float16 under a float32 config: half the bytes, and loading them computes in float32."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_TOKEN_ID, eos_token_id=EOS_TOKEN_ID, pad_token_id=PAD_TOKEN_ID, do_sample=False
    )
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    feature_extractor().save_pretrained(folder)  # the published folder has preprocessor_config.json as well
    processor = VoxtralProcessor(feature_extractor(), MistralCommonBackend.from_pretrained(folder))
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only
