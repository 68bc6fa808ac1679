"""What a job prints at its end: the commands that use what it wrote."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxray.config.flag_groups import PRECISIONS
from voxray.config.recipes import find_recipe
from voxray.config.train import TrainSettings
from voxray.core.project_files import typed_command
from voxray.core.tasks import TASKS


def after_training(settings: TrainSettings, run_dir: Path, result: Mapping[str, Any]) -> list[str]:
    """Lines about a finished run: a better step than the adapter's, and the commands that use the adapter.

    Args:
        result: What the run returned: ``adapter_step``, the last validation's metrics, and ``best`` {metric: {"step",
            "value"}} if it was validated.
    """
    lines = []
    for name, best in result.get("best", {}).items() if not settings.load_best_model_at_end else ():
        if best["step"] != result["adapter_step"] and best["value"] != result.get(name):
            lines.append(
                f"adapter/ holds step {result['adapter_step']:g}; the best step by {name} was {best['step']:g} "
                f"({best['value']:.4f}); --load_best_model_at_end keeps the best one"
            )
            break
    run = settings.output_dir if "://" in settings.output_dir else str(run_dir)
    rows = ["--val_jsonl", ",".join(settings.val_jsonl) or "YOUR-TEST-ROWS.jsonl"]
    same = flags_to_repeat(vars(settings))
    has_audio = any(TASKS[task].has_audio for task in find_recipe(settings).tasks)
    example = ["--audio_path", "clip.wav"] if has_audio else ["--question", "QUESTION"]
    board = f"{run_dir.name}:{run_dir / 'tensorboard'}"  # with the name of the run
    return [
        *lines,
        "next:",
        f"  {typed_command('evaluate', '--lora_dir', run, *rows, *same)}",
        f"  {typed_command('infer', '--lora_dir', run, *example, *same)}",
        *([f"  tensorboard --logdir_spec {shlex.quote(board)}"] if "tensorboard" in settings.report_to else []),
    ]


def flags_to_repeat(settings: Mapping[str, Any]) -> list[str]:
    """Flags of a training that evaluate and infer need too, because the adapter does not record them.

    Args:
        settings: {name: value} of the training.
    """
    language, quantize = settings.get("language"), settings.get("quantize", "none")
    return [
        *(f"--{name}" for name in PRECISIONS if settings.get(name)),
        *(["--language", language] if language else []),
        *(["--quantize", quantize] if quantize != "none" else []),
    ]


def page_line(page: Path) -> str:
    """How to open an HTML report."""
    return f"open {page.absolute().as_uri()}"


def after_evaluation(output_dir: Path, *, has_page: bool = True) -> list[str]:
    """Lines about a finished evaluation: its page, and the command that compares it with another."""
    compare = typed_command("compare", "OTHER-EVALUATION", str(output_dir))
    return [*([page_line(output_dir / "report.html")] if has_page else []), "next:", f"  {compare}"]


def after_sweep(settings: Any, output_dir: Path) -> list[str]:
    """Lines about a finished sweep: its page, and the command that trains with the best choice."""
    train = typed_command(find_recipe(settings).job, "--config", str(output_dir / "best.yaml"))
    return [page_line(output_dir / "report.html"), "next:", f"  {train}"]


def after_prepare(train: Path, val_manifest: Path | None) -> list[str]:
    """Lines about new manifests: the commands that check them and choose settings to train on them.

    There are none without training rows.
    """
    if not has_rows(train):
        return []
    manifests = [str(train), *([str(val_manifest)] if val_manifest and has_rows(val_manifest) else [])]
    rows = [
        word for flag, path in zip(("--train_jsonl", "--val_jsonl"), manifests, strict=False) for word in (flag, path)
    ]
    return [
        "next:",
        f"  {typed_command('audit', '--input', ','.join(manifests), '--output_dir', str(train.with_suffix('.audit')))}",
        f"  {typed_command('preflight', '--model_id', 'MODEL', *rows, '--output_dir', 'runs/first')}",
    ]


def has_rows(manifest: Path) -> bool:
    """Whether a manifest exists and is not empty."""
    return manifest.is_file() and manifest.stat().st_size > 0
