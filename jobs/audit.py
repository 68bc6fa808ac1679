"""Check manifests before they cost GPU hours: schema, damaged audio, duplicates, leaks, lengths, outliers."""

from voxray.config.audit import AuditSettings
from voxray.config.parse import parse
from voxray.core.errors import job


@job
def main(argv: list[str] | None = None) -> None:
    settings = parse(AuditSettings, argv, job="audit", about=__doc__ or "", demo="demo_audit.yaml")
    from voxray.commands.audit import run_audit_job

    run_audit_job(settings)


if __name__ == "__main__":
    main()
