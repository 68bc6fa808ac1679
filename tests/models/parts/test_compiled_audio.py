"""jobs/compile.py: programs compute what the model computes, and are refused for anything else.

Compiling is slow, so the quick tests share one program: the tiny Whisper's encoder for one window.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, WHISPER, manifest, read_rows
from helpers.running import load_job, parse_only

from voxray.audio.decode import decode
from voxray.commands import compile as aot
from voxray.commands import evaluate as job
from voxray.commands.efficiency import run_efficiency
from voxray.config.evaluate import EvaluateSettings
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation.predictions import read_predictions
from voxray.models.adapters.lora import add_lora, load_adapter, save_adapter
from voxray.models.parts.compiled_audio import CompiledAudio, split_windows, use_compiled, weights_hash
from voxray.models.registry import get_family

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
CPU = torch.device("cpu")
FAMILY = get_family(WHISPER)
MEASUREMENTS = {"compile_sec": 1.0, "difference": 0.0, "eager_sec": 1.0, "compiled_sec": 1.0}


def compile_job(*flags: str, **more: str) -> dict[str, Any]:
    argv = [word for key, value in {"model_id": WHISPER, **more}.items() for word in (f"--{key}", value)]
    return aot.run_compile(parse_only("compile", [*argv, *flags]))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Whisper's encoder, compiled for one window."""
    folder = tmp_path_factory.mktemp("compiled") / "whisper"
    compile_job(output_dir=str(folder))
    return folder


def make_model(model_id: str = WHISPER, dtype: torch.dtype = torch.float32) -> Any:
    return get_family(model_id).load_model(model_id, dtype=dtype, device=CPU)


