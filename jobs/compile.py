"""Compile a model's audio encoder ahead of time for some batch sizes, and check the programs against the model.

Evaluate and efficiency use the result with --compiled.

Example:

    python jobs/compile.py --model_id mistralai/Voxtral-Mini-3B-2507 --bf16 --windows 1,4 --output_dir runs/compiled
"""

from voxray.config.compile import CompileSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(CompileSettings, argv, job="compile", about=__doc__ or "", demo="demo_compile.yaml")
    from voxray.commands.compile import run_compile

    run_compile(settings)


if __name__ == "__main__":
    main()
