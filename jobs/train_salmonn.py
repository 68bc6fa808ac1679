"""Fine-tune SALMONN, stage 1 or 2: its Q-Former, its projection, and LoRA on the language model.

Example:

    python jobs/train_salmonn.py --config jobs/configs/salmonn_stage1.yaml
"""

from voxray.config.parse import parse
from voxray.config.salmonn import SalmonnSettings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    about, demo = __doc__ or "", "demo_train_salmonn.yaml"
    settings = parse(SalmonnSettings, argv, job="train_salmonn", about=about, demo=demo)
    from voxray.commands.train import run_training

    run_training(settings)


if __name__ == "__main__":
    main()
