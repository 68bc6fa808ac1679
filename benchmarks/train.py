"""Compare the training speed of voxray's loop and transformers' Trainer, with the same model, rows and LoRA.

Two Voxtrals with 30 s windows and random weights, one with a vocabulary of 4,096 and one with 131,072 (only the head
differs), train on rows in the task mix of the seed data (43 % speech recognition, 5 % spoken QA, 52 % text QA). One
epoch each:

    plain    Trainer as in public Voxtral scripts: log-mel in the collator, rows in manifest order, LoRA by name suffix,
             which also adapts the audio encoder
    strong   Trainer at its best: LoRA on the language model only, length groups, cached log-mel, two loader workers
    voxray   packed batches, logits at answer positions only, from log-mel shards; LoRA also on the projector
    cached   the same from stored outputs of the frozen encoder

All use the same threads, dtype and rank, and the same average number of rows per batch. Tokens are counted without
padding. The losses on the same batches are compared first, to show that the computation is the same. ``matrix speed``
is the speed of voxray's Linear layers, as if nothing else took time, as a share of that of a matrix product of 2,048 x
2,048 numbers. Prints the processor, a table of ratios and one JSON line.

    python benchmarks/train.py --rows 192
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Trainer,
    TrainingArguments,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from voxray.batches.collate import collate_training
from voxray.batches.rank import CPU
from voxray.config.train import MultitaskSettings
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.reader import Features
from voxray.models.adapters.lora import add_lora
from voxray.models.interface import IGNORED
from voxray.models.registry import get_family
from voxray.models.voxtral.tiny import AUDIO_TOKEN_ID
from voxray.preflight.memory import MemoryModel, Training
from voxray.preflight.meta_model import build_meta_model
from voxray.preflight.shapes import ComputeConfig, PackShape
from voxray.recipes.run_context import RunContext
from voxray.recipes.run_stage import train
from voxray.recipes.training_data import TrainingData
from voxray.training.loop import answer_loss
from voxray.training.records import read_metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from helpers.library import library_batch  # noqa: E402

ASSETS = ROOT / "tests/assets/voxtral-tiny"
SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
BATCH_ROWS = 8
RATIOS = (("voxray", "strong"), ("cached", "strong"), ("cached", "plain"))
SHORT = "환자는 어제부터 열이 나고 기침을 하며 "


def write_model(folder: Path, vocab_size: int) -> str:
    """Write a Voxtral with 30 s windows and random weights, in the published layout; returns its folder."""
    audio = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    audio |= {"num_mel_bins": 128, "max_source_positions": 1500}
    text = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 256, "intermediate_size": 768}
    text |= {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    text |= {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    torch.manual_seed(0)
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_TOKEN_ID)
    VoxtralForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tekken.json", "preprocessor_config.json"):
        shutil.copyfile(ASSETS / name, folder / name)
    return str(folder)


def write_rows(folder: Path, count: int) -> str:
    """Write a manifest in the task mix of the seed data; clips are noise. Returns its path."""
    random = np.random.default_rng(0)
    for number in range(16):
        sound = random.normal(0, 0.1, round(16_000 * random.uniform(3, 12))).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", sound, 16_000)
    with open(folder / "m.jsonl", "w", encoding="utf-8") as manifest:
        for number, task in enumerate(random.choice(["asr", "sqa", "tqa"], count, p=[0.43, 0.05, 0.52])):
            clip = {"audio_path": f"{number % 16}.wav", "language": "ko"}
            long = SHORT * max(1, round(random.lognormal(1.0, 0.6)))
            row = {"instruction": long, "input": "", "output": SHORT * 2}
            row = {**clip, "transcript": SHORT} if task == "asr" else row
            row = {**clip, "question": SHORT, "answer": SHORT} if task == "sqa" else row
            manifest.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(folder / "m.jsonl")


def read_clips(manifest: str) -> dict[int, np.ndarray]:
    """Samples of the rows that have a clip, by row number."""
    clips = {}
    for number, line in enumerate(Path(manifest).read_text(encoding="utf-8").splitlines()):
        path = json.loads(line).get("audio_path")
        if path:
            clips[number] = soundfile.read(Path(manifest).parent / path, dtype="float32")[0]
    return clips


def make_features(manifest: str, model_id: str, folder: Path, store: Any = "mel") -> Features:
    extractor = Extractor(model_id, FeatureSpec(store, dtype="float32"))
    return Features(featurize([manifest], extractor, folder, rows_per_shard=64, use_ray=False).folders)


class LengthTrainer(Trainer):
    """Trainer that groups by length. Trainer's own option of this name needs a data set of another library."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        rows: Any = self.train_dataset
        return LengthGroupedSampler(BATCH_ROWS, lengths=rows.lengths)


