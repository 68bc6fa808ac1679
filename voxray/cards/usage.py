"""How to use an adapter or an exported model: the commands and programs of a model card."""

from collections.abc import Iterator

from voxray.cards.facts import AdapterFacts, BaseFacts
from voxray.core.tasks import TASKS
from voxray.models.adapters.read_files import FULL
from voxray.models.voxtral.mistral_format import next_lora_rank

FOLDER, BASE = "THIS-FOLDER", "BASE"
"""Words of the examples for the folder of the card, and for a base without a hub id."""
ADAPTER = "adapter"
"""What the card of an adapter is of; the others are the values of ``export --format``."""
ENGINES = {"mistral": " --engine vllm --engine_python PYTHON-WITH-VLLM", "ct2": " --engine ct2"}
"""{value of ``export --format``: flags of voxray that answer with it}."""


def usage(
    kind: str, base: BaseFacts, adapter: AdapterFacts, tasks: tuple[str, ...], *, trimmed: bool, part: str = ""
) -> str:
    """The section "How to use it".

    Args:
        kind: ``ADAPTER``, or the value of ``--format`` of an export.
        tasks: Tasks of the adapter.
        trimmed: Whether it was trained without the audio tokens of padding.
        part: Role whose weights an export merged; the rest of the adapter is beside the model. "" for all.
    """
    blocks = [f"`{FOLDER}` is the folder with this card."]
    if kind == ADAPTER and not base.hub_id:
        blocks[0] += f" `{BASE}` is the folder of the base."
    if trimmed:
        blocks.append("It was trained with `--trim_audio_tokens`: use voxray, because other programs do not know this.")
    else:
        blocks += _transformers(kind, base, adapter, part)
    blocks += _voxray(kind, base, tasks, part)
    if not trimmed:
        blocks += [*_vllm(kind, base, adapter, part), *_faster_whisper(kind)]
    return "\n\n".join(blocks)


def _block(title: str, language: str, *lines: str) -> str:
    return "\n".join((f"{title}:\n\n```{language}", *lines, "```"))


def _transformers(kind: str, base: BaseFacts, adapter: AdapterFacts, part: str) -> Iterator[str]:
    if not base.architecture or kind not in (ADAPTER, "hf") or (kind == ADAPTER and adapter.method == FULL):
        return
    source, names = (base.hub_id or BASE) if kind == ADAPTER else FOLDER, f"AutoProcessor, {base.architecture}"
    lines = [f'model = {base.architecture}.from_pretrained("{source}")']
    lines.append(f'processor = AutoProcessor.from_pretrained("{source}")')
    if kind == "hf" and not part:
        yield _block("With transformers", "python", f"from transformers import {names}", *lines)
        return
    folder = f"{FOLDER}/adapter" if part else FOLDER
    lines.append(f'model = PeftModel.from_pretrained(model, "{folder}")')
    imports = ("from peft import PeftModel", f"from transformers import {names}")
    yield _block("With PEFT and transformers", "python", *imports, *lines)


def _voxray(kind: str, base: BaseFacts, tasks: tuple[str, ...], part: str) -> Iterator[str]:
    if kind == "official":
        yield "SALMONN's own code reads the checkpoint. voxray trains on from it with `--init_adapter`."
        return
    has_audio = any(TASKS[task].has_audio for task in tasks if task in TASKS)
    example = "--audio_path clip.wav" if has_audio else "--question QUESTION"
    beside = f" --lora_dir {FOLDER}/adapter" if part else ""
    model = f"--model_id {FOLDER}{beside}{ENGINES.get(kind, '')}"
    if kind == ADAPTER:
        model = f"--lora_dir {FOLDER} --model_id {base.hub_id or BASE}"
    lines = (f"voxray {job} {model} {rows}" for job, rows in (("infer", example), ("evaluate", "--val_jsonl ROWS")))
    yield _block("With voxray", "bash", *lines)


def _vllm(kind: str, base: BaseFacts, adapter: AdapterFacts, part: str) -> Iterator[str]:
    """vLLM reads Voxtral in Mistral's format, and Whisper in that of transformers."""
    flags = {"voxtral": ("mistral", _MISTRAL), "whisper": ("hf", "")}.get(base.family)
    if not flags or kind not in (ADAPTER, flags[0]):
        return
    format_, more = flags
    if kind == ADAPTER:
        model = f" --model_id {base.hub_id or BASE}"
        export = f"voxray export --lora_dir {FOLDER}{model} --format {format_} --output_dir exported"
        yield _block("With vLLM", "bash", export, f"vllm serve exported{more}")
    else:
        if part and adapter.rank is not None:
            rank = next_lora_rank(adapter.rank) or adapter.rank
            more += f" --enable-lora --max-lora-rank {rank} --lora-modules tuned={FOLDER}/adapter"
        yield _block("With vLLM", "bash", f"vllm serve {FOLDER}{more}")


def _faster_whisper(kind: str) -> Iterator[str]:
    if kind == "ct2":
        lines = (f'model = WhisperModel("{FOLDER}")', 'segments, info = model.transcribe("clip.wav")')
        yield _block("With faster-whisper", "python", "from faster_whisper import WhisperModel", *lines)


_MISTRAL = " --config-format mistral --load-format mistral --tokenizer-mode mistral"
