"""Metadata of a row from its manifest, and who may write the keys of chunks."""

from pathlib import Path

from conftest import write_rows

from voxray.evaluation.row_metadata import ManifestKeys

CHUNK = {"chunk": 0, "num_chunks": 1, "whole_samples": 9, "whole_reference": "all", "overlap_share": 0.0}


def test_only_the_jobs_own_manifest_has_chunks(tmp_path: Path):
    """A user's rows may have keys of these names; they are no chunks, and nothing is read from another row."""
    row = {"audio_path": "a.wav", "transcript": "a", "speaker": "s1"}
    path = write_rows(tmp_path / "m.jsonl", [row, {**row, "chunk_of": f"{tmp_path}/m.jsonl:1"}])
    assert ManifestKeys().of(f"{path}:2") == ManifestKeys().of(f"{path}:1")
    chunks = write_rows(tmp_path / "chunks.jsonl", [{"audio_path": "a.wav", **CHUNK, "chunk_of": f"{path}:1"}])
    metadata = ManifestKeys([Path(chunks)]).of(f"{chunks}:1")
    assert metadata["speaker"] == "s1" and {name: metadata[name] for name in CHUNK} == CHUNK
