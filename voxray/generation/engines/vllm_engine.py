"""vLLM, for Whisper and for Voxtral in Mistral's format, in a process of its own.

vLLM does not install beside voxray, so the process can run in another environment (``--engine_python``). It gets the
token ids of prompts and the samples of clips, and returns token ids. If it dies, it is started again, and the rows that
it was answering are divided until the one that ends it is known (see ``bisect_failures``).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.audio.decode import PCM_SCALE
from voxray.core.errors import RunError, SettingsError, one_line
from voxray.features.reader import FeatureRow
from voxray.generation.engines import vllm_worker
from voxray.generation.generate import Completion, answer_limits, make_completion
from voxray.generation.model import InferenceConfig
from voxray.models.adapters.read_files import tensor_names
from voxray.models.front_end import FrontEnd, stop_ids
from voxray.models.hf_files import read_config
from voxray.models.registry import get_family
from voxray.models.voxtral.mistral_format import LORA_RANKS, VLLM_TEXT, max_lora_rank

MODELS = ("whisper", "voxtral")
MAX_DEATHS = 5
"""Deaths of the process without an answer between them, after which the job ends."""
CPU_CACHE_GIB = "1"
"""Memory for keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise."""


class VllmError(Exception):
    """vLLM could not answer rows, or its process died while it answered them."""


@dataclass
class _Worker:
    """The process.

    Attributes:
        log: File that holds what it prints.
    """

    process: subprocess.Popen[bytes]
    log: Any

    def send(self, value: object, samples: Sequence[np.ndarray] = ()) -> dict[str, Any]:
        """Send a request; returns the answer.

        Raises:
            VllmError: The process died, or it answered with an error.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            for clip in samples:
                self.process.stdin.write(clip.tobytes())
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise VllmError(f"vLLM's process ended with status {self.process.wait()}: {self._last_line()}")
        answer = json.loads(line)
        if "error" in answer:
            raise VllmError(one_line(answer["error"], 300))
        return answer

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it printed nothing"

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class VllmEngine:
    """A model in vLLM."""

    @classmethod
    def check(cls, config: InferenceConfig) -> None:
        """Raise a SettingsError unless vLLM loads this base and applies this adapter."""
        name, folder = get_family(config.model_id).name, Path(config.model_id)
        if name not in MODELS:
            advice = "serve it with `vllm serve` and use --server"
            raise SettingsError(f"--engine vllm: {' and '.join(MODELS)} models only, not {name}; {advice}")
        if name == "voxtral" and not (folder / "params.json").is_file():
            advice = "write Mistral's format with `export --format mistral`"
            raise SettingsError(f"--engine vllm: {folder} is a Voxtral in Hugging Face's format; {advice}")
        if config.adapter:
            _check_adapter(Path(config.adapter), name)
        python = config.engine_python or sys.executable
        command = [python, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"]
        try:
            status = subprocess.run(command, capture_output=True, check=False).returncode
        except OSError as error:
            raise SettingsError(f"--engine_python {python}: cannot be run: {error.strerror}") from None
        if status:
            raise SettingsError(f"--engine vllm: {python} has no vLLM; name one that has it with --engine_python")

    def __init__(self, config: InferenceConfig, front_end: FrontEnd) -> None:
        self.config, self.front_end, self.sampling = config, front_end, config.sampling
        self.is_whisper = get_family(config.model_id).name == "whisper"
        self._biases = _suppressed(config.model_id) if self.is_whisper else {}
        self._worker, self._num_deaths = self._start(), 0

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion | Exception]]:
        reasons = [self._refusal(row) for row in rows]
        yield from ((index, VllmError(f"--engine vllm: {why}")) for index, why in enumerate(reasons) if why)
        if indices := [index for index, why in enumerate(reasons) if not why]:
            answers = self._answer([rows[index] for index in indices])
            yield from zip(indices, answers, strict=True)

    def _refusal(self, row: FeatureRow) -> str:
        """Why vLLM would answer a row differently; "" if it does not."""
        if not self.is_whisper:
            return ""
        front_end: Any = self.front_end
        if front_end.needs_sequential_generate(row.prompt_ids, row.num_windows):
            return "no recordings over 30 s and no rows with times of Whisper"
        # vLLM puts a start token before a prompt that begins with another one
        return (
            "no contexts of Whisper; leave them out with --no_context"
            if row.prompt_ids[0] != front_end.start_id
            else ""
        )

    def _answer(self, rows: Sequence[FeatureRow]) -> Iterator[Completion]:
        start_sec, limits = time.perf_counter(), answer_limits(rows, self.front_end, self.sampling)
        prompts = self._with_languages(rows)
        answers = self._ask(rows, prompts, [self._options(limit) for limit in limits])
        sec = (time.perf_counter() - start_sec) / len(rows)
        stops = stop_ids(self.front_end)
        for index, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
            ids = [token for token in ids if token not in stops]
            language = self.front_end.prompt_language(prompt)
            yield make_completion(ids, self.front_end, limits[index], sec, language)

    def _options(self, limit: int) -> dict[str, Any]:
        """Arguments of vLLM's ``SamplingParams``."""
        options = {"max_tokens": limit, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        options |= {"seed": self.sampling.seed, "stop_token_ids": sorted(stop_ids(self.front_end))}
        return {**options, "logit_bias": self._biases, "min_tokens": 1} if self.is_whisper else options

    def _with_languages(self, rows: Sequence[FeatureRow]) -> list[list[int]]:
        """The prompts; one without a language token gets that of the language that the model detects."""
        prompts = [row.prompt_ids.tolist() for row in rows]
        front_end: Any = self.front_end
        without = [index for index, prompt in enumerate(prompts) if not front_end.prompt_language(prompt)]
        if not (self.is_whisper and without):
            return prompts
        starts = [prompts[index].index(front_end.start_id) + 1 for index in without]
        heads = [prompts[index][start - 1 : start] for index, start in zip(without, starts, strict=True)]
        options = {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": sorted(front_end.language_ids.values())}
        detected = self._ask([rows[index] for index in without], heads, [options] * len(without))
        for index, start, ids in zip(without, starts, detected, strict=True):
            prompts[index].insert(start, ids[0])
        return prompts

    def _ask(
        self, rows: Sequence[FeatureRow], prompts: Sequence[list[int]], options: Sequence[dict[str, Any]]
    ) -> list[list[int]]:
        """Token ids of the answers."""
        if not self._worker.is_alive:
            self._worker = self._start()
        clips = [row.audio.astype(np.float32) / PCM_SCALE for row in rows]
        requests = [
            {"prompt_ids": prompt, "num_samples": len(clip), "sampling": each}
            for prompt, clip, each in zip(prompts, clips, options, strict=True)
        ]
        try:
            answer = self._worker.send({"rows": requests}, clips)
        except VllmError as error:
            self._num_deaths += not self._worker.is_alive
            if self._num_deaths == MAX_DEATHS:
                raise RunError(f"--engine vllm: its process died {MAX_DEATHS} times in a row: {error}") from None
            raise
        self._num_deaths = 0
        return [row["ids"] for row in answer["rows"]]

    def _start(self) -> _Worker:
        """Start the process and let it load the model.

        Raises:
            RunError: vLLM cannot load it.
        """
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ}
        if not torch.cuda.is_available():
            environment = {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB, **environment}
            environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        environment.pop("PYTHONPATH", None)  # packages of this environment may not fit the other one
        log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process runs
        process = subprocess.Popen(
            [self.config.engine_python or sys.executable, vllm_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
        worker = _Worker(process, log)
        try:
            options = {"adapter": self.config.adapter, "is_encoder_decoder": self.is_whisper}
            worker.send({"arguments": self._arguments(), **options})
        except VllmError as error:
            worker.close()
            raise RunError(f"--engine vllm: vLLM cannot load {self.config.model_id}: {error}") from None
        return worker

    def _arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's ``LLM``."""
        config, dtype = self.config, "float32"
        if config.bf16 or config.fp16:
            dtype = "bfloat16" if config.bf16 else "float16"
        longest = min(self.front_end.max_positions, config.max_len + config.sampling.max_new_tokens)
        arguments = {"model": config.model_id, "dtype": dtype, "max_num_seqs": config.batch_size}
        arguments |= {"max_model_len": self.front_end.max_positions if self.is_whisper else longest}
        arguments |= {"limit_mm_per_prompt": {"audio": 1}, "seed": config.sampling.seed}
        if not self.is_whisper:
            arguments |= dict.fromkeys(("config_format", "load_format", "tokenizer_mode"), "mistral")
        if config.adapter:
            arguments |= {"enable_lora": True, "max_lora_rank": max_lora_rank(Path(config.adapter))}
        return arguments


def _check_adapter(adapter: Path, family: str) -> None:
    """Raise a SettingsError unless vLLM applies the adapter.

    vLLM looks at the last part of a layer's name only. It takes an adapter under PEFT's names without a message, and
    answers like the base.
    """
    if family != "voxtral":
        raise SettingsError(f"--engine vllm: takes no adapter of {family}; merge it with `export --format hf`")
    if foreign := [name for name in tensor_names(adapter) if not name.startswith(VLLM_TEXT)]:
        advice = "write it with `export --format mistral --merge projector`, or merge it"
        raise SettingsError(f"--engine vllm: {adapter}: vLLM would ignore {foreign[0]}; {advice}")
    if not max_lora_rank(adapter):
        raise SettingsError(f"--engine vllm: {adapter}: vLLM takes LoRA up to rank {LORA_RANKS[-1]}; merge it")


def _suppressed(model_id: str) -> dict[str, float]:
    """{token id: bias} of tokens that generation_config.json suppresses; vLLM does not read this list."""
    path = Path(model_id) / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else read_config(model_id)
    return {str(token): -100.0 for token in stored.get("suppress_tokens") or ()}
