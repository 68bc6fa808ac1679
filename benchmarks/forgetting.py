"""Measure what tuning on new voices costs on the base's own voices, and what replay, distillation and scales save.

The tiny Voxtral is tuned as in `make demo`, the tiny Whisper as in its demo configuration, on Korean women's voices:

    plain    the demo
    replay   a share of the rows is drawn from other clips in the base's own voices (--replay_jsonl)
    distill  the divergence from the base is part of the loss (--distill_weight)
    both     replay and distillation

Each adapter is evaluated at several scales (--lora_scale) on the held-out clips of the demo ("new") and on 400 clips in
the base's own voices ("old"), with texts that occur nowhere else. With --real, whisper-base is tuned on the same voices
(LoRA on the decoder). Its old clips are the real ones in nine languages, and it replays sentences of these languages
with its own answers as labels. espeak-ng has to be installed. Prints a table of cer_nospace with 95 % intervals, and
one JSON line.

    python benchmarks/forgetting.py --folder runs/forgetting --seeds 0,1,2
    python benchmarks/forgetting.py --folder runs/forgetting --models real --real FOLDER --seeds 0
"""

import argparse
import json
import random
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests" / "assets"
sys.path += [str(ROOT), str(ASSETS)]

import corpus  # noqa: E402
import texts  # noqa: E402
import voices  # noqa: E402

from voxray.commands import evaluate  # noqa: E402
from voxray.commands.evaluate import run_evaluation  # noqa: E402
from voxray.commands.infer import run_inference  # noqa: E402
from voxray.commands.train import run_training  # noqa: E402
from voxray.comparison.compare import compare_slices, compare_tasks  # noqa: E402
from voxray.comparison.evaluations import match_rows, read_evaluations  # noqa: E402
from voxray.config.evaluate import EvaluateSettings, InferSettings  # noqa: E402
from voxray.config.train import MultitaskSettings, WhisperSettings  # noqa: E402

NEW = "asr.val"
"""Data set of the new voices."""
NUM_OLD, NUM_REPLAY, NUM_RESAMPLES = 400, 300, 2000
MODELS: dict[str, tuple[str, str, Any]] = {
    "voxtral": ("voxtral-tiny", "quickstart.yaml", MultitaskSettings),
    "whisper": ("whisper-tiny", "demo_train_whisper.yaml", WhisperSettings),
}
REAL: dict[str, Any] = {
    **{"train_jsonl": "tests/assets/speech/asr.train.jsonl", "language": "ko", "freeze_encoder": True},
    **{"store": "encoder", "per_device_bsz": 8, "max_steps": 150, "warmup_steps": 15, "lr": 5e-4, "lora_r": 16},
}
"""Settings of whisper-base."""
SENTENCES = {
    "en": ("The train leaves in ten minutes.", "She bought bread and milk this morning.", "It will rain tomorrow."),
    "es": ("El tren sale en diez minutos.", "Ella compró pan y leche esta mañana.", "Mañana va a llover."),
    "fr": ("Le train part dans dix minutes.", "Elle a acheté du pain et du lait.", "Il va pleuvoir demain."),
    "hi": ("ट्रेन दस मिनट में जाएगी।", "उसने सुबह रोटी और दूध खरीदा।", "कल बारिश होगी।"),
    "it": ("Il treno parte tra dieci minuti.", "Ha comprato pane e latte stamattina.", "Domani pioverà."),
    "ja": ("でんしゃは じゅっぷんごに でます。", "かのじょは けさ パンを かいました。", "あしたは あめでしょう。"),
    "pl": ("Pociąg odjeżdża za dziesięć minut.", "Rano kupiła chleb i mleko.", "Jutro będzie padać."),
    "pt": ("O comboio parte daqui a dez minutos.", "Ela comprou pão e leite esta manhã.", "Amanhã vai chover."),
    "zh": ("火车十分钟后开。", "她今天早上买了面包和牛奶。", "明天会下雨。"),
}
VOICES = {"en": "en-us", "pt": "pt", "fr": "fr", "zh": "cmn"}
"""espeak's names of languages that have other ones than their codes."""
DROPPED = ("base_val_jsonl", "num_workers", "val_jsonl", "eval_bsz")


