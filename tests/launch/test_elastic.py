"""Jobs on Ray: features from several processes, constant memory, training, signals. One Ray for the whole file."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, write_rows
from prometheus_client.parser import text_string_to_metric_families

from voxray.commands.train import run_training
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError, Stopped
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.launch import elastic
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData
from voxray.training.records import read_metrics

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[2]


def text_rows(count: int) -> list[dict]:
    return [{"instruction": f"number {n}", "input": "", "output": str(n % 10)} for n in range(count)]


@pytest.fixture(scope="module")
def damaged(small, tmp_path_factory) -> str:
    """A manifest of four good rows and three that cannot be used."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = [json.loads(line) for line in Path(small["asr.train"]).read_text(encoding="utf-8").splitlines()][:4]
    (folder / "noise.wav").write_text("not audio")
    rows += [{"audio_path": "noise.wav", "transcript": "x"}, {"audio_path": "absent.wav", "transcript": "x"}, {"a": 1}]
    return write_rows(folder / "m.jsonl", rows)


@pytest.mark.slow
def test_features_from_ray_equal_those_of_one_process(local_ray, small, damaged, tmp_path):
    """Two or more processes take part. Features and ledgers depend neither on them nor on their order."""
    manifests = [small["asr.train"], small["tqa.train"], damaged]
    for attempt in range(3):  # on busy cores one process may finish before the other has started
        by_ray = featurize(manifests, Extractor(TINY), tmp_path / f"a{attempt}", rows_per_shard=3, num_actors=2)
        if by_ray.num_processes >= 2:
            break
    reference = featurize(manifests, Extractor(TINY), tmp_path / "b", rows_per_shard=3, use_ray=False)
    assert by_ray.num_processes >= 2 and (by_ray.num_made, by_ray.num_rows, by_ray.num_bad) == (31, 28, 3)
    for folder, expected in zip(by_ray.folders, reference.folders, strict=True):
        for path in [*sorted(expected.rglob("*.arrow")), expected / "quarantine.jsonl"]:
            assert (folder / path.relative_to(expected)).read_bytes() == path.read_bytes()


def test_only_missing_shards_are_computed(small, tmp_path):
    first = featurize([small["asr.train"]], Extractor(TINY), tmp_path, rows_per_shard=3, use_ray=False)
    shards = first.folders[0] / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.arrow")}
    (shards / "00002.arrow").unlink()
    second = featurize([small["asr.train"]], Extractor(TINY), tmp_path, rows_per_shard=3, use_ray=False)
    after = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.arrow")}
    assert second.num_made == 3 and second.num_rows == 12
    assert {name for name in before if before[name] != after[name]} == {"00002.arrow"}


