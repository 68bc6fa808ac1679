"""Compare Ray's published audio pipeline with voxray's evaluation: the same Whisper, clips and texts, on CPUs.

Ray's example and its audio benchmark (113,800 clips of Common Voice, whisper-tiny) go through five stages of Ray Data:
Parquet files with the audio, decoding and resampling, transformers' feature extractor on windows of 30 s, transformers'
generate, and the tokenizer. ``rebuilt`` is this pipeline with batches of 16 and of the rows as they come. ``voxray`` is
jobs/evaluate.py on a manifest of the same clips, from its start to the report with its metrics.

The clips are pieces of 3 to 8 s of real recordings, at 48 kHz as in Common Voice, in FLAC, so that both sides decode
the same samples. CPU seconds are those of the whole machine, which has to be idle; starting Ray is part of both. The
last table says where voxray's time goes: its stages on the first 96 clips, one after the other, in one process.

``--real`` is the folder of real weights and clips that `make real` takes.

    python benchmarks/ray_audio.py --real FOLDER --folder runs/ray-audio
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

RATE_HZ, STORED_HZ = 16_000, 48_000
CLIP_SEC = (3.0, 8.0)
BATCH_ROWS = 16
MAX_NEW_TOKENS = 64
STAGE_CLIPS = 96


def write_clips(real: Path, folder: Path, num_clips: int) -> None:
    """Write clips, a Parquet file that holds them, and a manifest that names them."""
    recordings = [
        path for path in sorted((real / "clips" / "en").rglob("*")) if path.suffix in (".wav", ".flac", ".mp3")
    ]
    sounds = [soundfile.read(path, dtype="float32") for path in recordings]
    random, rows = np.random.default_rng(0), []
    (folder / "clips").mkdir(parents=True)
    for number in range(num_clips):
        samples, rate_hz = sounds[number % len(sounds)]
        samples = samples if samples.ndim == 1 else samples.mean(axis=1)
        length = min(len(samples), round(random.uniform(*CLIP_SEC) * rate_hz))
        start = int(random.integers(0, len(samples) - length + 1))
        piece = soxr.resample(samples[start : start + length], rate_hz, STORED_HZ) * random.uniform(0.3, 1.0)
        piece += random.normal(0, 0.002, len(piece)).astype(np.float32)
        path = folder / "clips" / f"{number:05}.flac"
        soundfile.write(path, np.clip(piece, -1, 1), STORED_HZ, subtype="PCM_16")
        rows.append({"id": f"{number:05}", "audio_path": str(path), "transcript": "unknown", "language": "en"})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"id": [row["id"] for row in rows], "audio_bytes": [Path(row["audio_path"]).read_bytes() for row in rows]}
    pq.write_table(pa.table(table), folder / "clips.parquet", row_group_size=100)


def resample(row: dict[str, Any]) -> dict[str, Any]:
    samples, rate_hz = soundfile.read(io.BytesIO(row["audio_bytes"]), dtype="float32")
    return {"id": row["id"], "samples": soxr.resample(samples, rate_hz, RATE_HZ, quality="VHQ")}


class Preprocessor:
    """Log-mel of windows of 30 s."""

    def __init__(self, model_id: str) -> None:
        from transformers import WhisperFeatureExtractor

        self.extractor = WhisperFeatureExtractor.from_pretrained(model_id)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        features = self.extractor(list(batch["samples"]), sampling_rate=RATE_HZ, return_tensors="np").input_features
        return {"id": batch["id"], "input_features": features}


class Transcriber:
    """Tokens of the answers."""

    def __init__(self, model_id: str) -> None:
        from transformers import WhisperForConditionalGeneration

        self.model = WhisperForConditionalGeneration.from_pretrained(model_id).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        features = torch.from_numpy(np.stack(batch["input_features"]))
        with torch.inference_mode():
            tokens: Any = self.model.generate(features, max_new_tokens=MAX_NEW_TOKENS)
        return {"id": batch["id"], "tokens": [json.dumps(row) for row in tokens.tolist()]}


class Decoder:
    """Texts of tokens."""

    def __init__(self, model_id: str) -> None:
        from transformers import WhisperTokenizer

        self.tokenizer = WhisperTokenizer.from_pretrained(model_id)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tokens = [json.loads(row) for row in batch["tokens"]]
        return {"id": batch["id"], "text": self.tokenizer.batch_decode(tokens, skip_special_tokens=True)}


def rebuilt(model_id: str, folder: Path) -> None:
    """Ray's pipeline, in this process as driver."""
    import ray

    # every stage is a pool of its own, and all of them run at a time
    ray.init(address="local", num_cpus=4 * (os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
    options: dict[str, Any] = {"fn_constructor_args": (model_id,)}
    cpus = os.cpu_count() or 1
    rows = ray.data.read_parquet(str(folder / "clips.parquet")).map(resample, num_cpus=0.5)
    rows = rows.map_batches(Preprocessor, batch_size=BATCH_ROWS, concurrency=1, num_cpus=0.25, **options)
    rows = rows.map_batches(Transcriber, batch_size=BATCH_ROWS, concurrency=max(1, cpus // 2), num_cpus=1, **options)
    rows = rows.map_batches(Decoder, batch_size=32, concurrency=1, num_cpus=0.25, **options)
    rows.write_parquet(str(folder / "rebuilt"))
    ray.shutdown()


def cpu_seconds() -> float:
    """CPU time of all processes of the machine since it started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def measure(command: list[str], log: Path) -> dict[str, float]:
    """Run a command; returns its seconds and those of the CPUs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    cpu_before, before = cpu_seconds(), time.perf_counter()
    with log.open("w") as output:
        subprocess.run(command, env=environment, stdout=output, stderr=output, check=True)
    return {"sec": time.perf_counter() - before, "cpu_sec": cpu_seconds() - cpu_before}


def texts(folder: Path, column: str) -> dict[str, str]:
    """{id: text} of a folder of Parquet files."""
    files = sorted(folder.rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path, columns=["id", column]) for path in files])
    return {
        key: value.strip() for key, value in zip(*(table[name].to_pylist() for name in ("id", column)), strict=True)
    }


def stages(model_id: str, folder: Path) -> dict[str, float]:
    """Seconds of voxray's stages, one after the other in this process."""
    import torch

    from voxray.batches.collate import collate_prompts
    from voxray.core.manifest import chunks, read_chunk
    from voxray.features.extract import Extractor, FeatureSpec
    from voxray.features.reader import FeatureRow
    from voxray.models.registry import get_family

    figures: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        figures[name] = figures.get(name, 0.0) + time.perf_counter() - start
        return result

    torch.set_num_threads(1)
    family, extractor = get_family(model_id), Extractor(model_id, FeatureSpec("mel"))
    front_end, model = (
        family.front_end(model_id),
        family.load_model(model_id, dtype=torch.float32, device=torch.device("cpu")),
    )
    samples = [
        each
        for chunk in chunks(str(folder / "clips.jsonl"), 64)
        for each in read_chunk(chunk, chunk.read_bytes()).samples
    ][:STAGE_CLIPS]
    rows = [
        FeatureRow.from_values(row)
        for sample in samples
        for row in timed(
            "decode, resample, log-mel", lambda sample=sample: extractor.sample_rows(sample, augmented=False)[0]
        )
    ]
    for start in range(0, len(rows), BATCH_ROWS):
        prompts = timed("collate", lambda start=start: collate_prompts(rows[start : start + BATCH_ROWS], front_end))
        with torch.inference_mode():
            features = prompts["input_features"]
            timed("of generation: the encoder", lambda features=features: model.model.encoder(features))
            timed(
                "generation",
                lambda prompts=prompts: family.generate(
                    model, prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=front_end.pad_id
                ),
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--real", type=Path, required=True, help="folder with whisper-tiny.en and clips (see tests/real)"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--pipeline", choices=["rebuilt", "stages"], help="for the processes that this script starts")
    flags = parser.parse_args()
    folder, model_id = flags.folder.resolve(), str((flags.real / "whisper-tiny.en").resolve())
    if flags.pipeline == "rebuilt":
        rebuilt(model_id, folder)
        return
    if flags.pipeline == "stages":
        print(json.dumps(stages(model_id, folder)))
        return
    if not (folder / "clips.parquet").is_file():
        write_clips(flags.real, folder, flags.clips)
    this = [sys.executable, __file__, "--real", str(flags.real), "--folder", str(folder)]
    evaluate = [sys.executable, str(ROOT / "jobs/evaluate.py"), "--model_id", model_id, "--val_jsonl"]
    evaluate += [str(folder / "clips.jsonl"), "--output_dir", str(folder / "voxray"), "--features_dir"]
    evaluate += [str(folder / "features"), "--gen_max_new_tokens", str(MAX_NEW_TOKENS)]
    figures: dict[str, Any] = {"rebuilt": measure([*this, "--pipeline", "rebuilt"], folder / "rebuilt.log")}
    figures["voxray"] = measure(evaluate, folder / "voxray.log")
    reference, own = texts(folder / "rebuilt", "text"), texts(folder / "voxray" / "predictions", "prediction")
    figures["equal_texts"] = sum(reference[key] == own[key] for key in reference) / len(reference)
    for name in ("rebuilt", "voxray"):
        row = figures[name]
        print(f"{name:8} {row['sec']:7.1f} s {row['cpu_sec']:7.1f} CPU s {flags.clips / row['sec']:7.1f} clips/s")
    ratio = figures["rebuilt"]["cpu_sec"] / figures["voxray"]["cpu_sec"]
    print(f"CPU time: {ratio:.2f} times that of voxray; equal texts: {figures['equal_texts']:.1%}")
    output = subprocess.check_output([*this, "--pipeline", "stages"], text=True).splitlines()[-1]
    figures["stages"] = json.loads(output)
    longest = max(figures["stages"].values())
    for name, sec in figures["stages"].items():
        print(f"{name:28} {sec:7.1f} s {'#' * round(40 * sec / longest)}")
    print(json.dumps({"benchmark": "ray_audio", "clips": flags.clips, "ratio": ratio, **figures}))


if __name__ == "__main__":
    main()
