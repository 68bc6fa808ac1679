"""The declarative part of every recipe: which roles of the model train on which tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from voxray.batches.loader import PromptSampler
from voxray.batches.plan import Phase
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, WhisperSettings
from voxray.core.tasks import TASKS


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        roles: Roles of the model that train, by LoRA or in full.
        tasks: Tasks whose rows are used for training and validation. Rows of other tasks are left out and listed.
        task_weights: Relative sampling weights of the tasks; None uses every row once per epoch.
        per_task_bsz: Rows per microbatch by task, for ``--batching length``.
        curriculum: Phases of tasks and epochs; empty uses all tasks for ``--epochs``.
        lora_targets: Names of the layers that LoRA adapts within the roles; empty uses the family's own.
        prompt_sampler: Samples another prompt for every row in every epoch; None keeps the stored prompt.
    """

    roles: tuple[str, ...]
    tasks: tuple[str, ...] = field(default_factory=lambda: tuple(TASKS))
    task_weights: Mapping[str, float] | None = None
    per_task_bsz: Mapping[str, int] | None = None
    curriculum: tuple[Phase, ...] = ()
    lora_targets: tuple[str, ...] = ()
    prompt_sampler: PromptSampler | None = None


def text_stage(settings: TextSettings) -> Stage:
    """Voxtral stage 1: text QA and chats, LoRA on the language model only. Projector and encoder stay frozen."""
    return Stage(roles=("llm",), tasks=("tqa", "text_chat"))


def asr_adapter_stage(settings: AsrAdapterSettings) -> Stage:
    """Voxtral stage 2: transcription, LoRA on the projector between a frozen encoder and a frozen language model."""
    return Stage(roles=("projector",), tasks=("asr",))


def multitask_stage(settings: MultitaskSettings) -> Stage:
    """Voxtral stage 3: all tasks together, LoRA on projector and language model."""
    roles = ("projector", "llm") if settings.freeze_whisper else ("encoder", "projector", "llm")
    curriculum = tuple(Phase(*phase) for phase in settings.curriculum)
    return Stage(roles, task_weights=settings.task_weights, per_task_bsz=settings.per_task_bsz, curriculum=curriculum)


def whisper_stage(settings: WhisperSettings) -> Stage:
    """Whisper: transcription and translation, LoRA on encoder and decoder, or on the decoder only."""
    roles = ("decoder",) if settings.freeze_encoder else ("encoder", "decoder")
    return Stage(roles, tasks=("asr", "ast"), lora_targets=settings.lora_targets)
