"""Augmentation: variants agree with FFmpeg, plain convolution and measured levels, and depend only on their inputs."""

import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import av.filter
import numpy as np
import pytest
import soundfile
from conftest import SPEECH
from hypothesis import given, settings
from hypothesis import strategies as st

from voxray.audio.augment import NO_AUGMENTATION, SpecAugment, WaveformAugmentation, augment, list_audio, spec_augment
from voxray.audio.decode import decode
from voxray.core.errors import RunError

RATE_HZ = 16_000
CLIP = decode(str(SPEECH / "sample.wav"), RATE_HZ)
REPOSITORY = Path(__file__).parents[2]


def write(path: Path, samples: np.ndarray) -> str:
    soundfile.write(path, samples.astype(np.float32), RATE_HZ, subtype="FLOAT", format="WAV")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two noise files, one shorter than the clip, and an impulse response with its direct path at sample 40."""
    folder, random = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    write(folder / "long.wav", 0.1 * random.normal(size=5 * RATE_HZ))
    write(folder / "short.wav", np.cumsum(random.normal(size=5_000)) / 100)
    tail = random.normal(size=4_000) * np.exp(-np.arange(4_000) / 800)
    write(folder / "room.wav", np.concatenate([[0.05], np.zeros(39), [0.9], np.zeros(100), 0.1 * tail]))
    write(folder / "silence.wav", np.zeros(2_000))
    return folder


def noisy(*paths: str, snr_db: tuple[float, float] = (10, 10), **more: Any) -> WaveformAugmentation:
    return WaveformAugmentation(
        **{"num_variants": 30, "noise_snr_db": snr_db, "noise_share": 1, **more}, noise_paths=paths
    )


def in_room(*paths: str, **more: Any) -> WaveformAugmentation:
    return WaveformAugmentation(**{"num_variants": 4, "room_share": 1, **more}, room_paths=paths)


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


# -- speed


def by_ffmpeg(samples: np.ndarray, speed: float) -> np.ndarray:
    """The same by FFmpeg: set another sample rate, then resample with its own resampler."""
    graph: Any = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE_HZ, format="flt", layout="mono")
    chain = [source, graph.add("asetrate", str(round(RATE_HZ * speed))), graph.add("aresample", str(RATE_HZ))]
    graph.link_nodes(*chain, graph.add("aformat", "sample_fmts=flt"), graph.add("abuffersink")).configure()
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = RATE_HZ
    graph.push(frame)
    graph.push(None)
    blocks = []
    while True:
        try:
            blocks.append(graph.pull().to_ndarray()[0])
        except (EOFError, BlockingIOError):
            return np.concatenate(blocks)


@pytest.mark.parametrize("speed", [0.9, 1.1, 0.75, 1.5])
def test_speed_agrees_with_ffmpeg(speed: float):
    result = augment(CLIP, RATE_HZ, 1, "clip", WaveformAugmentation(2, speeds=(speed,)))
    expected = by_ffmpeg(CLIP, speed)
    assert abs(len(result) - len(CLIP) / speed) <= 1 and abs(len(result) - len(expected)) <= 40
    size = min(len(result), len(expected))
    assert np.corrcoef(result[:size], expected[:size])[0, 1] > 0.999
    assert 0.99 < rms(result[:size]) / rms(expected[:size]) < 1.01


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_moves_the_pitch(speed: float):
    tone = np.sin(2 * np.pi * 1_000 * np.arange(2 * RATE_HZ) / RATE_HZ).astype(np.float32) / 2
    result = augment(tone, RATE_HZ, 1, "clip", WaveformAugmentation(2, speeds=(speed,)))[:RATE_HZ]
    assert np.abs(np.fft.rfft(result * np.hanning(RATE_HZ))).argmax() == pytest.approx(1_000 * speed, abs=1)


def test_variants_cycle_through_the_speeds_with_1_last():
    assert [
        len(augment(CLIP, RATE_HZ, v, "a", WaveformAugmentation(3, (0.9, 1.0, 1.1)))) / len(CLIP) for v in range(3)
    ] == (pytest.approx([1, 1 / 0.9, 1 / 1.1], rel=1e-3))
    config = noisy(num_variants=8, speeds=(1.0, 1.1, 0.9))
    assert [config.speed(v) for v in range(8)] == [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1]
    assert len({augment(CLIP, RATE_HZ, v, "a", config).tobytes() for v in range(8)}) == 8


def test_a_clip_that_would_become_too_long_keeps_its_speed():
    config = WaveformAugmentation(3, (0.9, 1.1))
    length_sec = len(CLIP) / RATE_HZ
    assert np.array_equal(augment(CLIP, RATE_HZ, 1, "a", config, max_sec=length_sec / 0.9 - 0.001), CLIP)
    assert len(augment(CLIP, RATE_HZ, 1, "a", config, max_sec=length_sec / 0.9 + 0.001)) > len(CLIP)
    assert len(augment(CLIP, RATE_HZ, 2, "a", config, max_sec=length_sec / 2)) < len(CLIP)  # faster is always shorter
    exact = np.ones(27 * RATE_HZ, np.float32)
    assert len(augment(exact, RATE_HZ, 1, "a", config, max_sec=30.0)) == 30 * RATE_HZ


# -- noise


@pytest.mark.parametrize("name", ["long.wav", "short.wav", "white"])
@pytest.mark.parametrize("snr_db", [-5, 0, 20])
def test_noise_has_the_drawn_snr(folder: Path, name: str, snr_db: float):
    config = noisy(*([] if name == "white" else [str(folder / name)]), snr_db=(snr_db, snr_db))
    quiet = CLIP / 10  # nothing clips, so the difference is the noise
    added = augment(quiet, RATE_HZ, 1, "clip", config) - quiet
    assert 20 * np.log10(rms(quiet) / rms(added)) == pytest.approx(snr_db, abs=0.1)
    if name == "white":
        power = np.abs(np.fft.rfft(added)) ** 2
        assert power[:8_000].mean() / power[8_000:].mean() == pytest.approx(1, abs=0.1)
        return
    recording = soundfile.read(folder / name, dtype="float32")[0]
    loops = np.tile(recording, 2 + len(added) // len(recording))
    size = 1 << (len(loops) + len(added)).bit_length()
    fits = np.fft.irfft(np.fft.rfft(loops, size) * np.fft.rfft(added, size).conj(), size)
    start = int(fits[: len(recording)].argmax())
    assert np.corrcoef(added, loops[start : start + len(added)])[0, 1] > 0.9999
    assert start > 0


def test_draws_cover_the_snr_range_and_all_files(folder: Path):
    paths = (str(folder / "long.wav"), str(folder / "short.wav"))
    config, quiet = noisy(*paths, snr_db=(5, 15), num_variants=201), CLIP / 20
    added = [augment(quiet, RATE_HZ, v, "clip", config) - quiet for v in range(1, 201)]
    snr_db = np.array([20 * np.log10(rms(quiet) / rms(one)) for one in added])
    assert 4.9 < snr_db.min() < 6 and 14 < snr_db.max() < 15.1 and abs(snr_db.mean() - 10) < 1
    rough = [np.abs(np.diff(one)).mean() > 0.5 * rms(one) for one in added]  # long.wav is white, short.wav is not
    assert 70 < sum(rough) < 130


def test_share_of_noisy_variants():
    config = noisy(noise_share=0.3, num_variants=1_001)
    clip = CLIP[:400]
    changed = sum(not np.array_equal(augment(clip, RATE_HZ, v, "clip", config), clip) for v in range(1, 1_001))
    assert 250 < changed < 350


def test_room_and_noise_are_drawn_independently(folder: Path):
    """Each in half of the variants, so both in a quarter. The room flips the sign of the clip, which shows its use."""
    minus, clip = write(folder / "minus.wav", np.array([-0.5])), CLIP[-400:]
    config = noisy(room_paths=(minus,), noise_share=0.5, snr_db=(60, 60), num_variants=1_001)
    result = np.array([augment(clip, RATE_HZ, v, "clip", config) for v in range(1, 1_001)])
    flipped, changed = result @ clip < 0, np.abs(np.abs(result) - np.abs(clip)).max(axis=1) > 1e-5 * np.abs(clip).max()
    assert all(abs(share - 0.5) < 0.05 for share in (flipped.mean(), changed.mean()))
    assert abs((flipped & changed).mean() - 0.25) < 0.05


def test_silence_stays_silent(folder: Path):
    silence = np.zeros(16_000, np.float32)
    both = in_room(str(folder / "room.wav"), noise_snr_db=(0, 0), noise_share=1)
    assert not augment(silence, RATE_HZ, 1, "clip", both).any()
    assert np.array_equal(augment(CLIP, RATE_HZ, 1, "clip", noisy(str(folder / "silence.wav"))), CLIP)
    assert np.array_equal(augment(CLIP, RATE_HZ, 1, "clip", in_room(str(folder / "silence.wav"))), CLIP)


def test_only_a_variant_that_would_clip_is_scaled_down():
    loud = CLIP / np.abs(CLIP).max()
    result = augment(loud, RATE_HZ, 1, "clip", noisy(snr_db=(0, 0)))
    assert np.abs(result).max() == 1.0
    # The result equals that of a quieter clip, which does not clip, times one factor for all samples.
    expected = augment(loud / 16, RATE_HZ, 1, "clip", noisy(snr_db=(0, 0)))
    assert np.allclose(result, expected / np.abs(expected).max(), atol=1e-5)
    assert np.abs(expected).max() < 0.5


# -- rooms


@pytest.mark.parametrize("num_samples", [1, 2, 500, 4_100, len(CLIP)])
def test_a_room_is_a_convolution_without_delay(folder: Path, num_samples: int):
    """Compared with ``np.convolve``, for clips shorter and longer than the response."""
    clip = CLIP[-num_samples:] / 10
    response = soundfile.read(folder / "room.wav", dtype="float64")[0]
    result = augment(clip, RATE_HZ, 1, "clip", in_room(str(folder / "room.wav")))
    expected = np.convolve(clip.astype(np.float64), response)[40 : 40 + len(clip)]
    expected *= rms(clip) / rms(expected)
    assert len(result) == len(clip) and result.dtype == np.float32
    assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()
    assert rms(result) == pytest.approx(rms(clip), rel=1e-5)


def test_words_keep_their_times(folder: Path):
    result = augment(CLIP, RATE_HZ, 1, "clip", in_room(str(folder / "room.wav")))
    delays = range(-200, 201)
    similarity = [np.dot(result[200:-200], np.roll(CLIP, delay)[200:-200]) for delay in delays]
    assert delays[int(np.argmax(similarity))] == 0
    assert 0.3 < np.corrcoef(result, CLIP)[0, 1] < 0.999


# -- reproducibility


MIX = {"speeds": (0.9, 1.1), "noise_snr_db": (5.0, 20.0), "noise_share": 0.7, "room_share": 0.7}
DIGEST = """
import hashlib, sys
import numpy as np
from voxray.audio.augment import WaveformAugmentation, augment
clip, noise_paths, room_paths = np.load(sys.argv[1]), tuple(sys.argv[2:4]), (sys.argv[4],)
config = WaveformAugmentation(9, noise_paths=noise_paths, room_paths=room_paths, **MIX)
for variant in reversed(range(9)):
    print(variant, hashlib.sha256(augment(clip, 16000, variant, "the clip", config).tobytes()).hexdigest())
