"""Merge an adapter into its base and write a model that needs neither PEFT nor voxray, after checking its logits.

Example:

    python jobs/export.py --lora_dir runs/multitask --output_dir runs/export
"""

from voxray.config.export import ExportSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(ExportSettings, argv, job="export", about=__doc__ or "", demo="demo_export.yaml")
    from voxray.commands.export import run_export

    run_export(settings)


if __name__ == "__main__":
    main()
