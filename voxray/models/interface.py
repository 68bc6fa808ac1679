"""What a model family offers to the rest of voxray.

Everything outside ``models/`` speaks to these two protocols. A family has a front end, which turns rows into features
and token ids and needs no weights (featurize workers load just that), and a model side, which loads, trains and
generates.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from voxray.core.errors import SettingsError
from voxray.core.manifest import Sample
from voxray.core.source import Segment


@dataclass(frozen=True)
class AudioFeatures:
    """Features of one clip without its padding.

    Attributes:
        mel_KF: float32, shape (num_valid_frames, num_mel_bins).
        fill: Value of every padded frame after them.
        num_windows: Whole model windows that the padded clip fills.
    """

    mel_KF: np.ndarray
    fill: float
    num_windows: int


class FrontEnd(Protocol):
    """Rows -> features and token ids; picklable, without weights.

    Attributes:
        fingerprint: Hash of everything that decides its output; shards made under another one are stale.
        sample_rate_hz: Rate that clips are resampled to.
        max_audio_sec: Longest clip the family takes.
        max_windows: Longest clip that it can be trained on, in windows; None is as long as it takes.
        max_positions: Longest prompt and answer together, in tokens.
        cross_attention_positions: Encoder positions per window that the decoder cross-attends to. They cost memory but
            are not prompt tokens (Whisper: 1,500, others: 0).
        window_frames: Mel frames of one model window.
        num_mel_bins: Bins of one frame.
        encoder_positions: Outputs of the audio encoder for one window.
        encoder_dim: Width of each of them.
        pad_id: Token id of padding.
        eos_id: Token id that ends an answer.
        needs_language: Whether a row has to say its language to be trained on.
        trims_audio: Whether audio tokens that stand for padding alone are left out of prompts.
        counts_samples: Whether the model asks how many samples of each window are no padding.
    """

    fingerprint: str
    sample_rate_hz: int
    max_audio_sec: float
    max_windows: int | None
    max_positions: int
    cross_attention_positions: int
    window_frames: int
    num_mel_bins: int
    encoder_positions: int
    encoder_dim: int
    pad_id: int
    eos_id: int
    needs_language: bool
    trims_audio: bool
    counts_samples: bool

    def features(self, samples: np.ndarray) -> AudioFeatures: ...

    def num_windows(self, num_samples: int) -> int: ...

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]: ...

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of an answer and what ends it.

        Args:
            segments: When its parts are said, for families that are trained with times.
        """
        ...

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Whether a row is answered by itself through ``ModelFamily.generate``, not in a batch token by token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def show(self, ids: Sequence[int]) -> str: ...


class DecodeState(Protocol):
    """Rows whose answers are being generated: what the model remembers of the prompts and of what came after."""

    def decode_step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Add one token to every row.

        Returns:
            logits_BV of the next one.
        """
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Let all rows but these go."""
        ...

    def merge(self, other: Any) -> None:
        """Take the rows of another one of the same model in, after the own."""
        ...