class Rows(torch.utils.data.Dataset):
    """Row numbers and their lengths."""

    def __init__(self, features: Features) -> None:
        self.lengths = features.num_tokens.tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number, "length": self.lengths[number]}


def trainer_batch(features: Features, front_end: Any, numbers: list[int]) -> dict[str, torch.Tensor]:
    """voxray's padded batch, as Trainer passes it to the model."""
    return library_batch(collate_training([features.row(number) for number in numbers], front_end))


def run_trainer(
    model: Any, features: Features, collate: Callable[..., Any], folder: Path, *, grouped: bool, **options: Any
) -> float:
    """Train one epoch; returns its seconds.

    Args:
        options: Arguments of Trainer that replace those for a CPU.
    """
    values: dict[str, Any] = {
        "per_device_train_batch_size": BATCH_ROWS,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 2 if grouped else 0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**values, **options})
    trainer_class = LengthTrainer if grouped else Trainer
    trainer = trainer_class(model=model, args=arguments, train_dataset=Rows(features), data_collator=collate)
    start_sec = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start_sec


def train_plain(model_id: str, features: Features, clips: dict[int, np.ndarray], folder: Path) -> float:
    """One epoch of Trainer as in public scripts, in seconds."""
    extract = WhisperFeatureExtractor.from_pretrained(model_id)
    front_end = get_family(model_id).front_end(model_id)
    base = VoxtralForConditionalGeneration.from_pretrained(model_id, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(target_modules=SUFFIXES, **LORA))  # type: ignore[arg-type]

    def collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        numbers = [item["number"] for item in items]
        batch = trainer_batch(features, front_end, numbers)
        batch_clips = [clips[number] for number in numbers if number in clips]
        if batch_clips:
            options = {"sampling_rate": 16_000, "padding": "max_length", "return_tensors": "pt"}
            batch["input_features"] = extract(batch_clips, max_length=480_000, **options).input_features
        return batch

    return run_trainer(model, features, collate, folder, grouped=False)


def train_strong(
    model_id: str,
    features: Features,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **options: Any,
) -> float:
    """One epoch of Trainer at its best, in seconds; ``options`` as in ``run_trainer``."""
    family = get_family(model_id)
    front_end = family.front_end(model_id)
    base = family.load_model(model_id, dtype=dtype, device=device)
    model = add_lora(base, family, ("llm",), model_id=model_id, r=LORA["r"], alpha=16, dropout=0.0)  # type: ignore[arg-type]

    def collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return trainer_batch(features, front_end, [item["number"] for item in items])

    return run_trainer(model, features, collate, folder, grouped=True, **options)


def train_voxray(model_id: str, features: Features, run_dir: Path) -> tuple[float, float]:
    """One epoch of voxray's recipe as its job runs it, without validation.

    Returns:
        Its seconds, and the floating-point operations of its Linear layers.
    """
    run_dir.mkdir()
    budget = round(float(features.num_tokens.mean()) * BATCH_ROWS)
    values = {"train_jsonl": "unused", "model_id": model_id, "output_dir": str(run_dir), "epochs": 1, "lr": 1e-4}
    values |= {"batching": "packed", "pack_tokens": max(budget, int(features.num_tokens.max()))}
    values |= {"lora_r": LORA["r"], "lora_alpha": 16, "lora_dropout": 0.0, "store": features.store, "log_steps": 10**6}
    settings = MultitaskSettings.model_validate(values)
    data = TrainingData(features.folders, ())  # type: ignore[arg-type]
    run = RunContext.create(settings, run_dir=run_dir)
    train(run, data)
    model = MemoryModel(build_meta_model(run), run.family, run.front_end, ComputeConfig(torch.float32), Training())
    flops = model.step_flops(whole_pack(features))
    return sum(record["sec"] for record in read_metrics(run_dir, "train")), flops


