"""The formats of merged models: how each is written, and how the written files are read back."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from voxray.batches.collate import collate_training
from voxray.core.manifest import Sample
from voxray.core.project_files import typed_command
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow
from voxray.models.adapters.lora import load_adapter
from voxray.models.adapters.merge import MergeLayers, in_float32, merged_tensors
from voxray.models.adapters.read_files import CONFIG, WEIGHTS
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import ModelFamily
from voxray.models.parts.losses import pass_inputs
from voxray.models.safetensors_files import write_weights
from voxray.models.voxtral.mistral_format import max_lora_rank, peft_names, read_mistral, rename_for_vllm, write_mistral
from voxray.models.whisper.ct2_format import DTYPES as CT2_DTYPES
from voxray.models.whisper.ct2_format import convert_to_ct2, ct2_logits, require_ct2

CPU = torch.device("cpu")
PROBE_SEC, PROBE_TEXT = 1.5, "환자는 어제부터 열이 납니다"
TORCH_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergedModel:
    """What is written.

    Attributes:
        model: Base, with the adapter if there is one.
        layers: Layers to merge when they are written.
        model_id: The base.
        dtype: Type of the written weights, by name.
    """

    model: Any
    layers: MergeLayers
    family: ModelFamily
    model_id: str
    dtype: str

    def write_folder(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the model with its tokenizer and processor files, as transformers loads it."""
        base = unwrap_peft(self.model)
        write_weights(folder, merged_tensors(base, self.layers, dtype))
        self.write_config(folder, dtype)
        self.family.copy_files(self.model_id, folder)

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config.json and generation_config.json."""
        base = unwrap_peft(self.model)
        base.config.dtype, base.config.architectures = dtype, [type(base).__name__]
        base.config.save_pretrained(folder)
        if base.can_generate():
            base.generation_config.save_pretrained(folder)


@dataclass(frozen=True)
class HfFormat:
    """A model folder of transformers.

    Attributes:
        family: The only family that has the format; "" for all.
        dtypes: Values of --dtype, beside ``base``.
        takes_trimmed: Whether readers know models without the audio tokens of padding.
    """

    family: str = ""
    dtypes: Sequence[str] = TORCH_DTYPES
    takes_trimmed: bool = True

    def require_library(self) -> None:
        """Raise a SettingsError if a library that writes the format is missing."""

    def write(self, merged: MergedModel, folder: Path) -> None:
        merged.write_folder(folder, getattr(torch, merged.dtype))

    def finish_adapter(self, adapter: Path) -> None:
        """Change the adapter of layers that are not merged into what readers of the format apply, in place."""

    def probe_logits(self, merged: MergedModel, folder: Path) -> torch.Tensor:
        """Logits of the probe (see ``probe_logits``) from the written files."""
        family = merged.family
        model = family.load_model(str(folder), dtype=getattr(torch, merged.dtype), device=CPU)
        if (folder / "adapter" / CONFIG).is_file():
            stored = load_file(folder / "adapter" / WEIGHTS)
            model, num_tensors = load_adapter(model, folder / "adapter")
            assert num_tensors == len(stored) > 0
        with in_float32(model):
            return probe_logits(model, family, family.front_end(str(folder)))

    def usage(self, folder: Path, has_adapter: bool) -> str:
        """A command that uses the written model."""
        return typed_command("infer", "--model_id", str(folder), "--audio_path", "clip.wav")


@dataclass(frozen=True)
class MistralFormat(HfFormat):
    """Mistral's own format (see ``mistral_format``). config.json is for voxray, which builds the front end from it."""

    family: str = "voxtral"
    takes_trimmed: bool = False

    def write(self, merged: MergedModel, folder: Path) -> None:
        base, dtype = unwrap_peft(merged.model), getattr(torch, merged.dtype)
        write_mistral(folder, merged_tensors(base, merged.layers, dtype), base.config)
        merged.write_config(folder, dtype)
        merged.family.copy_files(merged.model_id, folder)

    def finish_adapter(self, adapter: Path) -> None:
        rename_for_vllm(adapter)

    def probe_logits(self, merged: MergedModel, folder: Path) -> torch.Tensor:
        family = merged.family
        base = family.load_model(merged.model_id, dtype=getattr(torch, merged.dtype), device=CPU)
        model = read_mistral(folder, base)
        if (folder / "adapter" / CONFIG).is_file():
            with peft_names(folder / "adapter") as adapter:
                model, _ = load_adapter(model, adapter)
        with in_float32(model):
            return probe_logits(model, family, family.front_end(str(folder)))

    def usage(self, folder: Path, has_adapter: bool) -> str:
        command = f"vllm serve {folder} --config-format mistral --load-format mistral --tokenizer-mode mistral"
        if not has_adapter:
            return command
        lora = f"--enable-lora --max-lora-rank {max_lora_rank(folder / 'adapter')}"
        return f"{command} {lora} --lora-modules tuned={folder / 'adapter'}"


