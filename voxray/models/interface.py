"""The contract between a model family and the rest of voxray. Read this to add a family.

A family has two sides:

* a ``FrontEnd`` (``front_end.py``) turns rows into features and token ids. It needs no weights, is picklable, and is
  all that featurize workers load;
* a ``ModelFamily`` names the parts of the model, loads the weights, and runs training and generation passes.

Code outside ``models/`` uses only these two protocols. To add a family, write both classes in ``models/<family>/``,
inherit from ``family_defaults.FamilyDefaults``, and add one entry to ``registry.FAMILIES``. A decoder-only model with
an audio encoder, a projector and placeholder tokens is a row of ``audio_lm.facts.FACTS`` instead. This is enough to
evaluate its models. To train them, a recipe is needed too (``config/recipes.py``). Another package can add both through
the entry point groups ``voxray.families`` and ``voxray.recipes``; ``tests/assets/toy-family`` is an example.

Shape letters: B rows, L tokens, N predicted positions, V vocabulary, W windows of all clips in a batch, F mel bins, T
mel frames of a window, P encoder positions of a window, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from voxray.models.front_end import FrontEnd
from voxray.models.layer_names import LayerNames

IGNORED = -100  # the label that PyTorch's cross entropy ignores

Batch = dict[str, torch.Tensor]
"""Model inputs by name, as ``batches.collate`` makes them; those of ``collate.ON_CPU`` are always on the CPU."""

AudioPath = Callable[..., torch.Tensor]
"""The computation from features to the tensor that the rest of the model reads.

Called with features_WFT, and with num_samples_W as well if the front end has ``needs_num_samples``.
"""


OutputFn = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""Computes the result of a forward pass from the output layer and states_ND."""


def apply_layer(layer: torch.nn.Module, states_ND: torch.Tensor) -> torch.Tensor:
    """logits_NV."""
    return layer(states_ND)


class DecodeState(Protocol):
    """KV-cache state of the rows being generated. ``ModelFamily.prefill`` creates it."""

    def decode_step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Append one token to every row.

        Returns:
            logits_BV of the next token.
        """
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order, and free the memory of the others."""
        ...

    def merge(self, other: Any) -> None:
        """Append the rows of another state of the same model."""
        ...