def use(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    use_compiled(model, FAMILY, folder, dtype=dtype, device=CPU)


def speech(num_windows: int) -> torch.Tensor:
    """Windows of real speech as transformers' own feature extractor makes them, mel_WFT."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(WHISPER)
    clips = [decode(row["audio_path"], 16_000)[: 4 * 16_000] for row in read_rows(manifest("base.val"))[:num_windows]]
    return extractor(clips, sampling_rate=16_000, return_tensors="pt", padding="max_length").input_features


@torch.inference_mode()
def test_a_program_computes_what_the_encoder_computes(folder: Path) -> None:
    """Against transformers' model, on several windows, and on a recording transcribed window by window."""
    from transformers import WhisperForConditionalGeneration

    reference = WhisperForConditionalGeneration.from_pretrained(WHISPER, dtype=torch.float32).eval()
    model, mel_WFT = make_model(), speech(3)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    use(model, folder)
    expected = reference.model.encoder(mel_WFT).last_hidden_state
    states = model.model.encoder(mel_WFT, return_dict=True).last_hidden_state
    assert states.shape == expected.shape == (3, 200, 128)
    assert float((states - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    freed = num_weights - sum(parameter.numel() for parameter in model.parameters())
    assert freed > 300_000, "the layers are not held twice"
    whole_1FT = torch.cat(list(mel_WFT), dim=-1)[None]
    options = {"return_timestamps": True, "language": "ko", "max_new_tokens": 20}
    answers = [each.generate(input_features=whole_1FT, **options).tolist() for each in (model, reference)]
    assert answers[0] == answers[1]

    report = json.loads((folder / "compiled.json").read_text())
    assert (report["family"], report["dtype"], report["backend"]) == ("whisper", "float32", "aotinductor")
    assert report["torch"] == torch.__version__ and report["mel_shape"] == [80, 400] and report["adapter"] == ""
    (entry,) = report["windows"].values()
    assert list(report["windows"]) == ["1"] and (folder / entry["file"]).is_file()
    assert 0 < entry["difference"] < 1e-5 and entry["difference"] < entry["difference_absolute"]
    assert entry["compile_sec"] > 1 and entry["eager_sec"] > 0 and entry["compiled_sec"] > 0


@pytest.fixture
def window_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of windows in every call of a compiled audio path."""
    calls: list[int] = []
    real = CompiledAudio.__call__

    def call(self: CompiledAudio, mel_WFT: torch.Tensor) -> torch.Tensor:
        calls.append(len(mel_WFT))
        return real(self, mel_WFT)

    monkeypatch.setattr(CompiledAudio, "__call__", call)
    return calls


def test_evaluate_and_efficiency_use_it(
    folder: Path, window_counts: list[int], small: dict[str, str], tmp_path: Path, evaluation_here: None
) -> None:
    answers = []
    for name, compiled in (("plain", ""), ("compiled", str(folder))):
        values = {"model_id": WHISPER, "val_jsonl": small["asr.val"], "output_dir": str(tmp_path / name)}
        values |= {"features_dir": str(tmp_path / "features"), "gen_max_new_tokens": 24, "compiled": compiled}
        job.run_evaluation(EvaluateSettings.model_validate(values))
        rows = read_predictions(tmp_path / name)
        answers.append([(row["id"], row["prediction"]) for row in rows])
        assert (sum(window_counts) == 4) == bool(compiled)
    assert answers[0] == answers[1] and any(text for _, text in answers[0])
    window_counts.clear()
    flags = (
        f"--model_id {WHISPER} --compiled {folder} --batch_sizes 1 --clip_sec 3 --new_tokens 16 --warmup 1 --repeats 2"
    )
    report = run_efficiency(parse_only("efficiency", [*flags.split(), "--output_dir", str(tmp_path / "efficiency")]))
    assert report["compiled"] == str(folder) and window_counts == [1, 1, 1]
    with pytest.raises(RunError, match=r"--compiled .*: no compiled.json that can be read"):
        job.run_evaluation(EvaluateSettings.model_validate({**values, "compiled": str(tmp_path)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.9.1"}, r"made for torch 2\.9\.1, and this is 2\."),
        ({"device": "NVIDIA H100"}, "made for device NVIDIA H100, and this is "),
        ({"family": "voxtral"}, "made for family voxtral, and this is whisper"),
        ({"weights": "0", "adapter": "runs/a"}, "made of other weights, those of .* with runs/a; compile it again"),
        ({"format": 0}, "written by another version of voxray"),
        ({"format": None}, "written by another version"),
    ],
)
def test_programs_for_something_else_are_refused(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    report = json.loads((copy / "compiled.json").read_text())
    (copy / "compiled.json").write_text(json.dumps({**report, **change}))
    with pytest.raises(RunError, match=rf"--compiled {copy}: .*{message}") as error:
        use(make_model(), copy)
    assert "\n" not in str(error.value)


def test_damaged_files_and_other_precision_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="made for dtype float32, and this is bfloat16"):
        use(make_model(dtype=torch.bfloat16), folder, torch.bfloat16)
    copy = shutil.copytree(folder, tmp_path / "copy")
    with open(copy / "audio_w1.pt2", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(RunError, match=r"audio_w1\.pt2 is missing or damaged"):
        use(make_model(), copy)
    (copy / "audio_w1.pt2").unlink()
    with pytest.raises(RunError, match=r"audio_w1\.pt2 is missing or damaged"):
        use(make_model(), copy)
    (copy / "compiled.json").write_text("{")
    with pytest.raises(RunError, match=r"no compiled\.json that can be read"):
        use(make_model(), copy)


def adapter(folder: Path, *roles: str, alpha: float = 8) -> Path:
    """A tiny Whisper's adapter whose B weights are not zero."""
    torch.manual_seed(0)
    model = add_lora(make_model(), FAMILY, roles, model_id=WHISPER, r=2, alpha=alpha, dropout=0.1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, folder)
    return folder


def test_only_adapters_in_the_audio_path_matter(folder: Path, tmp_path: Path) -> None:
    """One in the decoder fits a program of the base. One in the encoder does not, and its scale matters too."""
    use(load_adapter(make_model(), adapter(tmp_path / "decoder", "decoder"))[0], folder)
    tuned, _ = load_adapter(make_model(), adapter(tmp_path / "encoder", "encoder"))
    with pytest.raises(RunError, match="made of other weights"):
        use(tuned, folder)
    rescaled, _ = load_adapter(make_model(), adapter(tmp_path / "rescaled", "encoder", alpha=16))
    states = [FAMILY.audio_path(model).state_dict() for model in (tuned, rescaled)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert weights_hash(FAMILY.audio_path(tuned)) != weights_hash(FAMILY.audio_path(rescaled))


@pytest.mark.parametrize(
    ("num_windows", "sizes", "parts"),
    [
        (1, [1], [(0, 1, 1)]),
        (3, [1], [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        (9, [1, 4], [(0, 4, 4), (4, 4, 4), (8, 1, 1)]),
        (3, [4], [(0, 3, 4)]),
        (6, [4], [(0, 4, 4), (4, 2, 4)]),
        (3, [2, 8], [(0, 2, 2), (2, 1, 2)]),
    ],
)
def test_any_number_of_windows_is_split_into_parts(
    num_windows: int, sizes: list[int], parts: list[tuple[int, int, int]]
) -> None:
    assert list(split_windows(num_windows, sizes)) == parts
    # Every window gives two rows, like Voxtral's positions.
    sizes_called = []

    def program(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(mel_WFT: torch.Tensor) -> torch.Tensor:
            sizes_called.append(len(mel_WFT))
            assert len(mel_WFT) == size and mel_WFT.is_contiguous()
            return mel_WFT.reshape(2 * size, -1)

        return run

    mel_WFT = torch.randn(num_windows, 4, 6)
    states = CompiledAudio({size: program(size) for size in sizes}, (4, 6), torch.float32)(mel_WFT)
    assert torch.equal(states, mel_WFT.reshape(2 * num_windows, -1))
    assert sizes_called == [size for *_, size in parts]


def test_lengths_are_split_like_windows() -> None:
    def program(mel_WFT: torch.Tensor, lengths_W: torch.Tensor) -> torch.Tensor:
        assert len(mel_WFT) == len(lengths_W) == 2
        return mel_WFT[..., 0] * lengths_W[:, None]

    mel_WFT, lengths_W = torch.randn(5, 4, 6), torch.tensor([3, 0, 7, 1, 5])
    states = CompiledAudio({2: program}, (4, 6), torch.float32)(mel_WFT, lengths_W)
    assert torch.equal(states, mel_WFT[..., 0] * lengths_W[:, None])


def test_programs_with_lengths_are_also_checked_on_short_clips(salmonn: str) -> None:
    whole, short = aot.noise_clips(get_family(salmonn).front_end(salmonn), 3, 0, torch.bfloat16, CPU)
    assert whole[0].shape == short[0].shape == (3, 80 + 128, 400) and whole[0].dtype == torch.bfloat16
    assert whole[1].tolist() == [64_000] * 3 and short[1].tolist() == [6_400] * 3
    (only,) = aot.noise_clips(get_family(WHISPER).front_end(WHISPER), 1, 0, torch.float32, CPU)
    assert [tensor.shape for tensor in only] == [(1, 80, 400)]


def test_flags_reach_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[torch.nn.Module, torch.Tensor, str]] = []

    def compiled(path: torch.nn.Module, clips: Any, file: Path, settings: Any) -> dict[str, Any]:
        ((mel_WFT,),) = clips
        calls.append((path, mel_WFT, file.name))
        return MEASUREMENTS

    monkeypatch.setattr(aot, "compile_and_check", compiled)
    report = compile_job("--bf16", "--tf32", windows="3,1", output_dir=str(tmp_path / "a"))
    assert [(len(mel), mel.dtype, file) for _, mel, file in calls] == [
        (1, torch.bfloat16, "audio_w1.pt2"),
        (3, torch.bfloat16, "audio_w3.pt2"),
    ]
    assert report["dtype"] == "bfloat16" and "--tf32 has no effect" in capsys.readouterr().out
    first = calls[1][1]
    compile_job("--bf16", windows="3", seed="1", output_dir="own", storage_path=str(tmp_path))
    assert not torch.equal(calls[-1][1], first) and (tmp_path / "own" / "compiled.json").is_file()
    tuned = adapter(tmp_path / "tuned", "encoder")
    report = compile_job("--fp16", lora_dir=str(tuned), output_dir=str(tmp_path / "c"))
    assert calls[-1][1].dtype == torch.float16 and report["adapter"] == str(tuned) and report["adapter_sha256"]
    assert any("lora_A" in name for name, _ in calls[-1][0].named_parameters()), (
        "the adapter is compiled with the model"
    )


def test_other_folders_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_and_check", lambda *args: MEASUREMENTS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(RunError, match="is not empty; it holds something else"):
            compile_job(*flags, output_dir=str(tmp_path / "other"))
    compile_job(output_dir=str(tmp_path / "out"))
    with pytest.raises(RunError, match="is not empty; --overwrite replaces an earlier one"):
        compile_job(output_dir=str(tmp_path / "out"))
    assert compile_job("--overwrite", output_dir=str(tmp_path / "out"), windows="2")["windows"].keys() == {"2"}


def test_compile_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="--quantize 8bit: holds the encoder of whisper in fewer bits"):
        compile_job(output_dir=str(tmp_path / "a"), quantize="8bit")

    def no_compiler(*args: Any, **options: Any) -> None:
        raise OSError("no compiler\nhere")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    with pytest.raises(RunError, match="--backend aotinductor: cannot compile this on this machine: no compiler here"):
        compile_job(output_dir=str(tmp_path / "a"))

    def wrong(file: Path, device: torch.device) -> Any:
        return lambda mel_WFT: torch.zeros(1, 200, 128)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *args, **options: None)
    monkeypatch.setattr(aot, "load_program", wrong)
    with pytest.raises(RunError, match=r"outputs differ from the model's by 1\.0e"):
        compile_job(output_dir=str(tmp_path / "a"))
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_tensorrt_is_an_extra_that_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its calls are only recorded here, because there is neither GPU nor TensorRT."""
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    argv = ["--model_id", WHISPER, "--backend", "tensorrt", "--output_dir", str(tmp_path / "a")]
    with pytest.raises(SystemExit) as end:
        load_job("compile").main(argv)
    assert end.value.code == 1 and not (tmp_path / "a").exists()
    expected = (
        "error: --backend tensorrt: needs torch_tensorrt, which is not installed (pip install 'voxray[tensorrt]')\n"
    )
    assert capsys.readouterr().err == expected

    fake: Any = ModuleType("torch_tensorrt")
    calls: list[dict[str, Any]] = []
    fake.dynamo = ModuleType("dynamo")
    fake.dynamo.compile = lambda exported, **options: calls.append(options) or exported
    fake.save = lambda engine, path, **options: calls.append({"path": path, **options})
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    with pytest.raises(RunError, match="--backend tensorrt: needs a GPU, and there is none"):
        compile_job("--backend", "tensorrt", output_dir=str(tmp_path / "a"))
    monkeypatch.setattr(aot, "_check_backend", lambda settings: None)
    monkeypatch.setattr(aot, "load_program", lambda file, device: FAMILY.audio_path(make_model()))
    monkeypatch.setattr(aot, "checksum", lambda file: "")
    compile_job("--backend", "tensorrt", optimization_level="5", output_dir=str(tmp_path / "a"))
    assert calls[0]["optimization_level"] == 5 and calls[1]["output_format"] == "aot_inductor"
    monkeypatch.undo()
    monkeypatch.setattr(aot, "compile_and_check", lambda *args: MEASUREMENTS)
    compile_job(optimization_level="5", output_dir=str(tmp_path / "b"))
    assert "--optimization_level has no effect: it is for --backend tensorrt" in capsys.readouterr().out


@pytest.mark.slow
@torch.inference_mode()
def test_voxtral_with_an_adapter_in_encoder_and_projector(tmp_path: Path) -> None:
    family = get_family(TINY)
    torch.manual_seed(0)
    tuned = add_lora(make_model(TINY), family, ("encoder", "projector"), model_id=TINY, r=2, alpha=8, dropout=0.1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(tuned, tmp_path / "adapter")
    report = compile_job(
        model_id=TINY, lora_dir=str(tmp_path / "adapter"), windows="1,2", output_dir=str(tmp_path / "compiled")
    )
    assert all(entry["difference"] < 1e-5 for entry in report["windows"].values())
    model, plain = (load_adapter(make_model(TINY), tmp_path / "adapter")[0] for _ in range(2))
    use_compiled(model, family, tmp_path / "compiled", dtype=torch.float32, device=CPU)
    mel_WFT = torch.from_numpy(np.random.default_rng(1).normal(0, 0.5, (5, 128, 400)).astype(np.float32))
    expected = plain.get_base_model().model.get_audio_features(mel_WFT, return_dict=True).pooler_output
    states = model.get_base_model().model.get_audio_features(mel_WFT, return_dict=True).pooler_output
    assert float((states - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    base = make_model(TINY).model.get_audio_features(mel_WFT, return_dict=True).pooler_output
    assert float((states - base).abs().max()) > 1e-2 * float(base.abs().max()), "the adapter is part of it"
    with pytest.raises(RunError, match=r"made of other weights, those of .* with .*adapter"):
        use_compiled(make_model(TINY), family, tmp_path / "compiled", dtype=torch.float32, device=CPU)


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    report = compile_job("--bf16", output_dir=str(tmp_path / "compiled"))
    assert report["windows"]["1"]["difference"] < 0.05
    use(make_model(dtype=torch.bfloat16), tmp_path / "compiled", torch.bfloat16)


def test_compiled_and_stored_outputs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="--compiled and --store encoder: give one of them"):
        EvaluateSettings.model_validate({"val_jsonl": "v", "compiled": "c", "store": "encoder"})
