"""Answer and score the rows of manifests with a base model, with or without an adapter; or score what is there."""

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