def write_old_voices(folder: Path) -> dict[str, str]:
    """Write clips in the base's own voices; returns the manifests for evaluation and for replay."""
    rng, held_out = random.Random(99), corpus.HeldOut()
    old = _draw(rng, NUM_OLD, texts.heldout_utterance, held_out.guard)
    # neither held-out rows of the demo nor those above
    guard = texts.LeakGuard([each.text for each in (*held_out.val, *held_out.base, *old)])
    replay = _draw(rng, NUM_REPLAY, texts.utterance, guard)
    manifests = {}
    for name, utterances in (("old", old), ("replay", replay)):
        manifests[name] = str(folder / f"{name}.jsonl")
        if not (folder / f"{name}.jsonl").is_file():
            _write(folder, name, utterances, rng)
    return manifests


def _draw(rng: random.Random, number: int, draw: Any, guard: Any) -> list[Any]:
    """Half Korean, half English."""
    return [each for language in ("ko", "en") for each in texts.distinct(rng, language, number // 2, draw, guard)]


def _write(folder: Path, name: str, utterances: list[Any], rng: random.Random) -> None:
    speakers = [voices.draw_speaker(rng, each.language, adaptation=False) for each in utterances]
    clips = voices.speak_all([(each.text, speaker) for each, speaker in zip(utterances, speakers, strict=True)])
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (samples, utterance) in enumerate(zip(clips, utterances, strict=True)):
        if len(samples) <= voices.MAX_SEC * voices.SAMPLE_RATE_HZ:
            (folder / name / f"{index:03d}.ogg").write_bytes(voices.encode(samples, ".ogg"))
            rows.append(corpus.asr_row(f"{name}/{index:03d}.ogg", utterance))
    corpus.write_jsonl(folder / f"{name}.jsonl", rows)


def write_real_replay(folder: Path, base: str) -> str:
    """Write spoken sentences in the languages of the real clips, with the answers of the base as labels."""
    manifest, rng, rows = folder / "real-replay.jsonl", random.Random(5), []
    if manifest.is_file():
        return str(manifest)
    (folder / "real-replay").mkdir(parents=True, exist_ok=True)
    for language, sentences in SENTENCES.items():
        for number, (sentence, variant) in enumerate((each, tone) for each in sentences for tone in ("m1", "m3", "f2")):
            speaker = voices.Speaker(f"{VOICES.get(language, language)}+{variant}", rng.randint(140, 180), 50)
            path = folder / "real-replay" / f"{language}{number}.ogg"
            path.write_bytes(voices.encode(voices.speak(sentence, speaker), ".ogg"))
            rows.append({"audio_path": f"real-replay/{path.name}", "transcript": sentence, "language": language})
    corpus.write_jsonl(folder / "real-spoken.jsonl", rows)
    values = {"model_id": base, "jsonl": str(folder / "real-spoken.jsonl"), "pseudo_labels": str(manifest)}
    run_inference(InferSettings.model_validate({**values, "max_new_tokens": 60}), "")
    return str(manifest)


def read_settings(model: str, flags: Any) -> tuple[dict[str, Any], Any]:
    """Training settings of a model, without data of the benchmark, and their class."""
    if model == "real":
        return {**REAL, "model_id": str((flags.real / "whisper-base").resolve())}, WhisperSettings
    base, config, settings_class = MODELS[model]
    values = yaml.safe_load((ROOT / "jobs" / "configs" / config).read_text())
    values = {name: value for name, value in values.items() if name not in DROPPED}
    if model == "voxtral":
        values["grad_accum"] = 2  # the demo has two workers
    return {**values, "model_id": str(ASSETS / base)}, settings_class


def measure(model: str, variant: str, seed: int, folder: Path, old: dict[str, str], flags: Any) -> list[dict[str, Any]]:
    """Train one adapter and evaluate it at all scales; returns the points of the frontier."""
    run_dir = folder / f"{model}-{variant}-{seed}"
    values, settings_class = read_settings(model, flags)
    paths = values["train_jsonl"]
    values["train_jsonl"] = [str(ROOT / path) for path in (paths if isinstance(paths, list) else [paths])]
    values |= {"output_dir": str(run_dir), "num_workers": 0, "seed": seed}
    values |= {"features_dir": str(folder / f"features-{model}")}
    if model == "real":
        clips = str(flags.real.resolve() / "clips" / "clips.jsonl")
        old = {"old": clips, "replay": write_real_replay(folder, values["model_id"])}
    if variant in ("replay", "both"):
        values |= {"replay_jsonl": [old["replay"]], "replay_share": flags.replay_share}
    if variant in ("distill", "both"):
        values["distill_weight"] = flags.distill_weight
    run_training(settings_class.model_validate(values), show_next=False)
    evaluation = {"model_id": values["model_id"], "features_dir": values["features_dir"], "per_device_bsz": 16}
    evaluation |= {"val_jsonl": [str(ASSETS / "speech" / "asr.val.jsonl"), old["old"]]}
    evaluation |= {"store": values.get("store", "mel"), "gen_max_new_tokens": 60 if model == "real" else 32}
    base_dir, scales = folder / f"{model}-base", [float(scale) for scale in flags.scales.split(",")]
    if not (base_dir / "metrics.json").is_file():
        run_evaluation(EvaluateSettings.model_validate({**evaluation, "output_dir": str(base_dir)}))
    evaluation |= {"lora_dir": str(run_dir), "output_dir": str(run_dir / "evaluation"), "lora_scale": scales}
    output_dir = run_evaluation(EvaluateSettings.model_validate(evaluation)).output_dir
    points = []
    for scale in scales:
        folders = (base_dir, output_dir / f"scale-{scale:g}" if scales[1:] else output_dir)
        points += [{"model": model, "variant": variant, "seed": seed, **point} for point in compare(*folders, scale)]
    return points


def compare(base_dir: Path, tuned_dir: Path, scale: float) -> list[dict[str, Any]]:
    """Of each data set, the values of base and adapter and their paired difference, with 95 % intervals."""
    runs = read_evaluations([str(base_dir), str(tuned_dir)])
    options = {"seed": 0, "num_resamples": NUM_RESAMPLES}
    points = []
    for entry in compare_slices(compare_tasks(match_rows(runs), **options), **options):
        values, point = entry.difference, {"dataset": entry.value, "scale": scale}
        named = {
            "base": (values.first, values.first_interval),
            "value": (values.second, values.second_interval),
            "to_base": (values.difference, values.interval),
        }
        for name, (value, interval) in named.items():
            low, high = interval or (float("nan"), float("nan"))
            point |= {name: value, f"{name}_low": low, f"{name}_high": high}
        points += [point] if entry.slice == "dataset" else []
    return points


def show(points: list[dict[str, Any]]) -> None:
    """Print the table; rows of several seeds hold their means."""
    print(f"model    variant  scale  {'new':26}{'old':26}old, difference to the base")
    for model in dict.fromkeys(point["model"] for point in points):
        of_model = [point for point in points if point["model"] == model]
        print(f"{model:8} base          0  {cells(of_model, 'base')}")
        for key in dict.fromkeys((point["variant"], point["scale"]) for point in of_model):
            same = [point for point in of_model if (point["variant"], point["scale"]) == key]
            own = [point for point in same if point["dataset"] != NEW]
            print(f"{model:8} {key[0]:8} {key[1]:5g}  {cells(same, 'value')}{cell(own, 'to_base')}", flush=True)


def cells(points: list[dict[str, Any]], name: str) -> str:
    """Values of the new and of the old data."""
    parts = [[point for point in points if (point["dataset"] == NEW) == is_new] for is_new in (True, False)]
    return "".join(f"{cell(part, name):26}" for part in parts)


def cell(points: list[dict[str, Any]], name: str) -> str:
    """A value with its interval; of several seeds, the means."""
    keys = (name, f"{name}_low", f"{name}_high")
    value, low, high = (sum(point[key] for point in points) / len(points) for key in keys)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def compute_here() -> None:
    """Let the evaluate job answer in this process: Ray would take longer to start than the tiny models to answer.

    One thread, also in evaluations, which otherwise take all cores: several of these benchmarks may run side by side.
    """
    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None
    evaluate.ray_session = lambda *args: nullcontext()
    for name in ("make_features", "answer_rows"):
        setattr(evaluate, name, partial(getattr(evaluate, name), use_ray=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", default="voxtral,whisper", help="some of voxtral, whisper and real")
    parser.add_argument("--real", type=Path, help="folder with whisper-base and clips (see tests/real)")
    parser.add_argument("--variants", default="plain,replay,distill,both")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scales", default="0.25,0.5,0.75,1")
    parser.add_argument("--replay_share", type=float, default=0.3)
    parser.add_argument("--distill_weight", type=float, default=1.0)
    flags = parser.parse_args()
    folder = flags.folder.resolve()
    compute_here()
    old, points = write_old_voices(folder), list[dict[str, Any]]()
    for model in flags.models.split(","):
        for variant in flags.variants.split(","):
            for seed in map(int, flags.seeds.split(",")):
                points += measure(model, variant, seed, folder, old, flags)
                show(points)
    print(json.dumps({"benchmark": "forgetting", "points": points}))


if __name__ == "__main__":
    main()
