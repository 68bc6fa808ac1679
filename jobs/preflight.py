"""Check everything a training run needs, find settings that fit in memory and are fast, and print the launch command.

Example:

    python jobs/preflight.py --train_jsonl data/asr.train.jsonl --val_jsonl data/asr.val.jsonl --output_dir runs/asr
"""

import sys

from voxray.config.parse import parse
from voxray.config.preflight import preflight_settings
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    kind, why = preflight_settings(sys.argv[1:] if argv is None else argv)
    settings = parse(kind, argv, job="preflight", about=__doc__ or "", demo="demo_preflight.yaml")
    from voxray.commands.preflight import run_preflight

    run_preflight(settings, why)


if __name__ == "__main__":
    main()
