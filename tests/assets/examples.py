"""Turn texts and clips into model inputs: prompts by mistral-common, log-mel windows, padded batches.

This code does not use voxray's data path, so that changes there do not change the stored model. Shapes: B rows, T
tokens, 128 mel bins, 400 frames.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import voices
from mistral_common.protocol.instruct.chunk import AudioChunk, TextChunk
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import WhisperFeatureExtractor

from voxray.models.voxtral.tiny import EOS_TOKEN_ID, PAD_TOKEN_ID, WINDOW_SAMPLES, WINDOW_SEC

MAX_NEW_TOKENS = 28


@dataclass(frozen=True)
class Example:
    """One row: prompt ids, answer ids with EOS, and the clip's index in the feature table (None without audio)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    clip: int | None


class Encoder:
    """Encodes prompts and answers. All clips fill one window, so a prompt does not depend on its clip."""

    def __init__(self, tekken: Path) -> None:
        self.tokenizer = MistralTokenizer.from_file(tekken)
        self.tekken = self.tokenizer.instruct_tokenizer.tokenizer
        self._any_clip = base64.b64encode(voices.encode(np.zeros(16_000, np.float32), ".wav")).decode()

    @lru_cache(maxsize=100)  # noqa: B019 - one encoder lives as long as the process
    def transcription(self, language: str) -> tuple[int, ...]:
        """Prompt of a transcription request."""
        request = TranscriptionRequest(model="voxtral", audio=self._any_clip, language=language)
        return tuple(self.tokenizer.encode_transcription(request).tokens)

    @lru_cache(maxsize=1000)  # noqa: B019
    def spoken_question(self, question: str) -> tuple[int, ...]:
        """Prompt of a user turn: the clip, then the question."""
        return self._chat([AudioChunk(input_audio=self._any_clip), TextChunk(text=question)])

    def text_question(self, instruction: str, about: str) -> tuple[int, ...]:
        """Prompt of a text turn: the instruction, then the input on its own line."""
        return self._chat([TextChunk(text=f"{instruction}\n{about}" if about else instruction)])

    def answer(self, text: str) -> tuple[int, ...]:
        """Answer ids with EOS."""
        return (*self.tekken.encode(text, bos=False, eos=False), EOS_TOKEN_ID)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids up to EOS."""
        ids = ids[: ids.index(EOS_TOKEN_ID)] if EOS_TOKEN_ID in ids else ids
        return self.tekken.decode(ids).strip()

    def row(self, row: dict, clip: int | None) -> Example:
        """Encode a manifest row of any of the three kinds."""
        if "transcript" in row:
            return Example(self.transcription(row["language"]), self.answer(row["transcript"]), clip)
        if "question" in row:
            return Example(self.spoken_question(row["question"]), self.answer(row["answer"]), clip)
        return Example(self.text_question(row["instruction"], row["input"]), self.answer(row["output"]), None)

    def _chat(self, content: list) -> tuple[int, ...]:
        request = ChatCompletionRequest(messages=[UserMessage(content=content)])
        return tuple(self.tokenizer.encode_chat_completion(request).tokens)


def feature_extractor() -> WhisperFeatureExtractor:
    """Build the log-mel front end: Whisper's, with a 4 s window."""
    return WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=WINDOW_SEC
    )


def log_mels(clips: list[np.ndarray]) -> torch.Tensor:
    """Compute log-mel windows, (clips, 128, 400) in float16."""
    extract = feature_extractor()
    options = {"sampling_rate": 16_000, "padding": True, "truncation": False, "pad_to_multiple_of": WINDOW_SAMPLES}
    mels = [extract(clip, return_tensors="pt", **options)["input_features"][0].half() for clip in clips]
    return torch.stack(mels)


def read_rows(folder: Path, rows: list[dict], encoder: Encoder) -> tuple[list[Example], torch.Tensor]:
    """Encode manifest rows; return them with the log-mel windows of their clips."""
    paths = sorted({row["audio_path"] for row in rows if "audio_path" in row})
    mels = log_mels([soundfile.read(folder / path, dtype="float32")[0] for path in paths]) if paths else torch.empty(0)
    return [encoder.row(row, paths.index(row["audio_path"]) if "audio_path" in row else None) for row in rows], mels


def collate(examples: list[Example], mels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pad on the right; labels are -100 except on the answer. ``input_features`` exists only if a row has audio."""
    longest = max(len(e.prompt) + len(e.answer) for e in examples)
    ids_BT = torch.full((len(examples), longest), PAD_TOKEN_ID)
    labels_BT = torch.full((len(examples), longest), -100)
    mask_BT = torch.zeros((len(examples), longest), dtype=torch.long)
    for b, e in enumerate(examples):
        end = len(e.prompt) + len(e.answer)
        ids_BT[b, :end] = torch.tensor(e.prompt + e.answer)
        labels_BT[b, len(e.prompt) : end] = torch.tensor(e.answer)
        mask_BT[b, :end] = 1
    batch = {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
    clips = [e.clip for e in examples if e.clip is not None]
    if clips:
        batch["input_features"] = mels[clips].float()
    return batch


@torch.no_grad()
def generate(
    model: torch.nn.Module, examples: list[Example], mels: torch.Tensor, encoder: Encoder, batch_size: int = 40
) -> list[str]:
    """Answer each example greedily, with left-padded prompts and separate batches for audio and text rows."""
    model.eval()
    answers: dict[int, str] = {}
    for spoken in (True, False):
        chosen = [i for i, e in enumerate(examples) if (e.clip is not None) == spoken]
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            longest = max(len(examples[i].prompt) for i in part)
            pads = [longest - len(examples[i].prompt) for i in part]
            ids = [[PAD_TOKEN_ID] * pad + list(examples[i].prompt) for pad, i in zip(pads, part, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            if spoken:
                inputs["input_features"] = mels[[examples[i].clip for i in part]].float()
            out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answers |= {i: encoder.decode(ids[longest:]) for i, ids in zip(part, out.tolist(), strict=True)}
    return [answers[i] for i in range(len(examples))]
