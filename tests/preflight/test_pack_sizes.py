"""Sizes that keep the global batch, bisection over them, and checks of the machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxray.config.train import MultitaskSettings, TrainSettings
from voxray.preflight.findings import Findings
from voxray.preflight.machine import check_cpus, check_flags_need, check_libraries, check_shared_memory
from voxray.preflight.pack_sizes import current_size, largest_fitting, sizes
from voxray.preflight.shapes import pack_shape


def settings(**values: object) -> TrainSettings:
    return MultitaskSettings(train_jsonl="a.jsonl", output_dir="o", **values)  # type: ignore[arg-type]


@given(st.integers(1, 64), st.integers(1, 64))
def test_rows_of_a_step_stay(rows: int, accum: int) -> None:
    candidates = sizes(settings(per_device_bsz=rows, grad_accum=accum), longest=100)
    assert {size.amount * size.grad_accum for size in candidates} == {rows * accum}
    assert current_size(settings(per_device_bsz=rows, grad_accum=accum)) in candidates
    amounts = [size.amount for size in candidates]
    assert amounts == sorted(set(amounts)) and amounts[0] == 1


def test_tokens_of_a_step_stay_and_a_pack_holds_the_longest_row() -> None:
    candidates = sizes(settings(batching="packed", pack_tokens=1024, grad_accum=4), longest=300)
    assert [(size.amount, size.grad_accum) for size in candidates] == [(512, 8), (1024, 4), (2048, 2), (4096, 1)]


def test_sizes_by_task_are_left_as_they_are() -> None:
    current = settings(batching="length", per_task_bsz={"asr": 4}, per_device_bsz=8)
    assert sizes(current, longest=10) == [current_size(current)]


@given(st.integers(0, 40), st.integers(-1, 40))
def test_bisection_finds_the_last_that_fits(count: int, last: int) -> None:
    candidates = sizes(settings(per_device_bsz=2**8), longest=1)[:count]
    last, tried = min(last, len(candidates) - 1), list[int]()

    def fits(size: object) -> bool:
        tried.append(candidates.index(size))  # type: ignore[arg-type]
        return tried[-1] <= last

    assert largest_fitting(candidates, fits) == last
    assert len(tried) == len(set(tried)) <= max(1, count.bit_length())


def test_shapes_of_padded_and_packed_rows() -> None:
    prompts, targets, windows = np.array([10, 20, 5]), np.array([5, 5, 5]), np.array([1, 2, 0])
    padded = pack_shape([0, 1], prompts, targets, windows, packed=False)
    assert (padded.num_tokens, padded.longest, padded.num_windows, padded.num_answer_tokens) == (50, 25, 3, 10)
    assert padded.masked and not pack_shape([1], prompts, targets, windows, packed=False).masked
    packed = pack_shape([0, 1, 2], prompts, targets, windows, packed=True)
    assert (packed.num_tokens, packed.num_rows) == (50, 3) and not packed.masked


@pytest.mark.parametrize(
    ("workers", "resources", "level"),
    [
        (2, {"CPU": 3, "GPU": 0}, "ok"),
        (2, {"CPU": 2, "GPU": 0}, "fix"),
        (2, {"CPU": 8, "GPU": 1}, "fix"),
        (2, {"CPU": 8, "GPU": 2}, "ok"),
        (0, {}, "ok"),
        ("2:4", {"CPU": 3, "GPU": 0}, "ok"),
        (1, None, "ok"),
        (4096, None, "warning"),
    ],
)
def test_ray_needs_a_cpu_to_spare(workers: object, resources: dict[str, int] | None, level: str) -> None:
    findings = Findings()
    check_cpus(settings(num_workers=workers), resources, findings)
    assert level in {finding.level for finding in findings.all}
    assert all("--num_workers" in finding.message for finding in findings.to_fix)


def test_libraries_that_are_not_as_known_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from voxray.preflight import machine

    real = machine.version

    def version(name: str) -> str:
        if name == "soxr":
            raise machine.PackageNotFoundError(name)
        return "1.0" if name == "peft" else real(name)

    monkeypatch.setattr(machine, "version", version)
    findings = Findings()
    check_libraries(findings)
    assert [finding.message for finding in findings.to_fix] == ["soxr is not installed; soxr<2,>=1.1 is required"]
    assert any(f.level == "warning" and f.message.startswith("peft 1.0: tested with") for f in findings.all)


def test_a_flag_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from voxray.preflight import machine

    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    findings = Findings()
    check_flags_need(settings(quantize="4bit", strategy="deepspeed", report_to="wandb"), findings)
    assert [finding.message.partition(":")[0] for finding in findings.to_fix] == [
        "--quantize 4bit",
        "--strategy deepspeed",
        "--report_to wandb",
    ]


def test_shared_memory_that_is_not_there(tmp_path) -> None:
    findings = Findings()
    check_shared_memory(findings, tmp_path / "none")
    assert findings.all[0].level == "warning" and str(tmp_path) in findings.all[0].message
