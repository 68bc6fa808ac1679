"""Variants of clips and masks on features: the same for everybody, other ones in every epoch, never on validation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import TINY, manifest, read_rows, write_rows

from voxray.audio.augment import SpecAugment, WaveformAugmentation, augment
from voxray.batches.loader import Loader, Masking
from voxray.batches.packing import Batching
from voxray.batches.plan import Plan, Variants
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError, SettingsError
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.from_settings import feature_spec
from voxray.features.reader import Features

WAVEFORM = WaveformAugmentation(num_variants=4, speeds=(0.9, 1.1), noise_snr_db=(5, 15), noise_share=1.0, seed=3)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = read_rows(manifest("asr.train"))[:6] + read_rows(manifest("tqa.train"))[:3]
    return write_rows(tmp_path_factory.mktemp("m") / "m.jsonl", rows)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(TINY, FeatureSpec(waveform=WAVEFORM))


@pytest.fixture(scope="module")
def features(speech: str, extractor: Extractor, tmp_path_factory: pytest.TempPathFactory) -> Features:
    report = featurize([speech], extractor, tmp_path_factory.mktemp("f"), rows_per_shard=4, use_ray=False)
    assert (report.num_rows, report.num_bad) == (9, 0)
    return Features(report.folders)


def test_every_clip_has_its_variants_and_text_has_none(features, extractor, speech):
    assert len(features) == 6 * 4 + 3
    assert features.sample.tolist() == [*np.repeat(np.arange(6), 4), 6, 7, 8]
    lengths = features.num_samples[:4]
    assert [round(lengths[0] / length, 2) for length in lengths] == [1.0, 0.9, 1.1, 0.9]
    rows = [features.row(number) for number in range(8)]
    assert len({row.audio.tobytes() for row in rows}) == 8, "all different"
    assert len({row.answer for row in rows[:4]}) == 1
    plain = Extractor(TINY)
    for number, line in enumerate(read_rows(speech)[:2]):
        samples, _ = soundfile.read(line["audio_path"], dtype="float32")
        mel = plain.front_end.features(samples).mel_KF.astype(np.float16)
        assert np.array_equal(rows[4 * number].audio, mel), "variant 0 is the clip as it is"


def test_variants_are_those_of_the_augmentation(features, extractor, speech):
    """What stands in the shard is augment() of the clip, keyed by its bytes and nothing else."""
    import hashlib

    line = read_rows(speech)[1]
    samples, _ = soundfile.read(line["audio_path"], dtype="float32")
    key = f"{hashlib.sha256(Path(line['audio_path']).read_bytes()).hexdigest()}:0.0"
    signal = augment(samples, 16_000, 2, key, WAVEFORM)
    mel = extractor.front_end.features(signal).mel_KF.astype(np.float16)
    assert np.array_equal(features.row(6).audio, mel)


def test_variants_show_in_the_key_and_plain_manifests_have_none(speech, extractor, tmp_path):
    other = Extractor(
        TINY, FeatureSpec(waveform=WaveformAugmentation(num_variants=4, speeds=(0.9, 1.1), noise_snr_db=(5, 15)))
    )
    assert len({extractor.fingerprint, other.fingerprint, Extractor(TINY).fingerprint}) == 3
    assert extractor.plain_fingerprint == Extractor(TINY).fingerprint
    report = featurize([speech], extractor, tmp_path, plain_manifests=[speech], rows_per_shard=4, use_ray=False)
    varied, plain = (Features([folder]) for folder in report.folders)
    assert (len(varied), len(plain)) == (27, 9)
    same = featurize([], Extractor(TINY), tmp_path, plain_manifests=[speech], rows_per_shard=4, use_ray=False)
    assert same.num_made == 0 and same.folders == report.folders[1:]


def plan_of(features: Features, seed: int = 0, **changes: Any) -> Plan:
    rows, _ = features.within(changes.pop("max_len", 10_000))
    variants = Variants(rows, features.sample[rows], seed)
    batching = Batching("fixed", microbatch_size=2)
    task, weights = features.task[variants.first], changes.get("weights")
    return Plan(task, variants.first, weights, seed, batching, 2, False, variants)


def test_an_epoch_takes_one_variant_of_every_sample(features):
    plan = plan_of(features)
    seen = []
    for epoch in range(40):
        rows = plan.epoch_rows(epoch)
        assert sorted(features.sample[rows]) == list(range(9)), "every sample exactly once"
        seen.append(dict(zip(features.sample[rows].tolist(), rows.tolist(), strict=True)))
    for sample in range(6):
        drawn = [epoch[sample] - 4 * sample for epoch in seen]
        assert set(drawn) == {0, 1, 2, 3} and max(map(drawn.count, range(4))) < 25
    again = plan_of(features)
    assert again.epoch_rows(7).tolist() == plan_of(features).epoch_rows(7).tolist()
    assert plan_of(features, seed=1).epoch_rows(7).tolist() != again.epoch_rows(7).tolist()


def test_the_draw_depends_on_no_worker(features):
    plan = plan_of(features, weights={"asr": 2.0, "tqa": 1.0})
    for step in range(6):
        whole = [
            row
            for microbatch in plan.step_microbatches(step)
            if not microbatch.is_filler
            for row in microbatch.rows.tolist()
        ]
        for world in (1, 2, 3):
            microbatches = [
                microbatch
                for rank in range(world)
                for microbatch in plan.rank_microbatches(step, rank, world)
                if not microbatch.is_filler
            ]
            microbatches.sort(key=lambda microbatch: microbatch.number)
            assert [row for microbatch in microbatches for row in microbatch.rows.tolist()] == whole


def test_only_variants_within_max_len_are_drawn(features):
    limit = int(features.num_tokens[:4].min())
    rows, lost = features.within(limit)
    assert (features.num_tokens[rows] <= limit).all()
    used = set(features.sample[rows].tolist())
    assert used | set(features.sample[lost].tolist()) == set(range(9)) and len(lost) == 9 - len(used)
    for epoch in range(5):
        assert set(plan_of(features, max_len=limit).epoch_rows(epoch).tolist()) <= set(rows.tolist())


def batches(
    features: Features, extractor: Extractor, options: SpecAugment, threads: int, start: int = 0
) -> dict[int, bytes]:
    masking = Masking(options, seed=5)
    loader = Loader(features, extractor.front_end, plan_of(features), Worker(), threads, masking, pin_memory=False)
    return {
        step: b"".join(
            batch["input_features"].numpy().tobytes() for _, batch in microbatches if "input_features" in batch
        )
        for step, microbatches in loader.steps(start, 8)
    }


def test_masks_depend_on_step_and_pack_alone(features, extractor):
    options = SpecAugment(freq_masks=2, freq_mask_bins=20, time_masks=2, time_mask_share=0.2)
    inline, ahead, resumed = (batches(features, extractor, options, *rest) for rest in ((0,), (3,), (1, 4)))
    assert inline == ahead and resumed == {step: inline[step] for step in range(4, 8)}
    plain = batches(features, extractor, SpecAugment(), 0)
    assert all(plain[step] != inline[step] for step in plain if plain[step])


def test_masks_stay_on_valid_frames(features, extractor):
    """The fill of the padded frames is the model's word for "nothing": masks never reach it."""
    from voxray.batches.collate import collate_training

    row = features.row(0)
    rng = np.random.default_rng(0)
    from voxray.audio.augment import spec_augment

    options = SpecAugment(freq_masks=3, freq_mask_bins=60, time_masks=3, time_mask_share=1.0)
    masked = collate_training([row], extractor.front_end, lambda mel: spec_augment(mel, options, rng))["input_features"]
    plain = collate_training([row], extractor.front_end)["input_features"]
    changed = (masked != plain).any(dim=1).reshape(-1)
    assert changed[: len(row.audio)].any() and not changed[len(row.audio) :].any()