@dataclass(frozen=True)
class Ct2Format(HfFormat):
    """CTranslate2's format (see ``ct2_format``)."""

    family: str = "whisper"
    dtypes: Sequence[str] = CT2_DTYPES

    def require_library(self) -> None:
        require_ct2("--format ct2")

    def write(self, merged: MergedModel, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # inside, so that the next export removes it
            merged.write_folder(Path(temporary), torch.float32)
            convert_to_ct2(Path(temporary), folder, merged.dtype)

    def probe_logits(self, merged: MergedModel, folder: Path) -> torch.Tensor:
        front_end = merged.family.front_end(str(folder))
        [row] = probe_rows(merged.family, front_end)
        batch = collate_training([row], front_end)
        return ct2_logits(folder, batch["input_features"].numpy(), row.prompt_ids.tolist(), row.target_ids.tolist())

    def usage(self, folder: Path, has_adapter: bool) -> str:
        flags = ("--model_id", str(folder), "--engine", "ct2", "--audio_path", "clip.wav")
        return typed_command("infer", *flags)


FORMATS = {"hf": HfFormat(), "mistral": MistralFormat(), "ct2": Ct2Format()}
"""{value of --format: how a merged model is written and read}."""


def probe_rows(family: ModelFamily, front_end: FrontEnd) -> list[FeatureRow]:
    """A transcript of a fixed noise clip and, if the family has the task tqa, the answer to a fixed text question."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(PROBE_SEC * front_end.sample_rate_hz)).astype(np.float32)
    features, known = front_end.features(samples), front_end.languages
    language = "ko" if known is None or "ko" in known else min(known)
    rows = []
    for name in ("asr", "tqa") if "tqa" in family.tasks else ("asr",):
        has_audio = TASKS[name].has_audio
        prompt, path = ("", "probe") if has_audio else (PROBE_TEXT, "")
        sample = Sample("probe", TASKS[name], prompt, PROBE_TEXT, path, language, "")
        num_windows = features.num_windows if has_audio else 0
        values = {"id": "probe", "task": name, "language": language, "source": "", "prompt": sample.prompt}
        values |= {"answer": PROBE_TEXT, "fill": features.fill, "num_windows": num_windows, "num_samples": len(samples)}
        values |= {
            "prompt_ids": front_end.prompt_ids(sample, len(samples) if has_audio else 0),
            "audio": features.mel_KF,
        }
        rows.append(FeatureRow.from_values({**values, "target_ids": front_end.target_ids(PROBE_TEXT)}))
    return rows


@torch.no_grad()
def probe_logits(model: Any, family: ModelFamily, front_end: FrontEnd) -> torch.Tensor:
    """Logits of all answer tokens of ``probe_rows``, one row of the result per token."""
    batch = collate_training(probe_rows(family, front_end), front_end)
    return family.answer_logits(model, pass_inputs(batch), batch["answer_positions"]).float()