print(config.fingerprint)
""".replace("MIX", repr(MIX))


def test_another_process_makes_the_same_variants(folder: Path):
    np.save(folder / "clip.npy", CLIP)
    paths = [str(folder / name) for name in ("long.wav", "short.wav", "room.wav")]
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", DIGEST, str(folder / "clip.npy"), *paths]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    config = WaveformAugmentation(9, noise_paths=(paths[0], paths[1]), room_paths=(paths[2],), **MIX)
    np.random.seed(7)
    here = [hashlib.sha256(augment(CLIP, RATE_HZ, v, "the clip", config).tobytes()).hexdigest() for v in range(9)]
    assert len(set(here)) == 9
    assert there[:-1] == [*(f"{v} {here[v]}" for v in reversed(range(9))), config.fingerprint]


def test_seed_variant_and_clip_each_change_the_draws():
    clip = CLIP[:8_000]
    base = augment(clip, RATE_HZ, 1, "a", noisy())
    others = [
        augment(clip, RATE_HZ, 1, "a", noisy(seed=1)),
        augment(clip, RATE_HZ, 2, "a", noisy()),
        augment(clip, RATE_HZ, 1, "b", noisy()),
        augment(clip, RATE_HZ, 2, "b", noisy(seed=1)),
    ]
    assert len({one.tobytes() for one in [base, *others]}) == 5
    assert np.abs(np.corrcoef([one - clip for one in [base, *others]]) - np.eye(5)).max() < 0.05
    assert np.array_equal(augment(clip, RATE_HZ, 1, "a", noisy(num_variants=3)), base)  # more variants may be added
    assert np.array_equal(augment(clip, RATE_HZ, 1, "\udcff", noisy()), augment(clip, RATE_HZ, 1, "\udcff", noisy()))


def test_rooms_do_not_change_the_noise(folder: Path):
    clip = CLIP[:4_000] / 10
    dry = [augment(clip, RATE_HZ, v, "a", noisy()) - clip for v in range(1, 5)]
    # A room of one tap is the clip itself.
    one = write(folder / "one.wav", np.array([0.5]))
    wet = [augment(clip, RATE_HZ, v, "a", noisy(room_paths=(one,), room_share=1)) - clip for v in range(1, 5)]
    assert np.allclose(dry, wet, atol=1e-6)


def test_the_first_variant_is_the_clip_itself():
    assert augment(CLIP, RATE_HZ, 0, "a", NO_AUGMENTATION) is CLIP
    assert np.array_equal(augment(CLIP, RATE_HZ, 0, "a", noisy()), CLIP)
    for variant in (-1, 30):
        with pytest.raises(ValueError, match=f"variant is {variant}, not one of 30"):
            augment(CLIP, RATE_HZ, variant, "a", noisy())


def kinds_of_clip(num_samples: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(num_samples)
    return {
        "silence": np.zeros(num_samples),
        "noise": 0.3 * random.normal(size=num_samples),
        "dc": np.full(num_samples, 0.5),
        "click": np.eye(1, num_samples, num_samples // 2)[0],
        "denormal": np.full(num_samples, 1e-42),
        "faint": 3e-8 * random.normal(size=num_samples),
        "huge": np.where(random.random(num_samples) < 0.5, -3e38, 3e38),
    }


@settings(max_examples=120, deadline=None)
@given(data=st.data(), num_samples=st.one_of(st.integers(1, 20), st.integers(1, 48_000)))
def test_samples_stay_finite_for_any_clip(folder: Path, data: st.DataObject, num_samples: int):
    kind = data.draw(st.sampled_from(sorted(kinds_of_clip(1))))
    clip = kinds_of_clip(num_samples)[kind].astype(np.float32)
    names = data.draw(st.lists(st.sampled_from(["long.wav", "short.wav", "silence.wav"]), max_size=2))
    speed = data.draw(st.sampled_from([0.5, 0.9, 1.0, 1.1, 2.0]))
    snr_db = data.draw(st.sampled_from([-100, -5, 10, 100]))
    config = noisy(*(str(folder / name) for name in names), snr_db=(snr_db, snr_db), speeds=(speed,), room_share=0.5)
    config = replace(config, room_paths=(str(folder / "room.wav"), str(folder / "silence.wav")))
    before = clip.copy()
    with np.errstate(all="raise", under="ignore"):
        result = augment(clip, RATE_HZ, data.draw(st.integers(1, 29)), "clip", config)
    assert np.array_equal(clip, before)
    assert (
        result.dtype == np.float32 and result.ndim == 1 and abs(len(result) - num_samples / speed) <= 1 and len(result)
    )
    assert np.isfinite(result).all() and np.abs(result).max() <= 1
    assert kind != "silence" or not result.any()


# -- settings


def test_the_fingerprint_depends_on_every_setting(folder: Path):
    noise, room = str(folder / "long.wav"), str(folder / "room.wav")
    base = WaveformAugmentation(3, (0.9, 1.1), (5, 10), (noise,), (room,), 0.5, 0.5, 0)
    others = {
        "num_variants": 4,
        "speeds": (1.1, 0.9),
        "noise_snr_db": (5, 11),
        "noise_paths": (noise, noise),
        "room_paths": (noise,),
        "noise_share": 0.4,
        "room_share": 0.4,
        "seed": 1,
    }
    assert list(others) == [field.name for field in fields(WaveformAugmentation)]
    seen = [base.fingerprint, *(replace(base, **{name: value}).fingerprint for name, value in others.items())]
    assert len(set(seen)) == 1 + len(others) and all(len(one) == 64 for one in seen)
    assert replace(base, noise_snr_db=(5.0, 10.0)).fingerprint == base.fingerprint
    assert NO_AUGMENTATION.fingerprint == "" and replace(base, num_variants=1).fingerprint == ""


def test_a_worker_has_the_fingerprint_of_the_driver(tmp_path: Path):
    config = noisy(write(tmp_path / "noise.wav", CLIP))
    seen = config.fingerprint
    (tmp_path / "noise.wav").unlink()
    assert pickle.loads(pickle.dumps(config)) == config and pickle.loads(pickle.dumps(config)).fingerprint == seen


def test_the_fingerprint_depends_on_file_contents(folder: Path, tmp_path: Path):
    (tmp_path / "else").mkdir()
    raw = (folder / "long.wav").read_bytes()
    moved = tmp_path / "else" / "other.wav"
    moved.write_bytes(raw)
    base = noisy(str(folder / "long.wav")).fingerprint
    assert noisy(str(moved)).fingerprint == base
    assert in_room(str(moved)).fingerprint == in_room(str(folder / "long.wav")).fingerprint
    moved.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert noisy(str(moved)).fingerprint != base
    assert in_room(str(moved)).fingerprint != in_room(str(folder / "long.wav")).fingerprint


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path):
    (tmp_path / "bad.wav").write_bytes(b"<html>404</html>" * 50)
    for name in ("none.wav", "bad.wav"):
        for config in (noisy(str(tmp_path / name)), in_room(str(tmp_path / name))):
            with pytest.raises(RunError, match=f"{name}: cannot use this noise or room file"):
                augment(CLIP, RATE_HZ, 1, "a", config)
    with pytest.raises(RunError, match=r"none\.wav: cannot read this noise or room file: No such file"):
        _ = noisy(str(tmp_path / "none.wav")).fingerprint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_variants": 0}, "num_variants is 0"),
        ({"speeds": ()}, "speeds is empty"),
        ({"speeds": (0.9, 3.0)}, "not all between 0.5 and 2.0"),
        ({"speeds": (float("nan"),)}, "not all between"),
        ({"speeds": (0.9, 0.9)}, "some of them twice"),
        ({"noise_snr_db": (20.0, 10.0)}, r"noise_snr_db is \(20.0, 10.0\)"),
        ({"noise_share": 1.5}, "noise_share is 1.5"),
        ({"room_share": -0.1}, "room_share is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"noise_paths": ("a.wav",)}, "noise_paths without noise_snr_db"),
        ({"num_variants": 2}, r"num_variants is 2, but .* make 1 different"),
        ({"num_variants": 4, "speeds": (0.9, 1.0, 1.1)}, "make 3 different"),
        ({"num_variants": 2, "noise_snr_db": (5.0, 5.0), "noise_share": 0.0}, "make 1 different"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        WaveformAugmentation(**values)


def test_audio_files_of_a_folder(tmp_path: Path):
    for name in ("b.wav", "sub/a.FLAC", "sub/z.opus", "notes.txt", "._b.wav", ".cache/c.wav", "a.wav/inside.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = ["a.wav/inside.mp3", "b.wav", "sub/a.FLAC", "sub/z.opus"]
    assert list_audio(str(tmp_path)) == tuple(str(tmp_path / name) for name in names)
    with pytest.raises(RunError, match=r"\.cache/none: no such folder"):
        list_audio(str(tmp_path / ".cache" / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty: no audio file in this folder"):
        list_audio(str(tmp_path / "empty"))


# -- SpecAugment


def features(num_frames: int, num_bins: int = 128, kind: str = "float32") -> np.ndarray:
    return np.random.default_rng(3).normal(-0.4, 0.5, (num_frames, num_bins)).astype(kind)


def runs(flags: np.ndarray) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_masks_are_bands_and_ranges_of_the_mean(kind: str):
    mel, config = features(400, kind=kind), SpecAugment(2, 27, 3, 30, 0.05)
    before, mean = mel.copy(), mel.astype(np.float32).mean().astype(kind)
    most_bins = most_frames = 0
    for draw in range(200):
        result = spec_augment(mel, config, np.random.default_rng(draw))
        assert result.dtype == mel.dtype and result.shape == mel.shape and not np.shares_memory(result, mel)
        changed = result != before
        assert (result[changed] == mean).all()
        # A cell is masked if its frame or its bin is masked. Cells equal to the mean before do not matter.
        frames, bins = changed.mean(axis=1) > 0.9, changed.mean(axis=0) > 0.9
        expected = np.where(frames[:, None] | bins[None, :], mean, before)
        assert np.array_equal(result, expected)
        assert bins.sum() <= 2 * 27 and frames.sum() <= 3 * 20 and len(runs(bins)) <= 2 and len(runs(frames)) <= 3
        most_bins, most_frames = max(most_bins, *runs(bins), 0, 0), max(most_frames, *runs(frames), 0, 0)
    assert np.array_equal(mel, before)
    assert most_bins >= 25 and most_frames >= 19  # 5 % of 400 frames are 20, under the limit of 30


@pytest.mark.parametrize(
    ("config", "axis", "widest"), [(SpecAugment(1, 27), 1, 27), (SpecAugment(0, 0, 1, 40, 1.0), 0, 40)]
)
def test_masks_cover_as_much_as_torchaudios(config: SpecAugment, axis: int, widest: int):
    """The mean width and the probability that a bin or frame is masked are the same."""
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("torchaudio.functional")
    mel, draws = features(200, 128), 3_000
    rng = np.random.default_rng(0)
    ours = np.array([(spec_augment(mel, config, rng) != mel).any(axis=1 - axis) for _ in range(draws)])
    torch.manual_seed(0)
    zeros = torch.zeros(draws, 1, 200, 128)
    # torchaudio draws from [0, parameter) and rounds down; ours includes the largest width.
    reference = functional.mask_along_axis_iid(zeros, widest + 1, 1.0, axis + 2).numpy().any(axis=3 - axis)[:, 0]
    assert ours.shape == reference.shape
    assert ours.sum(axis=1).mean() == pytest.approx(reference.sum(axis=1).mean(), rel=0.04)
    assert np.bincount(ours.sum(axis=1), minlength=widest + 1).min() > 0.6 * draws / (widest + 1)  # each width as often
    assert np.abs(ours.mean(axis=0) - reference.mean(axis=0)).max() < 0.04


def test_masks_depend_on_the_generator_only():
    mel, config = features(300), SpecAugment(2, 27, 2, 100, 0.2)
    result = [spec_augment(mel, config, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert np.array_equal(result[0], result[1]) and not np.array_equal(result[0], result[2])


@pytest.mark.filterwarnings("error")  # such as "mean of empty slice"
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (3, 80), (2, 1)])
def test_clips_of_few_frames(shape: tuple[int, int]):
    mel = features(*shape, kind="float16")
    for seed in range(50):
        result = spec_augment(mel, SpecAugment(2, 200, 2, 50, 1.0), np.random.default_rng(seed))
        assert result.shape == mel.shape and np.isfinite(result).all()


def test_a_long_float16_clip_keeps_its_mean():
    """Sums over 384,000 values do not fit float16."""
    mel = np.full((3_000, 128), 1.5, np.float16)
    assert np.array_equal(spec_augment(mel, SpecAugment(2, 27, 2, 100), np.random.default_rng(0)), mel)


def test_no_masks_are_false_and_change_nothing():
    mel = features(50)
    for off in (SpecAugment(), SpecAugment(2, 0), SpecAugment(0, 27, 2, 0), SpecAugment(0, 27, 2, 100, 0.0)):
        assert not off and np.array_equal(spec_augment(mel, off, np.random.default_rng(0)), mel)
    assert SpecAugment(1) and SpecAugment(0, 27, 1)
    wrong: tuple[dict[str, Any], ...] = ({"freq_masks": -1}, {"time_mask_frames": -1}, {"time_mask_share": 1.5})
    for values in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(values))} is "):
            SpecAugment(**values)