def settings(**changes: Any) -> MultitaskSettings:
    return MultitaskSettings.model_validate({"train_jsonl": ("t",), "output_dir": "o", **changes})


def test_flags_become_variants(tmp_path, capsys):
    for name in ("noise", "rooms"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", np.ones(800, np.float32) / 2, 16_000)
    job_settings = settings(
        variants=5,
        speeds="0.8,1.2",
        noise_snr="3,9",
        noise_dir=str(tmp_path / "noise"),
        noise_share=0.25,
        room_dir=str(tmp_path / "rooms"),
        room_share=0.75,
        variant_seed=4,
    )
    noise, rooms = (str(tmp_path / name / "a.wav") for name in ("noise", "rooms"))
    expected = WaveformAugmentation(5, (0.8, 1.2), (3, 9), (noise,), (rooms,), 0.25, 0.75, 4)
    assert feature_spec(job_settings, bf16=False).waveform == expected
    assert feature_spec(settings(), bf16=False) == FeatureSpec()
    feature_spec(settings(noise_snr="3,9"), bf16=False)
    assert "warning: --noise_snr has no effect without --variants" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"variants": 9}, SettingsError, "--variants 9: "),
        ({"variants": 3, "noise_dir": "NOISE"}, SettingsError, "--noise_dir without --noise_snr"),
        ({"variants": 3, "noise_snr": "9,3"}, SettingsError, "--noise_snr is"),
        ({"variants": 3, "noise_snr": "9"}, SettingsError, "--noise_snr: needs two numbers"),
        ({"variants": 3, "room_dir": "/nowhere"}, RunError, "/nowhere: no such folder"),
    ],
)
def test_variants_that_cannot_be_had_are_one_line(flags, error, message, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16_000)
    flags = {name: str(tmp_path) if value == "NOISE" else value for name, value in flags.items()}
    with pytest.raises(error, match=message):
        feature_spec(settings(**flags), bf16=False)
