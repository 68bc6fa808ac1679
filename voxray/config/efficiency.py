"""Settings of jobs/efficiency.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from voxray.config.evaluate import SalmonnPromptFlags
from voxray.config.flag_groups import CommaCounts, CompiledFlags, OutputFlags
from voxray.config.flags import Flag
from voxray.config.parse import CommaStrings, convert
from voxray.config.salmonn_yaml import efficiency_flags
from voxray.core.languages import language_code
from voxray.core.tasks import TASKS, single_turn_tasks

Variant = Literal["eager", "compiled", "8bit", "4bit"]
_COMPILES = "jobs/compile.py compiles; --compiled names the folder that it wrote"


def _audio_task(name: str) -> str:
    tasks = (TASKS[task] for task in single_turn_tasks())
    audio_tasks = [task.name for task in tasks if task.has_audio and task.template != "translation"]
    if name not in audio_tasks:
        raise ValueError(f"must be one of {', '.join(audio_tasks)}")
    return name


class EfficiencySettings(OutputFlags, SalmonnPromptFlags, CompiledFlags):
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = "runs/efficiency"
    """Folder for efficiency.json and efficiency.png."""
    batch_sizes: Annotated[CommaCounts, Flag(("batch_size", "batch_size_eval"))] = (1, 4)
    """Batch sizes to measure, comma separated: numbers of clips that are answered together."""
    clip_sec: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Length of the clip in seconds. The clip is noise, which takes as long to process as speech."""
    audio_path: Annotated[str, Flag(path="input")] = ""
    """Audio file to use instead of noise, at its full length."""
    task: Annotated[str, AfterValidator(_audio_task)] = "asr"
    """Task that the model performs on the clip."""
    question: str = ""
    """Question about the clip, for --task sqa and aac."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = "ko"
    """Language named in transcription prompts, as a code such as ko or as an English name."""
    new_tokens: Annotated[int, Flag(("max_new_tokens",)), Field(ge=16)] = 64
    """Tokens generated per answer, regardless of end-of-text tokens; the time per token is the mean over them."""
    warmup: Annotated[int, Flag(("num_warmup",)), Field(ge=0)] = 3
    """Unmeasured answers before the measured ones."""
    repeats: Annotated[int, Flag(("num_it",)), Field(ge=1)] = 10
    """Measured answers per batch size."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the noise."""
    compare: CommaStrings = ()
    """Variants to compare, comma separated: any of eager, compiled (needs --compiled), 8bit and 4bit. Each is measured
    in its own process, so that memory is measured separately."""
    optimization_level: Annotated[int, Flag(no_effect=_COMPILES)] = 3
    """From older scripts."""
    tensorrt_device: Annotated[str, Flag(no_effect=_COMPILES), convert(str)] = ""
    """From older scripts."""

    @classmethod
    def translate_yaml(
        cls, loaded: dict[Any, Any], path: Path, flags: Mapping[str, Any]
    ) -> tuple[dict[Any, Any], list[str]]:
        """Also read the nested YAML files of SALMONN's evaluator."""
        return efficiency_flags(loaded, path)

    @model_validator(mode="after")
    def _one_clip(self) -> "EfficiencySettings":
        if self.audio_path and "clip_sec" in self.model_fields_set:
            raise ValueError("--audio_path and --clip_sec: give one of them")
        if self.question and not TASKS[self.task].prompt_keys:
            raise ValueError(f"--question: --task {self.task} asks nothing")
        if TASKS[self.task].prompt_keys and not (self.question or TASKS[self.task].default_prompt):
            raise ValueError(f"--task {self.task}: needs --question")
        return self

    @model_validator(mode="after")
    def _known_variants(self) -> "EfficiencySettings":
        known = Variant.__args__  # type: ignore[attr-defined]
        if unknown := [name for name in self.compare if name not in known]:
            raise ValueError(f"--compare {','.join(unknown)}: must be of {', '.join(known)}")
        if "compiled" in self.compare and not self.compiled:
            raise ValueError("--compare compiled: needs --compiled, the folder that jobs/compile.py wrote")
        if self.compare and self.quantize != "none":
            raise ValueError(f"--quantize {self.quantize}: name it in --compare")
        return self
