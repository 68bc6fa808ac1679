"""Answer the rows of manifests with a base model or an adapter and score the answers; or score existing predictions.

Example:

    python jobs/evaluate.py --val_jsonl data/asr.val.jsonl --lora_dir runs/multitask --output_dir runs/eval-tuned
"""

from voxray.config.evaluate import EvaluateSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(EvaluateSettings, argv, job="evaluate", about=__doc__ or "", demo="demo_evaluate.yaml")
    from voxray.commands.score_only import evaluate_or_score

    evaluate_or_score(settings)


if __name__ == "__main__":
    main()
