"""Whisper in CTranslate2's format, which faster-whisper and ``--engine ct2`` read.

A folder holds model.bin and vocabulary.json beside the tokenizer and processor files of transformers. Its config.json
has the keys of both libraries: CTranslate2 ignores those of transformers, from which voxray builds the front end.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from voxray.core.errors import SettingsError, library_errors
from voxray.core.storage import write_json

MODEL = "model.bin"
DTYPES = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "float16", "bfloat16", "float32")
"""CTranslate2's names of the types that it stores. int8 keeps layers that it does not quantize in the base's type."""


def require_ct2(flag: str) -> None:
    """Raise a SettingsError if CTranslate2 is not installed."""
    if find_spec("ctranslate2") is None:
        raise SettingsError(f"{flag}: CTranslate2 is not installed; pip install 'voxray[ct2]'")


def convert_to_ct2(source: Path, folder: Path, dtype: str) -> None:
    """Convert a Whisper model of transformers.

    Args:
        source: Its folder. All files but the weights are copied.
        folder: Folder to write to.
        dtype: One of ``DTYPES``.
    """
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        converted = Path(temporary) / "model"
        with library_errors("--format ct2: CTranslate2 cannot convert the model"):
            TransformersConverter(str(source)).convert(str(converted), quantization=dtype)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config |= json.loads((converted / "config.json").read_text(encoding="utf-8"))
        for path in (path for path in source.iterdir() if path.suffix != ".safetensors"):
            shutil.copyfile(path, folder / path.name)
        for path in converted.iterdir():
            path.replace(folder / path.name)
    write_json(folder / "config.json", config)


@torch.no_grad()
def ct2_logits(folder: Path, mel_1FT: np.ndarray, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Logits_NV of the tokens of an answer, computed by CTranslate2 on the CPU.

    Args:
        mel_1FT: float32 log-mel of one window.
        prompt, answer: Token ids; the last one of the answer ends the text.
    """
    import ctranslate2

    model = ctranslate2.models.Whisper(str(folder), device="cpu", intra_threads=torch.get_num_threads())
    options = {"beam_size": 1, "suppress_blank": False, "suppress_tokens": [], "return_logits_vocab": True}
    length = len(prompt) + len(answer)
    # Answer tokens after the prompt are forced, and each has its logits.
    [result] = model.generate(
        ctranslate2.StorageView.from_array(mel_1FT), [[*prompt, *answer[:-1]]], max_length=2 * length, **options
    )
    logits = result.logits[0][: len(answer)]
    return torch.stack([torch.from_numpy(np.array(each)).float().flatten() for each in logits])
