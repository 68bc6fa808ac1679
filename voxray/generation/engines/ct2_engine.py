"""CTranslate2, for Whisper models that ``export --format ct2`` wrote.

Features and prompts are voxray's own. Recordings of several windows, and rows with times, go through Whisper's
sequential algorithm as transformers implements it: a window begins at the end time written for the previous one.

Shape letters: B rows, F mel bins, T mel frames of a window.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.audio.logmel import HOP_SAMPLES
from voxray.batches.collate import collate_prompts
from voxray.core.errors import SettingsError, library_errors
from voxray.features.reader import FeatureRow
from voxray.generation.generate import Completion, answer_limits, make_completion
from voxray.generation.model import InferenceConfig
from voxray.models.registry import get_family
from voxray.models.whisper.ct2_format import MODEL, require_ct2
from voxray.models.whisper.front_end import TIME_STEP_SEC, WhisperFrontEnd

FRAME_SEC = TIME_STEP_SEC / 2


@dataclass
class _Recording:
    """A row on its way through its windows.

    Attributes:
        index: Index of the row.
        mel_TF: Log-mel of its samples, without padding.
        prompt: Token ids before every window.
        first_frame: First frame of the next window.
        ids: Token ids of the windows so far, with times.
    """

    index: int
    limit: int
    mel_TF: np.ndarray
    prompt: list[int]
    first_frame: int = 0
    ids: list[int] = field(default_factory=list)
    sec: float = 0.0
    num_windows: int = 0

    def next_window(self, num_frames: int) -> np.ndarray:
        """Log-mel of the next window, (F, ``num_frames``); padded with zeros, as transformers does."""
        window_FT = self.mel_TF[self.first_frame : self.first_frame + num_frames].T.astype(np.float32)
        return np.pad(window_FT, ((0, 0), (0, num_frames - window_FT.shape[1])))

    def append(self, ids: Sequence[int], front_end: WhisperFrontEnd, sec: float) -> None:
        """Add the token ids of a window, and move on to the end time that they state."""
        from transformers import WhisperForConditionalGeneration

        num_frames = min(len(self.mel_TF) - self.first_frame, front_end.window_frames)
        segments, num_done = WhisperForConditionalGeneration._retrieve_segment(
            seek_sequence=torch.tensor(ids, dtype=torch.int64),
            seek_outputs=[None],
            time_offset=[0.0],
            timestamp_begin=front_end.no_times_id + 1,
            seek_num_frames=[num_frames],
            time_precision=TIME_STEP_SEC,
            time_precision_features=FRAME_SEC,
            input_stride=2,
            prev_idx=0,
            idx=0,
            return_token_timestamps=False,
            decoder_input_ids=torch.tensor([self.prompt]),
        )
        self.ids += [token for segment in segments for token in segment["tokens"].tolist()]
        self.first_frame += int(num_done) or num_frames
        self.sec, self.num_windows = self.sec + sec, self.num_windows + 1


class Ct2Engine:
    """A Whisper model in CTranslate2's format."""

    @classmethod
    def check(cls, config: InferenceConfig) -> None:
        """Raise a SettingsError unless the base is in CTranslate2's format, without an adapter beside it."""
        name = get_family(config.model_id).name
        if name != "whisper":
            raise SettingsError(f"--engine ct2: Whisper models only, not {name}")
        if config.adapter:
            raise SettingsError("--engine ct2: takes no adapter beside the model; export merges it: --format ct2")
        if not (Path(config.model_id) / MODEL).is_file():
            raise SettingsError(f"--engine ct2: {config.model_id} has no {MODEL}; export writes it: --format ct2")
        require_ct2("--engine ct2")

    def __init__(self, config: InferenceConfig, front_end: WhisperFrontEnd) -> None:
        import ctranslate2

        self.front_end, self.sampling = front_end, config.sampling
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with library_errors(f"--model_id {config.model_id}: CTranslate2 cannot load it"):
            self.model = ctranslate2.models.Whisper(
                config.model_id, device=device, intra_threads=torch.get_num_threads()
            )

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion]]:
        limits = answer_limits(rows, self.front_end, self.sampling)
        groups = defaultdict[tuple[int, int], list[int]](list)
        sequential: list[int] = []
        for index, row in enumerate(rows):
            if self.front_end.needs_sequential_generate(row.prompt_ids, row.num_windows):
                sequential.append(index)
            else:  # prompts of one call have one length
                groups[len(row.prompt_ids), limits[index]].append(index)
        for (_, limit), indices in groups.items():
            for start in range(0, len(indices), batch_size):
                yield from self._answer(rows, indices[start : start + batch_size], limit)
        sequential.sort(key=lambda index: -rows[index].num_samples)
        for start in range(0, len(sequential), batch_size):
            indices = sequential[start : start + batch_size]
            yield from self._transcribe_windows(rows, indices, min(limits[index] for index in indices))

    def _answer(
        self, rows: Sequence[FeatureRow], indices: Sequence[int], limit: int
    ) -> Iterator[tuple[int, Completion]]:
        """Answer one batch of clips of one window."""
        start_sec = time.perf_counter()
        batch = collate_prompts([rows[index] for index in indices], self.front_end)
        encoded = self._encode(batch["input_features"].numpy())
        prompts = self._with_languages([rows[index].prompt_ids.tolist() for index in indices], encoded)
        answers = self._generate(encoded, prompts, limit)
        sec = (time.perf_counter() - start_sec) / len(indices)
        for index, prompt, ids in zip(indices, prompts, answers, strict=True):
            yield index, make_completion(ids, self.front_end, limit, sec, self.front_end.prompt_language(prompt))

    def _transcribe_windows(
        self, rows: Sequence[FeatureRow], indices: Sequence[int], limit: int
    ) -> Iterator[tuple[int, Completion]]:
        """Transcribe one batch of recordings together, each window by window."""
        num_frames = self.front_end.window_frames
        waiting = [self._recording(rows[index], index, limit) for index in indices]
        while waiting:
            start_sec = time.perf_counter()
            encoded = self._encode(np.stack([each.next_window(num_frames) for each in waiting]))
            prompts = self._with_languages([each.prompt for each in waiting], encoded)
            answers = self._generate(encoded, prompts, limit)
            sec = (time.perf_counter() - start_sec) / len(waiting)
            for recording, prompt, ids in zip(waiting, prompts, answers, strict=True):
                recording.prompt = prompt
                recording.append(ids, self.front_end, sec)
            for each in [each for each in waiting if each.first_frame >= len(each.mel_TF)]:
                language, longest = self.front_end.prompt_language(each.prompt), limit * each.num_windows
                yield each.index, make_completion(each.ids, self.front_end, longest, each.sec, language)
            waiting = [each for each in waiting if each.first_frame < len(each.mel_TF)]

    def _recording(self, row: FeatureRow, index: int, limit: int) -> _Recording:
        windows_WFT = collate_prompts([row], self.front_end)["input_features"].numpy()
        mel_TF = np.concatenate(list(windows_WFT), -1).T[: row.num_samples // HOP_SAMPLES]
        prompt = [token for token in row.prompt_ids.tolist() if token != self.front_end.no_times_id]
        return _Recording(index, limit, mel_TF, prompt)

    def _encode(self, mel_BFT: np.ndarray) -> Any:
        import ctranslate2

        return self.model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mel_BFT)))

    def _with_languages(self, prompts: Sequence[Sequence[int]], encoded: Any) -> list[list[int]]:
        """The prompts; one without a language token gets that of the language that the model detects."""
        completed = [list(prompt) for prompt in prompts]
        without = [index for index, prompt in enumerate(completed) if not self.front_end.prompt_language(prompt)]
        if not without:
            return completed
        detected = self.model.detect_language(encoded)  # [(token, probability), ...] of each window, best first
        for index in without:
            start = completed[index].index(self.front_end.start_id) + 1
            completed[index].insert(start, self.front_end.lang_to_id[detected[index][0][0]])
        return completed

    def _generate(self, encoded: Any, prompts: Sequence[list[int]], limit: int) -> list[list[int]]:
        """Token ids of the answers, without the end of text."""
        longest = max(map(len, prompts))
        limit = min(limit, self.front_end.max_positions - longest)  # a detected language takes one position
        # CTranslate2 takes the smaller one of half this number, and of this number less the prompt, or one token more.
        max_length = max(2 * limit, limit + longest)
        options = {"beam_size": self.sampling.num_beams, "max_length": max_length}
        return [result.sequences_ids[0][:limit] for result in self.model.generate(encoded, list(prompts), **options)]