class InitAdapter(Protocol):
    """Stored weights that training starts from.

    Attributes:
        folder: Folder or file that holds them.
        roles: Roles of the model that they change, in the family's order.
        trims_audio: Whether they were trained without the audio tokens of padding; None if trained without audio.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def roles(self) -> tuple[str, ...]: ...

    @property
    def trims_audio(self) -> bool | None: ...

    def provenance(self) -> dict[str, Any]:
        """JSON values that identify these weights in provenance.json."""
        ...

    def copy_into(self, model: Any, family: "ModelFamily") -> int:
        """Copy the weights into a model whose LoRA covers at least their roles.

        Returns:
            Number of tensors copied.
        Raises:
            RunError: The model's LoRA has other options.
        """
        ...


class ModelFamily(Protocol):
    """The model side of a family.

    "Base" below is the model that ``load_model`` returns; "model" is a base or the PEFT wrapper around one. A role is a
    part of the model that trains as a whole, such as encoder, projector and llm. Name roles in the order in which the
    forward pass runs through them.

    Attributes:
        name: ``model_type`` in config.json.
        tasks: Names of the tasks that the family can answer.
        roles: {role: names of its modules}. A parameter belongs to the role that one of its parent modules names.
        lora_targets: {role: names of the Linear layers that LoRA adapts in it}.
        full_modules: Names of modules whose own weights train beside LoRA, if their role trains.
        always_frozen: Names of modules whose weights never train, not even with --tuning full.
        quantized: Roles whose Linear layers ``--quantize`` stores in fewer bits.
        files: Names of files that a complete model folder holds beside configuration and weights.
        float32_roles: Roles whose weights and activations stay float32 whatever the base's dtype.
        encoder_role: Role of the audio encoder.
        projector_role: Role between encoder and language model; "" if there is none.
        layer_names: Layers that preflight treats specially.
        reads_samples: Whether the features are samples, which have no frequencies to mask.
    """

    name: str
    tasks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    lora_targets: Mapping[str, tuple[str, ...]]
    full_modules: tuple[str, ...]
    always_frozen: tuple[str, ...]
    quantized: tuple[str, ...]
    files: tuple[str, ...]
    float32_roles: tuple[str, ...]
    encoder_role: str
    projector_role: str
    layer_names: LayerNames
    reads_samples: bool

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> FrontEnd:
        """Build the front end of a base.

        Args:
            model_id: Folder or hub name of the base.
            trim_audio: Omit the audio tokens that stand for padding only.
        Raises:
            SettingsError: ``trim_audio`` is set, and clips of this family always take the same number of tokens.
        """
        ...

    def projector_positions(self, config: Any, front_end: FrontEnd) -> int:
        """Positions per window that the modules between encoder and language model work on.

        Args:
            config: The base's configuration.
        """
        ...

    def encoder_layer_positions(self, config: Any, front_end: FrontEnd) -> int:
        """Positions per window that the encoder's layers work on, before it averages some of them."""
        ...

    def cross_attention_frames(self, config: Any, front_end: FrontEnd) -> int:
        """Encoder outputs per window that the keys and values of cross-attention are computed from; 0 without any."""
        ...

    def no_decay(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter is excluded from weight decay."""
        ...

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Copy everything but configuration and weights that makes a model folder complete.

        Called when a merged model is exported to ``folder``.
        """
        ...

    def read_official(self, path: str, *, r: int, alpha: float) -> InitAdapter | None:
        """Read a checkpoint of the family's original training code, to start training from it.

        Args:
            path: Value of --init_adapter.
            r, alpha: LoRA rank and alpha of the new training.
        Returns:
            None if the family has no original training code or ``path`` is not one of its checkpoints.
        Raises:
            RunError: The checkpoint cannot be read.
            SettingsError: It was trained with another rank or alpha.
        """
        ...

    def write_official(self, model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
        """Write the trained weights as a checkpoint that the family's original code loads.

        Args:
            model: Base with adapter.
            model_id: The base.
        Returns:
            Path of the checkpoint and the number of tensors in it.
        Raises:
            RunError: The base itself has trained weights that the checkpoint cannot hold.
            SettingsError: The family has no original code, or that code does not support this kind of adapter.
        """
        ...

    def load_official(self, base: Any, path: Path) -> Any:
        """Load what ``write_official`` wrote into a base without adapter; returns the model in eval mode."""
        ...

    def content_hash(self, model_id: str) -> str:
        """Hash of the contents of all files of a base; RunError if one cannot be read."""
        ...

    def encoder_fingerprint(self, model_id: str) -> str:
        """Hash of the audio encoder's stored weights and configuration. It identifies stored encoder outputs."""
        ...

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the audio encoder alone, with the same weights that ``load_model`` gives it.

        Raises:
            RunError: Its weights are missing or do not fit the configuration.
        """
        ...

    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Run an encoder from ``load_encoder`` on whole windows.

        Args:
            num_samples_W: Unpadded samples of every window.
        Returns:
            states_WPD. They are stored and later replace ``input_features``.
        """
        ...

    def skip_encoder(self, model: Any) -> None:
        """Make a model accept encoder outputs as ``input_features``, and free the encoder's memory."""
        ...

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load a base in eval mode, with every weight frozen.

        Args:
            dtype: Type of the weights and of the computation.
            quantize: ``none``, or ``8bit`` or ``4bit`` to quantize the Linear layers of the ``quantized`` roles.
        Raises:
            RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
        """
        ...

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """Build a base on PyTorch's meta device: parameters have shape and dtype but take no memory.

        Preflight uses it to estimate memory. Layers are not quantized.
        """
        ...

    def audio_path(self, model: Any) -> torch.nn.Module:
        """The modules of a model that process whole windows, adapter included, as one module (see ``AudioPath``).

        jobs/compile.py compiles it. Its input has the model's dtype. Its output has the same number of rows for every
        window, and a window's rows do not depend on the other windows.
        """
        ...

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Make a model call ``run`` instead of its own ``audio_path``, and free the memory of the encoder's layers."""
        ...

    def compile_layers(self, model: Any) -> None:
        """Compile the transformer layers that ``answer_logits`` trains. Generation still runs them uncompiled.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        ...

    def answer_logits(
        self,
        model: Any,
        batch: Batch,
        positions_N: torch.Tensor,
        output: OutputFn = apply_layer,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """The forward pass of training, validation and perplexity. Computes logits at selected positions only.

        Args:
            batch: As ``collate_training`` or ``collate_packed`` makes it, without ``labels``, ``task`` and
                ``answer_positions``.
            positions_N: Positions whose next token is to be predicted, counted through all rows (see
                ``batches.collate``).
            output: Computes the result; by default the logits.
            roles_in_every_pass: Roles that must take part even if the batch has no audio, because all workers must
                compute with the same weights in the same order. Their weights then get gradients of zero.
        Returns:
            The result of ``output``: logits_NV.
        """
        ...

    def prefill(self, model: Any, batch: Batch) -> tuple[DecodeState, torch.Tensor]:
        """Run prompts, so that answers can be generated token by token.

        Args:
            batch: As ``collate_prompts`` makes it (left-padded).
        Returns:
            State of the rows, and logits_BV of the first token of each answer.
        """
        ...

    def generate(self, model: Any, batch: Batch, *, num_samples: Sequence[int] = (), **options: Any) -> torch.Tensor:
        """Generate answers with transformers' ``generate``: for beam search, sampling, and sequential rows.

        Args:
            batch: As ``collate_prompts`` makes it (left-padded).
            num_samples: Samples of each row's clip.
            options: Arguments of transformers' ``generate``.
        Returns:
            ids_BL of the new tokens, padded on the right.
        """
        ...
