"""FSDP and ZeRO give the losses of plain data parallelism with a tiny base of every model type."""

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from conftest import write_rows
from helpers import audio_lm_tiny, audio_seq2seq_tiny, processes
from helpers.audio_lm_rows import noise
from helpers.processes import STRATEGIES, Job

from voxray.config.train import MultitaskSettings, WhisperSettings
from voxray.recipes.training_data import TrainingData

REFUSED = [("fsdp", "moonshine"), ("zero3", "moonshine")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sharding_equals_ddp(make_features: Callable[..., tuple[Path, ...]], tmp_path: Path) -> None:
    """All runs in the same two processes, because starting processes takes longer than a short run."""
    pytest.importorskip("deepspeed")
    rows = []
    for number, length in enumerate((9_000, 24_321, 16_000, 40_001)):
        soundfile.write(tmp_path / f"{number}.wav", noise(length), 16_000, subtype="PCM_16")
        rows.append({"audio_path": str(tmp_path / f"{number}.wav"), "transcript": f"one {number}", "language": "en"})
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    bases = {name: audio_lm_tiny.write_tiny(tmp_path / name, name) for name in audio_lm_tiny.BASES}
    others = audio_seq2seq_tiny.BASES
    bases |= {name: audio_seq2seq_tiny.write_tiny_seq2seq(tmp_path / name, name) for name in others}
    jobs = []
    pairs = [(strategy, name) for strategy in STRATEGIES for name in bases]
    pairs = [pair for pair in pairs if pair not in REFUSED]
    for strategy, name in pairs:
        base, flags = bases[name], STRATEGIES[strategy]
        data = TrainingData(make_features(manifest, model_id=base), ())
        values = {"train_jsonl": "unused", "model_id": base, "num_workers": 0, "lora_dropout": 0.0, "lr": 1e-2}
        values |= {"max_steps": 3, "per_device_bsz": 1, "grad_accum": 2, "lora_r": 4, "lora_alpha": 8, **flags}
        values |= {"output_dir": str(tmp_path / "runs" / f"{name}-{strategy}"), "warmup_steps": 0}
        settings = WhisperSettings if name in others else MultitaskSettings
        jobs.append(Job(settings.model_validate(values), data))
    records = processes.run_all(jobs, 2)
    losses = {
        Path(job.settings.output_dir).name: [r["loss"] for r in run] for job, run in zip(jobs, records, strict=True)
    }
    for name in bases:
        assert len(set(losses[f"{name}-ddp"])) == 3, f"{name}: nothing was learned"
        for strategy in (strategy for strategy, other in pairs if other == name):
            assert losses[f"{name}-{strategy}"] == pytest.approx(losses[f"{name}-ddp"], abs=1e-4), (name, strategy)