def test_bad_rows_are_listed_and_others_are_used(damaged, tmp_path):
    report = featurize([damaged], Extractor(TINY), tmp_path / "f", rows_per_shard=2, use_ray=False)
    assert (report.num_rows, report.num_bad) == (4, 3)
    ledger = [json.loads(line) for line in (report.folders[0] / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in ledger] == [
        (5, "audio_unreadable"),
        (6, "audio_missing"),
        (7, "unknown_task"),
    ]
    with pytest.raises(RunError, match=r"m\.jsonl:\d: .*\(--strict\)"):
        featurize([damaged], Extractor(TINY), tmp_path / "g", rows_per_shard=2, strict=True, use_ray=False)


def settings(small, output_dir: Path, **changes) -> MultitaskSettings:
    values = {f"{part}_jsonl": [small[f"{task}.{part}"] for task in ("asr", "sqa", "tqa")] for part in ("train", "val")}
    values |= {"model_id": TINY, "num_workers": 2, "max_steps": 3, "eval_max_new_tokens": 4}
    values |= {"output_dir": str(output_dir), "rows_per_shard": 8}
    return MultitaskSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def made(small, tmp_path_factory) -> str:
    """Folder of the features of all rows, so that runs need no process to make them."""
    folder = tmp_path_factory.mktemp("made")
    featurize(list(small.values()), Extractor(TINY), folder, rows_per_shard=8, use_ray=False)
    return str(folder)


@pytest.mark.slow
def test_the_records_of_a_run_are_complete(local_ray, small, made, tmp_path, monkeypatch):
    """Contract 12, on a run of a Ray Train process. No file has a secret from the environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    result = run_training(settings(small, tmp_path, features_dir=made, num_workers=1))
    assert result["finished"] and result["steps"] == 3 and "asr/cer_nospace" in result
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"settings.json", "metrics.jsonl", "adapter", "checkpoints", "tensorboard", "quarantine.jsonl"}
    assert json.loads((tmp_path / "settings.json").read_text())["max_steps"] == 3
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["versions"]["ray"] and provenance["command"]
    assert len(provenance["git"]["commit"]) == 40
    assert provenance["data"] and all(len(entry["content"]) == 64 for entry in provenance["data"])
    parameters = json.loads((tmp_path / "parameters.json").read_text())
    assert parameters["encoder"]["trainable"] == 0 < parameters["llm"]["trainable"]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 3 and kinds.count("validation") == 1
    assert "step 3/3" in (tmp_path / "train.log").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["best"]["asr/cer_nospace"]["step"] == 3
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    losses = gauges(tmp_path.name, "ray_voxray_loss")
    assert losses[""] == pytest.approx(last["loss"])
    assert {f"loss/{task}": losses[task] for task in losses if f"loss/{task}" in last}.items() <= last.items()
    assert gauges(tmp_path.name, "ray_voxray_data_wait")[""] == pytest.approx(last["data_wait"])
    assert gauges(tmp_path.name, "ray_voxray_validation_cer_nospace") == {"asr": result["asr/cer_nospace"]}
    [train_run] = [run for run in dashboard_runs() if run.name.startswith(f"{tmp_path.name}-")]
    assert train_run.status == "FINISHED" and "hf_of_somebody" not in repr(train_run)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"hf_of_somebody" in path.read_bytes()]


def dashboard_runs() -> list[Any]:
    """Runs on the Train page of the dashboard."""
    import ray
    from ray.train.v2._internal.state.state_actor import get_state_actor

    return list(ray.get(get_state_actor().get_train_runs.remote()).values())


def gauges(run: str, name: str) -> dict[str, float]:
    """{task: value} of a gauge at the node's Prometheus endpoint, which may lag by ten seconds."""
    import ray

    [node] = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(200):
        with urllib.request.urlopen(address, timeout=5) as page:
            families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        if of_run := [sample for sample in samples if sample.labels.get("run") == run]:
            return {sample.labels.get("task", ""): sample.value for sample in of_run}
        time.sleep(0.2)
    raise AssertionError(f"no gauge {name} of {run}")


@pytest.mark.slow
def test_a_workers_run_error_is_one_line_and_not_retried(local_ray, small, made, tmp_path, capsys):
    with pytest.raises(RunError, match="no row is within --max_len 2 tokens"):
        run_training(settings(small, tmp_path, max_len=2, features_dir=made, num_workers=1))
    assert "starting again" not in capsys.readouterr().out


@pytest.mark.chaos
def test_placement_groups_of_failed_starts_are_removed(local_ray, small, tmp_path, monkeypatch, capsys):
    """Ray Train keeps them, so a second attempt would wait for the resources of the first."""
    import ray

    from voxray.launch.process_group import ProcessGroup

    monkeypatch.setattr(ProcessGroup, "__init__", partialmethod(ProcessGroup.__init__, backend="nccl"))
    with pytest.raises(RunError, match=r"failed 4 times at step 0, last with: .*NCCL"):
        run_training(settings(small, tmp_path, num_workers=3))  # of four CPUs
    assert capsys.readouterr().out.count("starting again from step 0") == 3
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}


