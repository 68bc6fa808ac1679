"""Rows for the tiny bases of ``audio_lm_tiny`` without files, and the library's own inputs for them."""

from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor

from voxray.audio.decode import to_pcm16
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow
from voxray.models.front_end import row_target_ids

TRANSCRIPT = "환자는 열이 납니다"


def noise(num_samples: int) -> np.ndarray:
    """Speech-like levels on the 16-bit grid, so that int16 holds them exactly."""
    generator = np.random.default_rng(num_samples)
    return (generator.integers(-8_000, 8_000, num_samples) / 32_768).astype(np.float32)


def sample(task: str = "asr", *, prompt: str = "", answer: str = TRANSCRIPT, language: str = "") -> Sample:
    audio = "clip.wav" if TASKS[task].has_audio else ""
    return Sample("id", TASKS[task], prompt, answer, audio, language, "m.jsonl:1")


def make_row(front_end: Any, row: Sample, num_samples: int) -> FeatureRow:
    """The row as a ``pcm16`` set holds it, whose features are exact."""
    num_samples = num_samples if row.audio_path else 0
    return FeatureRow(
        id=f"{row.task.name}-{num_samples}",
        task=row.task.name,
        language=row.language,
        source=row.source,
        prompt=row.prompt,
        answer=row.answer,
        prompt_ids=np.asarray(front_end.prompt_ids(row, num_samples), np.int32),
        target_ids=np.asarray(row_target_ids(front_end, row), np.int32),
        store="pcm16",
        audio=to_pcm16(noise(num_samples)),
        fill=0.0,
        num_windows=front_end.num_windows(num_samples),
        num_samples=num_samples,
    )


def mixed_rows(front_end: Any, lengths: tuple[int, ...]) -> list[FeatureRow]:
    """Transcriptions of these lengths, and questions about them if the base answers any."""
    rows = [make_row(front_end, sample(answer=f"{TRANSCRIPT} {length}"), length) for length in lengths]
    if not answers_questions(front_end):
        return rows
    asked = [sample("sqa", prompt="How many?", answer="three"), sample("tqa", prompt="What is said?", answer="열")]
    return [*rows, *(make_row(front_end, row, lengths[0]) for row in asked)]


def answers_questions(front_end: Any) -> bool:
    from voxray.core.errors import BadRow

    try:
        front_end.prompt_ids(sample("tqa", prompt="What?"), 0)
    except BadRow:
        return False
    return True


def request_text(processor: Any, model_type: str, language: str = "", context: str = "") -> str:
    """The text of the library's transcription request."""
    requests = {"qwen2_audio": "Transcribe the speech.", "musicflamingo": "Transcribe the input speech."}
    if model_type in requests:
        line = f"\nContext: {context}" if context else ""
        content = [{"type": "audio", "path": "x.wav"}, {"type": "text", "text": f"{requests[model_type]}{line}"}]
        turns = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    options = {"language": language or None} if model_type == "qwen3_asr" else {}
    if context and model_type != "qwen3_asr":  # others replace their request by the prompt
        context = f"{processor.default_transcription_prompt}\nContext: {context}"
    options |= {"prompt": context} if context else {}
    return processor.apply_transcription_request("x.wav", tokenize=False, **options)[0]


def library_inputs(model_id: str, texts: list[str], clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """The processor's inputs for texts with one clip each."""
    processor = AutoProcessor.from_pretrained(model_id)
    return dict(processor(text=texts, audio=clips, return_tensors="pt", sampling_rate=16_000))
