"""voxray from Python: train, evaluate, infer, and a loaded model that transcribes.

Settings have the names of the flags, without ``--``. Nothing heavy is imported before the first call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from voxray.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    import numpy as np

    from voxray.config.evaluate import InferSettings
    from voxray.generation.generate import Completion
    from voxray.generation.requests import AnswerRequest

    Audio: TypeAlias = str | PathLike[str] | np.ndarray


@dataclass(frozen=True)
class TrainingResult:
    """A finished training run.

    Attributes:
        run_dir: The run folder.
        adapter_dir: What was trained: an adapter in PEFT's format, or whole weights with ``tuning="full"``.
        steps: Optimizer steps of the run.
        metrics: Last value of every validation metric, such as ``asr/cer_nospace``; empty without validation rows.
    """

    run_dir: Path
    adapter_dir: Path
    steps: int
    metrics: Mapping[str, float]


def train(recipe: str = "", **settings: Any) -> TrainingResult:
    """Train an adapter. A run that was interrupted continues if the same call is made again.

    Args:
        recipe: ``multitask``, ``text``, ``asr_adapter``, ``whisper`` or ``salmonn``; by default the first one that
            trains the family of ``model_id``.
        settings: Flags of the recipe's job, such as ``model_id``, ``train_jsonl`` and ``output_dir``.
    Raises:
        SettingsError, RunError: A setting, a file or the cluster cannot be used.
        Stopped: The run was asked to stop. It wrote a checkpoint first.
    """
    from voxray.commands.train import run_training
    from voxray.config.parse import settings_from
    from voxray.config.recipes import recipes
    from voxray.core.errors import SettingsError
    from voxray.models.registry import get_family
    from voxray.runs.run_folder import resolve_output_dir

    if not recipe:
        family = get_family(fspath(settings["model_id"])).name if settings.get("model_id") else "voxtral"
        recipe = next((entry.name for entry in recipes().values() if family in entry.model_types), "")
    if recipe not in recipes():
        raise SettingsError(f"recipe {recipe!r}: not one of {', '.join(recipes())}")
    checked = settings_from(recipes()[recipe].settings_class, settings)
    result = run_training(checked, show_next=False)
    run_dir = resolve_output_dir(checked.output_dir, checked.storage_path, is_mirrored=True)
    metrics = {name: value for name, value in result.items() if "/" in name}
    return TrainingResult(run_dir, run_dir / "adapter", result["steps"], metrics)


def evaluate(**settings: Any) -> EvaluationResult:
    """Answer and score the rows of manifests, or score existing predictions (``score_only``).

    Args:
        settings: Flags of the evaluate job, such as ``val_jsonl``, ``lora_dir`` and ``output_dir``.
    Raises:
        SettingsError, RunError: A setting, a file, the model or the cluster cannot be used.
    """
    from voxray.config.evaluate import EvaluateSettings
    from voxray.config.parse import settings_from
    from voxray.runs.run_folder import resolve_output_dir

    checked = settings_from(EvaluateSettings, settings)
    if checked.score_only:
        from voxray.commands.score_only import score_only

        metrics = score_only(checked)
        return EvaluationResult(metrics, resolve_output_dir(checked.output_dir, checked.storage_path))
    from voxray.commands.evaluate import run_evaluation

    return run_evaluation(checked)


def infer(**settings: Any) -> list[dict[str, Any]]:
    """Answer a clip, a folder of clips, a question or the rows of a manifest, and print the answers.

    Args:
        settings: Flags of the infer job, such as ``audio_path``, ``lora_dir`` and ``output_path``.
    Returns:
        One entry per row: ``id``, ``task``, ``prediction``; for the rows of a manifest also ``reference`` and counts.
    Raises:
        SettingsError, RunError: A setting, a file or the model cannot be used, or a row could not be answered.
    """
    from voxray.commands.infer import run_inference
    from voxray.config.evaluate import InferSettings
    from voxray.config.parse import DEMO_ASSETS, settings_from

    return run_inference(settings_from(InferSettings, settings), str(DEMO_ASSETS / "speech" / "asr.val.jsonl"))


def load_model(model_id: str | PathLike[str] = "", lora_dir: str | PathLike[str] = "", **settings: Any) -> Model:
    """Load a base model or an adapter, to answer many clips without loading it again.

    Args:
        model_id: Hub id or folder of the base; "" takes the base that the adapter names.
        lora_dir: Adapter, checkpoint or run folder; "" uses the base alone.
        settings: Other flags of the infer job, such as ``bf16``, ``quantize``, ``num_beams`` and ``batch_size``.
    Raises:
        SettingsError, RunError: A setting is wrong, or the model cannot be loaded.
    """
    from voxray.config.evaluate import InferSettings
    from voxray.config.parse import settings_from

    folders = {name: fspath(value) for name, value in (("model_id", model_id), ("lora_dir", lora_dir)) if value}
    return Model(settings_from(InferSettings, {**folders, **settings}))


class Model:
    """A loaded model; ``load_model`` makes one."""

    def __init__(self, settings: InferSettings) -> None:
        from voxray.features.extract import Extractor, FeatureSpec
        from voxray.generation import model as loading
        from voxray.generation.engines.load import check_engine, engine_store, load_engine

        model_id, adapter = loading.base_and_adapter(settings, settings.lora_dir)
        settings = loading.resolve_settings(settings, model_id, adapter)
        limits = settings.max_new_tokens, settings.batch_size
        self._config = loading.inference_config(settings, model_id, adapter, *limits)
        check_engine(self._config)
        store = engine_store(self._config.engine)
        self._extractor = Extractor(model_id, FeatureSpec(store, trim_audio=self._config.trim_audio))
        self._engine, _ = load_engine(self._config, self._extractor.front_end)
        self._settings = settings

    @overload
    def transcribe(  # pyright: ignore[reportOverlappingOverload]  # a string is a sequence of strings, too
        self, audio: Audio, *, language: str = ..., sample_rate_hz: int = ...
    ) -> str: ...

    @overload
    def transcribe(self, audio: Sequence[Audio], *, language: str = ..., sample_rate_hz: int = ...) -> list[str]: ...

    def transcribe(
        self, audio: Audio | Sequence[Audio], *, language: str = "", sample_rate_hz: int = 16_000
    ) -> str | list[str]:
        """Transcribe a clip, or several together. Recordings that are too long for the model are split.

        Args:
            audio: Path of an audio file, or samples of full scale 1, shape (num_samples,) or (num_samples,
                num_channels); or a list of these.
            language: Code or name, such as ``ko``; "" lets the model detect it, as far as it can.
            sample_rate_hz: Rate of samples; files have their own.
        Returns:
            The transcript, or one transcript per clip.
        Raises:
            BadRow: A clip cannot be decoded, or is longer than the model takes.
            SettingsError: The model does not know the language.
            RunError: The model failed.
        """
        import numpy as np

        from voxray.core.errors import BadRow, SettingsError
        from voxray.core.languages import language_code
        from voxray.models.registry import require_language

        is_one = isinstance(audio, (str, PathLike, np.ndarray))
        try:
            code = language_code(language)
        except BadRow as error:
            raise SettingsError(f"language: {error}") from None
        if code:
            require_language(self._extractor.front_end, code, self._config.model_id)
        with _files([audio] if is_one else audio, sample_rate_hz) as paths:
            texts = self._answer([(path, "", code) for path in paths])
        return texts[0] if is_one else texts

    def answer(self, question: str, audio: Audio | None = None, *, sample_rate_hz: int = 16_000) -> str:
        """Answer a question, about a clip if there is one.

        Args:
            question: In any language that the model understands.
            audio, sample_rate_hz: As in ``transcribe``.
        Raises:
            BadRow, RunError: As in ``transcribe``.
        """
        with _files([] if audio is None else [audio], sample_rate_hz) as paths:
            return self._answer([(paths[0] if paths else "", question, "")])[0]

    def _answer(self, clips: Sequence[tuple[str, str, str]]) -> list[str]:
        """The answers to (audio path, question, language code)."""
        from voxray.generation.requests import answer_requests, make_request, make_sample

        requests = [
            make_request(
                make_sample(path or question, question, path, language),
                self._extractor,
                self._settings.max_len,
            )
            for path, question, language in clips
        ]
        answered = answer_requests(requests, self._engine, self._config.batch_size)
        return [_text(request, completions) for request, completions in answered]


def _text(request: AnswerRequest, completions: Sequence[Completion | Exception]) -> str:
    from voxray.core.errors import RunError
    from voxray.generation.generate import failure_reason

    answers = [completion for completion in completions if not isinstance(completion, Exception)]
    if len(answers) < len(completions):
        error = next(completion for completion in completions if isinstance(completion, Exception))
        raise RunError(f"{request.rows[0].source}: not answered: {failure_reason(error)}")
    return request.text(answers)


@contextmanager
def _files(clips: Sequence[Audio], sample_rate_hz: int) -> Iterator[list[str]]:
    """Paths of the clips. Samples are written to float32 WAV files, which hold them without loss."""
    import numpy as np
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, clip in enumerate(clips):
            if isinstance(clip, np.ndarray):
                paths.append(f"{folder}/{number}.wav")
                soundfile.write(paths[-1], np.asarray(clip, np.float32), sample_rate_hz, subtype="FLOAT")
            else:
                paths.append(str(Path(fspath(clip)).expanduser().absolute()))
        yield paths
