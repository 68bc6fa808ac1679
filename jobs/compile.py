"""Compile what hears the audio ahead of time, for given numbers of windows, and check it against the model."""

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