def whole_pack(features: Features, share: float = 1.0) -> PackShape:
    """A pack with a share of all rows."""
    columns = (features.num_tokens, features.num_windows, features.num_target_tokens)
    num_tokens, num_windows, num_answer_tokens = (round(share * float(column.sum())) for column in columns)
    longest, num_rows = int(features.num_tokens.max()), round(share * len(features))
    return PackShape(num_rows, num_tokens, longest, num_windows, num_answer_tokens, packed=True)


def product_flops_per_sec() -> float:
    """Speed of a large matrix product in float32."""
    size, seconds = 2048, list[float]()
    left, right = torch.randn(size, size), torch.randn(size, size)
    for _ in range(6):
        start_sec = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start_sec)
    return 2 * size**3 / min(seconds)


def processor() -> str:
    """Name of the processor, and the number of threads that compute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {torch.get_num_threads()} threads"


def loss_difference(model_id: str, features: Features) -> float:
    """Largest relative difference between transformers' loss and voxray's on the same batches."""
    family = get_family(model_id)
    front_end = family.front_end(model_id)
    model = family.load_model(model_id, dtype=torch.float32, device=torch.device("cpu"))
    worst = 0.0
    with torch.no_grad():
        for start in (0, 4):
            rows = [features.row(number) for number in range(start, start + 4)]
            batch = collate_training(rows, front_end)
            voxray_loss = float(answer_loss(model, family, batch, 0.0).sum() / (batch["labels"] != IGNORED).sum())
            library_loss = float(model(**library_batch(batch)).loss)
            worst = max(worst, abs(voxray_loss - library_loss) / library_loss)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192, help="rows per epoch")
    parser.add_argument("--vocabularies", default="4096,131072", help="sizes of the vocabulary; one model for each")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    figures, peak_flops = [], product_flops_per_sec()
    print(f"{processor()}, {peak_flops / 1e9:.0f} GFLOP/s in matrix products")
    print("            tokens/s                        to strong       to plain")
    print("vocabulary   plain  strong  voxray  cached  voxray  cached  cached  loss difference  matrix speed")
    with tempfile.TemporaryDirectory() as name:
        manifest = write_rows(Path(name), flags.rows)
        for vocabulary in map(int, flags.vocabularies.split(",")):
            folder = Path(name) / str(vocabulary)
            folder.mkdir()
            model_id = write_model(folder / "model", vocabulary)
            features = make_features(manifest, model_id, folder / "f")
            stored = make_features(manifest, model_id, folder / "f", "encoder")
            clips = read_clips(manifest)
            tokens = float(features.num_tokens.sum())
            difference = loss_difference(model_id, features)
            seconds = {
                "plain": train_plain(model_id, features, clips, folder / "plain"),
                "strong": train_strong(model_id, features, folder / "strong"),
            }
            seconds["voxray"], flops = train_voxray(model_id, features, folder / "voxray")
            seconds["cached"], _ = train_voxray(model_id, stored, folder / "cached")
            share = flops / seconds["voxray"] / peak_flops
            rates = {side: tokens / value for side, value in seconds.items()}
            ratios = [rates[one] / rates[other] for one, other in RATIOS]
            line = "  ".join(f"{rate:6.0f}" for rate in rates.values())
            line += "".join(f"  {ratio:6.2f}" for ratio in ratios)
            print(f"{vocabulary:10}  {line}  {difference:.1e}          {share:.0%}", flush=True)
            row = {
                "vocabulary": vocabulary,
                "loss_difference": difference,
                "share_of_products": round(share, 3),
                **{side: round(rate) for side, rate in rates.items()},
            }
            figures.append({**row, "ratios": [round(ratio, 2) for ratio in ratios]})
    print(json.dumps({"benchmark": "train", "rows": figures}))


if __name__ == "__main__":
    main()