class InitAdapter(Protocol):
    """Weights to start training from.

    Attributes:
        folder: Where they are.
        roles: Roles of the model that they belong to, in the family's order.
        trims_audio: Whether they were trained without the audio tokens of padding; None if without audio.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def roles(self) -> tuple[str, ...]: ...

    @property
    def trims_audio(self) -> bool | None: ...

    def described(self) -> dict[str, Any]:
        """What provenance.json says of them."""
        ...

    def copy_into(self, model: Any, family: "ModelFamily") -> int:
        """Copy them into LoRA that covers their roles and maybe more.

        Returns:
            Number of tensors copied.
        Raises:
            RunError: The model's LoRA over those roles has other options.
        """
        ...


AudioPath = Callable[..., torch.Tensor]
"""Features of whole windows, and, where the front end counts samples, how many of each are no padding -> what the rest
of a model takes of them."""


class ModelFamily(Protocol):
    """The model side.

    Attributes:
        job: Name of the job that trains it.
        tasks: Names of the tasks whose rows it answers.
        roles: {role: names of the modules that hold it}; a module belongs to the role in whose module it stands.
        lora_targets: {role: names of the Linear layers that LoRA adapts within it}.
        full_modules: Names of modules whose own weights train beside LoRA, where their role trains.
        always_frozen: Names of modules whose weights never train, not even in full tuning.
        quantized: Roles whose layers ``quantize`` holds in fewer bits.
        files: Names of the files beside configuration and weights that make a model's folder complete.
    """

    name: str
    job: str
    tasks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    lora_targets: Mapping[str, tuple[str, ...]]
    full_modules: tuple[str, ...]
    always_frozen: tuple[str, ...]
    quantized: tuple[str, ...]
    files: tuple[str, ...]

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> FrontEnd:
        """The front end of a base.

        Args:
            trim_audio: Leave out the audio tokens that stand for padding alone.
        Raises:
            SettingsError: ``trim_audio`` is asked of a family whose clips take the same number of tokens always.
        """
        ...

    def no_decay(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether weight decay passes a parameter by."""
        ...

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Put what makes a model's folder complete, beside configuration and weights, into another folder."""
        ...

    def read_official(self, path: str, *, r: int, alpha: float) -> InitAdapter | None:
        """What a checkpoint of the family's own trainer holds, for training that starts from it.

        Args:
            r, alpha: LoRA's rank and scale in the training to come.
        Returns:
            None where there is no such trainer, or the path is no file of its.
        Raises:
            RunError: It cannot be read.
            SettingsError: It was trained with another rank or scale.
        """
        ...

    def write_official(self, model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
        """Write what was trained as a checkpoint that the family's own code loads.

        Args:
            model: Base and adapter.
            model_id: The base.
        Returns:
            The checkpoint, which ``load_official`` reads, and how many tensors it holds.
        Raises:
            RunError: The base has something of its own that the checkpoint could not hold as well.
            SettingsError: There is no such code, or the adapter is of a kind that it does not know.
        """
        ...

    def load_official(self, base: Any, path: Path) -> Any:
        """A plain base with what ``write_official`` wrote, in eval mode."""
        ...

    def encoder_fingerprint(self, model_id: str) -> str: ...

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any: ...

    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Outputs of what ``load_encoder`` gives, for whole windows.

        Args:
            num_samples_W: Samples of every window that are no padding.
        Returns:
            states_WPD.
        """
        ...

    def skip_encoder(self, model: Any) -> None: ...

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any: ...

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """What ``load_model`` gives, without its weights: every parameter has its shape and type, and takes no memory.

        Quantised layers stand there as they are before they are quantised.
        """
        ...

    def audio_path(self, model: Any) -> torch.nn.Module:
        """What hears whole windows in a model, with what an adapter adds to it (see ``AudioPath``): features of the
        model's type -> what the rest of the model takes, the same number of rows for every window."""
        ...

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Let a model hear through something else, and free the memory of what heard until now."""
        ...

    def compile_layers(self, model: Any) -> None: ...

    def answer_logits(
        self,
        model: Any,
        batch: dict[str, torch.Tensor],
        keep_BL: torch.Tensor,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor: ...

    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[DecodeState, torch.Tensor]:
        """Read prompts as ``collate_prompts`` makes them.

        Returns:
            The rows' state, and logits_BV of the first token of each answer.
        """
        ...

    def generate(
        self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Sequence[int] = (), **options: Any
    ) -> torch.Tensor:
        """Continue prompts by transformers' own generate, which also knows beams and sampling.

        Args:
            num_samples: Samples of each row's clip.
        Returns:
            ids_BL of the continuations alone, padded on the right.
        """
        ...


class FamilyDefaults:
    """What a family has unless it says otherwise: nothing trains beside LoRA, weight decay is for everything, and there
    is no code of its own to exchange checkpoints with."""

    name: str
    full_modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def no_decay(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return False

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Copy ``files`` as far as the base has them and the folder does not."""
        from transformers.utils.hub import cached_file

        for name in (*self.files, "README.md"):
            found = cached_file(model_id, name, _raise_exceptions_for_missing_entries=False)
            if found and not (folder / name).exists():
                shutil.copyfile(found, folder / name)

    def read_official(self, path: str, *, r: int, alpha: float) -> InitAdapter | None:
        return None

    def write_official(self, model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
        raise SettingsError(f"--format official: is for SALMONN's code, and this is a {self.name} model")

    def load_official(self, base: Any, path: Path) -> Any:
        raise AssertionError("nothing was written")


IGNORED = -100  # the label that PyTorch's cross entropy passes over
Batch = dict[str, torch.Tensor]
