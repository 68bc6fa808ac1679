"""Damaged files of every kind that voxray reads: one clear line or a normal result, never another error.

Each kind takes 200 seeded mutations here, 2,000 in the slow tests. A mutation may take 10 s and all of a kind 1 GiB.
"""

import copy
import json
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
import torch
from conftest import ASSETS, TINY, manifest, read_rows, write_rows
from helpers.corpora import clip, lines
from helpers.mutate import mutate, stopwatch

from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import Sample, chunks, read_chunk, require_usable_row
from voxray.core.tasks import TASKS
from voxray.core.yaml_file import read_yaml
from voxray.corpora.importers import IMPORTERS, ImportFault
from voxray.corpora.importers.embedded import embedded_audio
from voxray.corpora.importers.table import CorpusTable
from voxray.evaluation.distribute import answer_rows, read_failed
from voxray.evaluation.predictions import read_folder_or_jsonl, read_predictions
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.reader import Features
from voxray.generation.generate import SamplingParams
from voxray.generation.model import InferenceConfig
from voxray.models.adapters.lora import add_lora, load_adapter, load_adapter_weights, save_adapter
from voxray.models.registry import get_family
from voxray.runs.inputs import refuse_changed_inputs, write_inputs
from voxray.training.checkpoint import Progress, read_optimizer_state, read_progress, write_progress

AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})
CLEAR = (RunError, SettingsError, BadRow)
SECONDS, GIB = 10.0, 1 << 30
CPU = torch.device("cpu")
WHISPER = str(ASSETS / "whisper-tiny")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        files: The files to damage.
        read: Reads all of them, or uses what was read.
    """

    files: list[Path]
    read: Callable[[], object]


def model() -> Any:
    family = get_family(TINY)
    return family, family.load_model(TINY, dtype=torch.float32, device=CPU)


def use_front_end(folder: Path) -> None:
    front_end = get_family(str(folder)).front_end(str(folder))
    sample = Sample("1", TASKS["asr"], "", "열 도", "a.wav", "ko", "m:1")
    front_end.prompt_ids(sample, 16_000)
    front_end.decode(front_end.target_ids(sample.answer))


def manifests(folder: Path, make_features: Any) -> Kind:
    path = folder / "rows.jsonl"
    rows = read_rows(manifest("sqa.val"))[:6]
    write_rows(path, [{**row, "audio_path": str(Path(manifest("sqa.val")).parent / row["audio_path"])} for row in rows])

    def read() -> None:
        require_usable_row([str(path)])
        for chunk in chunks(str(path), 4):
            read_chunk(chunk, chunk.read_bytes())

    return Kind([path], read)


def yaml_files(folder: Path, make_features: Any) -> Kind:
    path = folder / "settings.yaml"
    shutil.copyfile(ASSETS.parents[1] / "jobs" / "configs" / "demo.yaml", path)

    def read() -> None:
        try:
            read_yaml(path)
        except ValueError as error:
            raise SettingsError(str(error)) from None

    return Kind([path], read)


def feature_sets(folder: Path, make_features: Any) -> Kind:
    [made] = make_features(manifest("tqa.val"), folder=folder)
    files = [made / name for name in ("set.json", "index.arrow", "shards.json")]

    def read() -> None:
        features = Features([made])
        for number in range(min(20, len(features))):
            features.row(number)

    return Kind([*files, *sorted((made / "shards").glob("*.arrow"))], read)


def shard_reports(folder: Path, make_features: Any) -> Kind:
    """A damaged report makes its shard anew."""
    rows = manifest("tqa.val")
    [made] = make_features(rows, folder=folder)
    extractor = Extractor(TINY)

    def read() -> None:
        featurize((rows,), extractor, folder, rows_per_shard=8, use_ray=False)
        assert len(Features([made])) > 0

    return Kind([*sorted((made / "shards").glob("*.json")), made / "set.json", made / "index.arrow"], read)


def predictions(folder: Path, make_features: Any) -> Kind:
    folders = make_features(manifest("tqa.val"), folder=folder / "features")
    config = InferenceConfig(TINY, "", SamplingParams(2), batch_size=2)
    answer_rows(config, folders, [0, 1, 2], folder, use_ray=False)
    (folder / "predictions" / "part-00000.failed.json").write_text(json.dumps([[3, "not_answered", "a reason"]]))

    def read() -> None:
        read_predictions(folder)
        read_failed(folder)

    return Kind(sorted((folder / "predictions").iterdir()), read)


def foreign_predictions(folder: Path, make_features: Any) -> Kind:
    path = folder / "answers.jsonl"
    rows = [
        {"id": str(n), "task": "asr", "reference": "열 도", "prediction": "열 두", "speaker": "a"} for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read() -> None:
        _, bad = read_folder_or_jsonl(str(path), "--score_only")
        for _, _, error in bad:
            raise error

    return Kind([path], read)


def checkpoints(folder: Path, make_features: Any) -> Kind:
    """Without checksums, as earlier versions wrote them."""
    family, base = model()
    trained = add_lora(base, family, ["llm"], model_id=TINY, r=2, alpha=2, dropout=0.0)
    save_adapter(trained, folder)
    torch.save({"weight": {"exp_avg": torch.zeros(2, 2)}}, folder / "optimizer.pt")
    write_progress(folder, Progress(3, 1, "data"))
    write_inputs(folder, {"model_id": "a"})

    def read() -> None:
        read_progress(folder)
        read_optimizer_state(folder)
        load_adapter_weights(trained, folder)
        refuse_changed_inputs(folder, {"model_id": "a"}, "a run")

    return Kind(sorted(folder.iterdir()), read)


def adapters(folder: Path, make_features: Any) -> Kind:
    family, base = model()
    save_adapter(add_lora(copy.deepcopy(base), family, ["llm"], model_id=TINY, r=2, alpha=2, dropout=0.0), folder)
    return Kind(sorted(folder.iterdir()), lambda: load_adapter(copy.deepcopy(base), folder))


def front_ends(source: str) -> Callable[[Path, Any], Kind]:
    def make(folder: Path, make_features: Any) -> Kind:
        for path in Path(source).iterdir():
            if path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        return Kind(sorted(folder.iterdir()), lambda: use_front_end(folder))

    return make


def bases(folder: Path, make_features: Any) -> Kind:
    for path in Path(TINY).iterdir():
        shutil.copyfile(path, folder / path.name)

    def read() -> None:
        get_family(str(folder)).load_model(str(folder), dtype=torch.float32, device=CPU)

    return Kind([folder / name for name in ("config.json", "generation_config.json", "model.safetensors")], read)


def tables(folder: Path, make_features: Any) -> Kind:
    rows = [("파일명", "전사", "화자", "시작"), *((f"{n}.wav", f"환자 {n}번, 열", "가", "0:01") for n in range(4))]
    for number in range(4):
        clip(folder / "clips" / f"{number}.wav")
    (folder / "a.csv").write_bytes("\n".join(";".join(row) for row in rows).encode("cp949"))
    (folder / "b.tsv").write_bytes("\n".join("\t".join(row) for row in rows).encode("utf-16"))
    book = openpyxl.Workbook()
    for row in rows:
        book.worksheets[0].append(row)
    book.save(folder / "c.xlsx")
    paths = [folder / name for name in ("a.csv", "b.tsv", "c.xlsx")]

    def read() -> None:
        errors = []
        for path in paths:
            try:
                list(CorpusTable(path).rows())
            except RunError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return Kind(paths, read)


def archives(folder: Path, make_features: Any) -> Kind:
    """A tarred NeMo set, a Shar folder, and what save_to_disk writes. Damaged lines and clips are faults."""
    sound = Path(clip(folder / "utt0.wav"))
    with tarfile.open(folder / "audio_0.tar", "w") as archive:
        archive.add(sound, "utt0.wav")
    lines(folder / "nemo.json", {"audio_filepath": "utt0.wav", "text": "글", "shard_id": 0})
    recording = {"id": "r", "sources": [{"type": "shar", "channels": [0], "source": ""}], "duration": 0.1}
    supervision = {"id": "s", "start": 0.0, "duration": 0.1, "text": "글"}
    cut = {"id": "utt0", "type": "MonoCut", "start": 0, "duration": 0.1, "channel": 0, "recording": recording}
    lines(folder / "cuts.0.jsonl", {**cut, "supervisions": [supervision]})
    shutil.copyfile(folder / "audio_0.tar", folder / "recording.0.tar")
    audio = pa.array([{"bytes": sound.read_bytes(), "path": "a.wav"}], AUDIO)
    table = pa.table({"audio": audio, "text": ["글"]})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))

    def read() -> None:
        items = [*IMPORTERS["nemo"](folder / "nemo.json"), *IMPORTERS["lhotse"](folder)]
        items += IMPORTERS["huggingface"](folder)
        for item in items:
            if isinstance(item, ImportFault):
                raise BadRow(item.reason, item.message)
            if "audio_bytes_from" in item.values:  # else the damage left out the row's archive
                embedded_audio(item.values["audio_bytes_from"])

    names = ("nemo.json", "audio_0.tar", "cuts.0.jsonl", "recording.0.tar", "data.arrow", "state.json")
    return Kind([folder / name for name in names], read)


KINDS: dict[str, Callable[[Path, Any], Kind]] = {
    "tables": tables,
    "archives": archives,
    "manifests": manifests,
    "yaml": yaml_files,
    "feature sets": feature_sets,
    "shard reports": shard_reports,
    "predictions": predictions,
    "foreign predictions": foreign_predictions,
    "checkpoints": checkpoints,
    "adapters": adapters,
    "Voxtral tokenizers": front_ends(TINY),
    "Whisper tokenizers": front_ends(WHISPER),
    "bases": bases,
}


def damage(kind: Kind, seeds: range) -> Iterator[tuple[int, Path, float, BaseException | None]]:
    """Damage one file after another; yields (seed, file, seconds, error) and restores the files."""
    intact = {path: path.read_bytes() for path in kind.files}
    folders = {path.parent for path in kind.files}
    around = {path: path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}
    for seed in seeds:
        path = kind.files[seed % len(kind.files)]
        path.write_bytes(mutate(intact[path], seed))
        seconds, error = stopwatch(), None
        try:
            kind.read()
        except Exception as raised:
            error = raised
        yield seed, path, seconds(), error
        for name, data in around.items():
            name.write_bytes(data)


def check(name: str, folder: Path, make_features: Any, seeds: range) -> None:
    kind = KINDS[name](folder, make_features)
    kind.read()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    faults, num_refused = [], 0
    for seed, path, seconds, error in damage(kind, seeds):
        num_refused += error is not None
        if error is not None and not isinstance(error, CLEAR):
            faults.append(f"{path.name}, seed {seed}: {type(error).__name__}: {str(error)[:200]}")
        elif error is not None and "\n" in str(error):
            faults.append(f"{path.name}, seed {seed}: several lines: {error}")
        if seconds > SECONDS:
            faults.append(f"{path.name}, seed {seed}: {seconds:.0f} s")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - memory
    assert not faults, f"{len(faults)} of {len(seeds)}:\n" + "\n".join(faults[:30])
    assert num_refused, "no mutation had an effect"
    assert grown < GIB
    kind.read()


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name: str, tmp_path: Path, make_features: Any) -> None:
    check(name, tmp_path, make_features, range(200))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(name: str, tmp_path: Path, make_features: Any) -> None:
    check(name, tmp_path, make_features, range(1000, 3000))
