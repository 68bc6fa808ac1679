"""Serve a web page to try a model: record or upload a clip, transcribe it, ask about it, compare with the base model.

Example:

    python jobs/demo.py --lora_dir runs/multitask --bf16
"""

from voxray.config.demo import DemoSettings
from voxray.config.parse import DEMO_ASSETS, parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(DemoSettings, argv, job="demo", about=__doc__ or "", demo="demo_demo.yaml")
    from voxray.commands.demo import run_demo

    run_demo(settings, example=str(DEMO_ASSETS / "speech/sample.wav"))


if __name__ == "__main__":
    main()