def test_a_trial_without_its_placement_group_stops(local_ray, small, tmp_path, monkeypatch):
    """Ray Tune removes the group to stop a trial. The controller may die first, which looks like a crash."""
    import ray

    own, attempts = ray.util.placement_group([{"CPU": 0.01}]), []
    assert own.wait(30)
    known = set(ray.util.placement_group_table())

    def attempt(*args: Any) -> dict[str, Any]:
        attempts.append(set(ray.util.placement_group_table()) - known)
        if len(attempts) == 2:
            ray.util.remove_placement_group(own)
        return {"error": RuntimeError("The actor died unexpectedly before finishing this task.")}

    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: own)
    monkeypatch.setattr(elastic, "_attempt", attempt)
    with pytest.raises(Stopped):
        elastic.train_on_workers(RunContext.create(settings(small, tmp_path)), TrainingData((), ()), (1, 1))
    assert [len(groups) for groups in attempts] == [1, 2], "the first was a crash, which is retried"
    assert set(ray.util.placement_group_table()) - known == attempts[1]


ELASTIC = """
import os, sys
from voxray.cluster.session import RAY_SETTINGS
from voxray.commands.train import run_training
from voxray.config.train import MultitaskSettings
os.environ.update(RAY_SETTINGS)
import ray
if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, log_to_driver=False)
    run_training(MultitaskSettings.model_validate_json(sys.argv[1]))
"""


@pytest.mark.slow
def test_elastic_workers_train_on_the_same_batches(small, tmp_path):
    """A cluster with two CPUs for one to three workers. Steps are planned for three, so one process gives the same."""
    common = {"val_jsonl": (), "lora_dropout": 0.0, "per_device_bsz": 2, "max_steps": 4}
    elastic = settings(small, tmp_path / "elastic", **common, num_workers="1:3")
    command = [sys.executable, "-c", ELASTIC, elastic.model_dump_json()]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    alone = settings(small, tmp_path / "alone", **common, num_workers=0, grad_accum=3)
    run_training(alone)
    records, expected = (read_metrics(tmp_path / name, "train") for name in ("elastic", "alone"))
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in expected], abs=1e-5)
    progress = json.loads((tmp_path / "elastic" / "checkpoints" / "step-000004" / "progress.json").read_text())
    assert progress["packs_per_step"] == 3


@pytest.mark.chaos
def test_the_first_signal_saves_and_the_same_command_resumes(small, tmp_path):
    script = str(REPOSITORY / "jobs" / "train_multitask.py")
    command = [sys.executable, script, "--model_id", TINY, "--num_workers", "0"]
    command += ["--train_jsonl", small["asr.train"], "--output_dir", str(tmp_path / "run"), "--save_steps", "100000"]
    process = subprocess.Popen([*command, "--max_steps", "5000"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again to resume" in output, output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name[5:])
    resumed = subprocess.run([*command, "--max_steps", str(step + 2)], cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0 and f"resuming from step {step} of {step + 2}" in resumed.stdout, resumed.stderr


PROBE = """
import resource, sys
from pathlib import Path
from voxray.cluster.session import ray_session
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
with ray_session(Path(sys.argv[1]).parent / "ray.log", 3):
    report = featurize([sys.argv[1]], Extractor(sys.argv[2]), Path(sys.argv[1]).parent / "f", rows_per_shard=256)
print(report.num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def driver_mib(rows: int, folder: Path) -> int:
    """Peak memory of a driver that featurizes this many rows of text, in MiB."""
    manifest = write_rows(folder / "m.jsonl", text_rows(rows))
    command = [sys.executable, "-c", PROBE, manifest, TINY]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ""}, check=True)
    num_rows, mib = map(int, result.stdout.split()[-2:])
    assert num_rows == rows
    return mib


@pytest.mark.slow
def test_the_drivers_memory_is_constant_up_to_100_000_rows(tmp_path):
    few, many = driver_mib(1_000, tmp_path / "few"), driver_mib(100_000, tmp_path / "many")
    print(f"driver: {few} MiB with 1,000 rows, {many} MiB with 100,000")
    assert many < few * 1.1 + 20
