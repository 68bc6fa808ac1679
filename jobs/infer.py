"""Transcribe a clip, answer a question about it, or answer the rows of a manifest.

Example:

    python jobs/infer.py --audio_path clip.wav --lora_dir runs/multitask
"""

from voxray.config.evaluate import InferSettings
from voxray.config.parse import DEMO_ASSETS, parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(InferSettings, argv, job="infer", about=__doc__ or "", demo="demo_infer.yaml")
    from voxray.commands.infer import run_inference

    run_inference(settings, demo_jsonl=str(DEMO_ASSETS / "speech/asr.val.jsonl"))


if __name__ == "__main__":
    main()
