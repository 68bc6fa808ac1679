"""Answer and score the rows of manifests with a base model, with or without an adapter."""

from voxray.config.evaluate import EvaluateSettings
from voxray.config.parse import parse
from voxray.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(EvaluateSettings, argv, job="evaluate", about=__doc__ or "", demo="demo_evaluate.yaml")
    from voxray.evaluation.job import run_evaluation

    run_evaluation(settings)


if __name__ == "__main__":
    main()
