"""Measure what terms in the prompt are worth: true ones, false ones and none, before and after training with contexts.

whisper-base transcribes Korean sentences that name drugs, spoken by espeak-ng. It is tuned (LoRA on the decoder)

    plain    without contexts
    context  with contexts, drawn as --context_shares does by default: true, false and none

on sentences with one half of the drugs. Sentences with the other half are held out, so a term that is recognised there
has to come from the prompt or from the sound. Base and both adapters answer them three times, with a context of the
spoken drug and four others (true), of five others (false), and without one (none). espeak-ng has to be installed.
Prints a table with 95 % intervals, and one JSON line.

    python benchmarks/context.py --real FOLDER --folder runs/context
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "assets")]

import corpus  # noqa: E402
import voices  # noqa: E402

from voxray.commands.evaluate import run_evaluation  # noqa: E402
from voxray.commands.train import run_training  # noqa: E402
from voxray.comparison.compare import compare_tasks  # noqa: E402
from voxray.comparison.evaluations import match_rows, read_evaluations  # noqa: E402
from voxray.config.evaluate import EvaluateSettings  # noqa: E402
from voxray.config.train import WhisperSettings  # noqa: E402

DRUGS = (
    *("아스피린", "와파린", "메트포르민", "이부프로펜", "오메프라졸", "암로디핀", "로사르탄", "심바스타틴", "디곡신"),
    *("클로피도그렐", "레보티록신", "프레드니솔론", "세티리진", "몬테루카스트", "가바펜틴", "푸로세미드", "딜티아젬"),
    *("아토르바스타틴", "에날라프릴", "글리메피리드", "케토프로펜", "란소프라졸", "아목시실린", "시프로플록사신"),
    *("세프트리악손", "타크로리무스", "메토트렉세이트", "카르베딜롤", "텔미사르탄", "리바록사반", "도네페질", "졸피뎀"),
)
SENTENCES = (
    *("{} 한 알을 아침에 드세요", "어제부터 {} 복용을 중단했습니다", "{} 때문에 속이 쓰립니다"),
    *("{} 용량을 두 배로 늘리겠습니다", "환자는 {} 알레르기가 있습니다", "{} 처방을 다시 받으러 왔습니다"),
    *("저녁마다 {} 오 밀리그램을 먹습니다", "{} 먹고 나서 어지럽습니다"),
)
METRICS = ("term_recall", "context_leak", "cer_nospace")
NUM_TRAIN, NUM_TEST, NUM_OTHERS, NUM_RESAMPLES = 200, 80, 4, 2000


def write_manifests(folder: Path) -> None:
    """Write clips and the manifests train, true and false, and the list of all drugs."""
    rng = random.Random(7)
    half = len(DRUGS) // 2
    for name, drugs, number in (("train", DRUGS[:half], NUM_TRAIN), ("true", DRUGS[half:], NUM_TEST)):
        pairs = [(drug, sentence.format(drug)) for drug in drugs for sentence in SENTENCES]
        pairs = [pairs[index % len(pairs)] for index in rng.sample(range(2 * len(pairs)), number)]
        lines = [(text, voices.draw_speaker(rng, "ko", adaptation=True)) for _, text in pairs]
        rows = []
        for index, (samples, (drug, text)) in enumerate(zip(voices.speak_all(lines), pairs, strict=True)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{index:03d}.ogg").write_bytes(voices.encode(samples, ".ogg"))
            others = [other for other in drugs if other != drug]
            context = rng.sample([drug, *rng.sample(others, NUM_OTHERS)], NUM_OTHERS + 1)
            row = {"audio_path": f"{name}/{index:03d}.ogg", "transcript": text, "language": "ko", "context": context}
            rows.append({**row, "false": rng.sample(others, NUM_OTHERS + 1)})
        corpus.write_jsonl(folder / f"{name}.jsonl", rows)
        if name == "true":
            corpus.write_jsonl(folder / "false.jsonl", [{**row, "context": row["false"]} for row in rows])
    (folder / "drugs.txt").write_text("\n".join(DRUGS), encoding="utf-8")


def train(base: str, folder: Path, name: str, shares: str) -> str:
    """Tune the base; returns the run folder."""
    values = {"model_id": base, "train_jsonl": str(folder / "train.jsonl"), "output_dir": str(folder / name)}
    values |= {"context_shares": shares, "freeze_encoder": True, "store": "encoder", "num_workers": 0, "lora_r": 16}
    values |= {"features_dir": str(folder / "features"), "per_device_bsz": 8, "max_steps": 150, "warmup_steps": 15}
    values |= {"lr": 5e-4, "save_steps": 150, "report_to": "none"}
    run_training(WhisperSettings.model_validate(values), show_next=False)
    return str(folder / name)


def evaluate(base: str, folder: Path, adapter: str, context: str) -> Path:
    """Answer the test rows with one kind of context; returns the folder of the evaluation."""
    manifest = folder / ("false.jsonl" if context == "false" else "true.jsonl")
    name = f"{Path(adapter).name or 'base'}-{context}"
    values = {"model_id": base, "lora_dir": adapter, "val_jsonl": str(manifest), "no_context": context == "none"}
    values |= {"output_dir": str(folder / "evaluations" / name), "terms": str(folder / "drugs.txt")}
    values |= {"features_dir": str(folder / "features"), "store": "encoder", "gen_max_new_tokens": 60}
    values |= {"per_device_bsz": 16}
    return run_evaluation(EvaluateSettings.model_validate(values)).output_dir


def cell(entry: dict[str, Any] | None) -> str:
    """A value with its interval."""
    return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})" if entry else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, required=True, help="folder with whisper-base (see tests/real)")
    parser.add_argument("--folder", type=Path, required=True)
    flags = parser.parse_args()
    folder, base = flags.folder.resolve(), str((flags.real / "whisper-base").resolve())
    if not (folder / "drugs.txt").is_file():
        write_manifests(folder)
    adapters = {"base": "", "plain": train(base, folder, "plain", "none=1")}
    adapters["context"] = train(base, folder, "context", "true=0.5,false=0.25,none=0.25")
    points = []
    print(f"{'model':8} {'context':8} " + " ".join(f"{name:24}" for name in METRICS))
    for model, adapter in adapters.items():
        for context in ("true", "false", "none"):
            output_dir = evaluate(base, folder, adapter, context)
            metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))["asr"]
            row = {"model": model, "context": context, **{name: metrics.get(name) for name in METRICS}}
            points.append(row)
            print(f"{model:8} {context:8} " + " ".join(f"{cell(row[name]):24}" for name in METRICS), flush=True)
    runs = read_evaluations([str(folder / "evaluations" / f"{name}-none") for name in ("plain", "context")])
    [task] = compare_tasks(match_rows(runs), seed=0, num_resamples=NUM_RESAMPLES)
    entry = task.pairs[0, 1]["cer_nospace"]
    low, high = entry.interval or (float("nan"), float("nan"))
    print(f"cer_nospace without a context, context - plain: {entry.difference:+.3f} ({low:+.3f} to {high:+.3f})")
    print(json.dumps({"benchmark": "context", "points": points, "without": [entry.difference, low, high]}))


if __name__ == "__main__":
    main()
