"""Check manifests before training on them: schema, damaged audio, duplicates, leaks between splits, lengths, outliers.

Writes an HTML report and, with --fix, a manifest of the rows without faults.

Example:

    python jobs/audit.py --input data/asr.train.jsonl,data/asr.val.jsonl --model_id mistralai/Voxtral-Mini-3B-2507
"""

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
