"""Start a project from one's own data: manifests, training settings that fit this machine, and the commands to run.

Example:

    python jobs/new.py my-project --data 전사.csv --model_id openai/whisper-small
"""

from voxray.config.new import NewSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    about, demo = __doc__ or "", "demo_new.yaml"
    settings = parse(NewSettings, argv, job="new", about=about, demo=demo, positional="project")
    from voxray.commands.new import run_new

    run_new(settings)


if __name__ == "__main__":
    main()
