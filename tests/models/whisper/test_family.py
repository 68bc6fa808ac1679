"""Whisper's model side against transformers': losses, generation in changing batches, long recordings."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import WHISPER, manifest, read_rows, write_rows

from voxray.audio.decode import decode
from voxray.batches.collate import collate_packed, collate_training
from voxray.core.errors import SettingsError
from voxray.features.context import with_context
from voxray.features.reader import FeatureRow, Features
from voxray.generation.generate import Completion, SamplingParams, generate
from voxray.models.adapters.lora import add_lora, count_parameters
from voxray.models.interface import IGNORED
from voxray.models.parts.losses import token_losses
from voxray.models.registry import get_family

FAMILY = get_family(WHISPER)
FRONT_END = FAMILY.front_end(WHISPER)
CPU = torch.device("cpu")
LIMIT = 40
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Speech, every third row without language, and one recording of several windows."""
    rows = [*read_rows(manifest("base.val"))[:6], *read_rows(manifest("asr.val"))[:3]]
    for row in rows[::3]:
        row.pop("language")
    folder = tmp_path_factory.mktemp("whisper")
    silence = np.zeros(8_000, np.float32)
    clips = [decode(row["audio_path"], 16_000) for row in read_rows(manifest("base.val")) if row["language"] == "en"]
    long = np.concatenate([part for clip in clips[:5] for part in (clip, silence)])
    soundfile.write(folder / "long.wav", long, 16_000)
    rows.append({"audio_path": str(folder / "long.wav"), "transcript": "a long recording", "language": "en"})
    return rows


@pytest.fixture(scope="module")
def features(rows: list[dict[str, Any]], make_features: Callable[..., Any], tmp_path_factory: Any) -> Features:
    path = write_rows(tmp_path_factory.mktemp("m") / "m.jsonl", rows)
    return Features(make_features(path, model_id=WHISPER))


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' own model."""
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(WHISPER, dtype=torch.float32).eval()


def short(features: Features) -> list[FeatureRow]:
    return [features.row(number) for number in range(len(features) - 1)]


def completions(model: Any, rows: list[FeatureRow], *, static_cache: bool = False, **sampling: Any) -> list[Completion]:
    options = {"batch_size": 3, "sampling": SamplingParams(LIMIT, **sampling), "static_cache": static_cache}
    results = dict(generate(model, FAMILY, FRONT_END, rows, **options))
    return [results[row] for row in range(len(rows))]


def reference_text(reference: Any, row: FeatureRow, *, task: str = "transcribe", **options: Any) -> str:
    """transformers' answer to one row, with features and detected language of its own."""
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(WHISPER)
    samples, long = decode(PATHS[row.id], 16_000), row.num_windows > 1
    options_long: dict[str, Any] = (
        {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    )
    inputs = processor.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt", **options_long)
    inputs["input_features"] = inputs["input_features"].half().float()  # as shards hold them
    language = row.language or None
    ids = reference.generate(**inputs, language=language, task=task, max_new_tokens=LIMIT, **options)
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


PATHS: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def _paths(rows: list[dict[str, Any]], features: Features) -> None:
    PATHS.update({features.row(number).id: row["audio_path"] for number, row in enumerate(rows)})


def test_losses_equal_transformers_padded_and_packed(model, reference, features):
    rows = short(features)
    batch = collate_training(rows, FRONT_END)
    ours = token_losses(partial(FAMILY.answer_logits, model), batch)
    with torch.inference_mode():
        logits = reference(
            input_features=batch["input_features"],
            decoder_input_ids=batch["input_ids"],
            decoder_attention_mask=batch["attention_mask"],
        ).logits
    labels_BL = batch["labels"].roll(-1, 1)
    keep_BL = labels_BL != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[keep_BL], labels_BL[keep_BL], reduction="none")
    assert torch.allclose(ours, expected, atol=1e-5)
    packed = token_losses(partial(FAMILY.answer_logits, model), collate_packed(rows, FRONT_END))
    assert torch.allclose(packed, ours, atol=1e-5)


def test_packed_and_padded_rows_have_the_same_gradients(features):
    rows, gradients_by_layout = short(features)[:4], []
    for collate in (collate_training, collate_packed):
        base = FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU)
        torch.manual_seed(0)
        wrapped = add_lora(base, FAMILY, ("encoder", "decoder"), model_id=WHISPER, r=4, alpha=8, dropout=0.0)
        token_losses(partial(FAMILY.answer_logits, wrapped), collate(rows, FRONT_END)).sum().backward()
        gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.grad is not None]
        gradients_by_layout.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert gradients_by_layout[0].abs().max() > 0
    assert torch.allclose(*gradients_by_layout, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static_cache", [False, True])
def test_greedy_answers_equal_transformers_in_changing_batches(model, reference, features, static_cache, monkeypatch):
    """Rows leave and join, and the language of some rows is detected."""
    monkeypatch.setattr(torch, "compile", lambda step: step)
    rows = short(features)
    answers = completions(model, rows, static_cache=static_cache)
    assert [answer.text for answer in answers] == [reference_text(reference, row) for row in rows]
    assert len({answer.num_new_tokens for answer in answers}) > 1, "they end at different times"


def test_an_old_generation_config_is_completed(model, features, tmp_path):
    """Fine-tunes of 2022 and 2023 have no ids of languages and times there; the tokenizer has them."""
    folder = Path(shutil.copytree(WHISPER, tmp_path / "old"))
    config = json.loads((folder / "generation_config.json").read_text())
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual"):
        del config[name]
    (folder / "generation_config.json").write_text(json.dumps(config))
    old = FAMILY.load_model(str(folder), dtype=torch.float32, device=CPU)
    rows = short(features)[:4]
    for options in ({}, {"num_beams": 2}):
        answers = completions(old, rows, **options)
        assert [answer.text for answer in answers] == [answer.text for answer in completions(model, rows, **options)]
    long = features.row(len(features) - 1)
    assert completions(old, [long])[0].text == completions(model, [long])[0].text


def test_the_detected_language_is_known(model, features):
    spoken = [row["language"] for row in (*read_rows(manifest("base.val"))[:6], *read_rows(manifest("asr.val"))[:3])]
    for options in ({}, {"num_beams": 2}):
        assert [answer.language for answer in completions(model, short(features), **options)] == spoken
    long = features.row(len(features) - 1)
    [answer] = completions(model, [replace(long, prompt_ids=np.delete(long.prompt_ids, 1))])
    assert answer.language == "en" and answer.text == completions(model, [long])[0].text


def test_beam_search_equals_transformers(model, reference, features):
    rows = short(features)[:4]
    texts = [answer.text for answer in completions(model, rows, num_beams=3)]
    assert texts == [reference_text(reference, row, num_beams=3) for row in rows]
    limit = FRONT_END.max_positions  # more than fits after the prompt, and a detected language takes one position
    results = list(
        generate(model, FAMILY, FRONT_END, rows[:1], batch_size=1, sampling=SamplingParams(limit, temperature=0.5))
    )
    assert results[0][1].text


def test_long_recordings_go_through_whispers_own_algorithm(model, reference, features):
    long = features.row(len(features) - 1)
    assert long.num_windows > 2
    [answer] = completions(model, [long])
    assert answer.text == reference_text(reference, long, return_timestamps=True) and not answer.hit_max
    transcripts = [row["transcript"] for row in read_rows(manifest("base.val")) if row["language"] == "en"][:5]
    words = [word for line in transcripts for word in line.split()]
    assert sum(word in answer.text.split() for word in words) > 0.8 * len(words), "the whole recording is transcribed"


def translations(make_features: Callable[..., Any], folder: Path, rows: list[dict[str, Any]]) -> list[FeatureRow]:
    """The rows as translations into English."""
    translated = [{**row, "translation": "x", "target_language": "en"} for row in rows]
    stored = Features(make_features(write_rows(folder / "t.jsonl", translated), model_id=WHISPER, folder=folder))
    PATHS.update({stored.row(number).id: row["audio_path"] for number, row in enumerate(rows)})
    return [stored.row(number) for number in range(len(stored))]


@pytest.fixture(scope="module")
def translating(model: Any, reference: Any) -> list[Any]:
    """Our model and transformers', to which the token of the task makes a difference: the tiny model ignores it."""
    torch.manual_seed(0)
    models, embedding_D = [copy.deepcopy(each) for each in (model, reference)], 3 * torch.randn(model.config.d_model)
    for each in models:
        with torch.no_grad():
            each.model.decoder.embed_tokens.weight[FRONT_END.task_to_id["translate"]] = embedding_D
    return models


def test_translations_equal_transformers(translating, rows, make_features, tmp_path):
    """Short clips with a named and a detected language, by greedy and beam search, and a long recording."""
    model, reference = translating
    *clips, long = translations(make_features, tmp_path, [*rows[:3], rows[-1]])
    translate_id = FRONT_END.task_to_id["translate"]
    assert long.num_windows > 2 and all(translate_id in row.prompt_ids for row in (*clips, long))
    for options in ({}, {"num_beams": 2}):
        answers = [answer.text for answer in completions(model, clips, **options)]
        assert answers == [reference_text(reference, row, task="translate", **options) for row in clips]
        assert answers != [reference_text(reference, row, **options) for row in clips]
    expected = reference_text(reference, long, task="translate", return_timestamps=True)
    assert [answer.text for answer in completions(model, [long])] == [expected]
    assert expected != reference_text(reference, long, return_timestamps=True)


def test_recordings_of_both_tasks_go_together(translating, features, rows, make_features, tmp_path):
    """Each has the text that it has alone."""
    [translated] = translations(make_features, tmp_path, rows[-1:])
    transcribed = features.row(len(features) - 1)
    alone = [completions(translating[0], [row])[0].text for row in (transcribed, translated)]
    together = completions(translating[0], [transcribed, translated, transcribed])
    assert [answer.text for answer in together] == [*alone, alone[0]] and alone[0] != alone[1]


def test_rows_with_times_get_transcripts_with_times(model, reference, features, make_features, tmp_path):
    row = read_rows(manifest("base.val"))[0]
    row |= {"segments": [{"start": 0.0, "end": 1.0, "text": row["transcript"]}]}
    timed = Features(make_features(write_rows(tmp_path / "t.jsonl", [row]), model_id=WHISPER, folder=tmp_path)).row(0)
    PATHS[timed.id] = row["audio_path"]
    assert FRONT_END.no_times_id not in timed.prompt_ids and "<|1.00|>" in FRONT_END.show(timed.target_ids)
    [answer] = completions(model, [timed])
    assert answer.text == reference_text(reference, timed, return_timestamps=True) and answer.text


def test_full_size_trains_what_the_published_recipe_trains():
    """whisper-small's configuration: 72 layers of 768 x 768, LoRA of rank 32 on each: 1.44 % of the parameters."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in SMALL.items()}
    with torch.device("meta"):
        base = WhisperForConditionalGeneration(WhisperConfig(vocab_size=51_865, d_model=768, **halves))
    wrapped = add_lora(
        base.requires_grad_(False), FAMILY, ("encoder", "decoder"), model_id="", r=32, alpha=64, dropout=0.05
    )
    counts = count_parameters(wrapped, FAMILY)
    trainable, total = (sum(entry[key] for entry in counts.values()) for key in ("trainable", "total"))
    assert (trainable, total) == (3_538_944, 245_273_856) and f"{trainable / total:.2%}" == "1.44%"
    assert counts["encoder"]["trainable"] * 2 == counts["decoder"]["trainable"], "cross attention is the decoder's"


SMALL = {"layers": 12, "attention_heads": 12, "ffn_dim": 3072}


@pytest.mark.parametrize(("roles", "num_layers"), [(("decoder",), 8), (("encoder",), 4), (("encoder", "decoder"), 12)])
def test_lora_stays_in_its_role(roles, num_layers):
    base = FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU)
    wrapped = add_lora(base, FAMILY, roles, model_id=WHISPER, r=2, alpha=4, dropout=0.0)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * num_layers
    assert {"encoder" if ".encoder." in name else "decoder" for name in trained} == set(roles)
    targets = ("fc1", "fc2")
    base = FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU)
    wrapped = add_lora(base, FAMILY, roles, model_id=WHISPER, r=2, alpha=4, dropout=0.0, targets=targets)
    assert all(".fc" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    with pytest.raises(SettingsError, match="--lora_targets no_such: no layer is called so"):
        add_lora(base, FAMILY, ("decoder",), model_id=WHISPER, r=2, alpha=4, dropout=0.0, targets=("no_such",))


@pytest.mark.parametrize(("quantize", "kind"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_encoder_and_decoder_are_quantised_and_the_output_layer_is_not(quantize, kind, features):
    model = FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU, quantize=quantize)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.encoder.layers.0.fc1"] == kinds["model.decoder.layers.1.encoder_attn.q_proj"] == kind
    assert kinds["proj_out"] == "Linear"
    rows = short(features)[:4]
    wrapped = add_lora(model, FAMILY, ("encoder", "decoder"), model_id=WHISPER, r=4, alpha=8, dropout=0.0)
    loss = token_losses(partial(FAMILY.answer_logits, wrapped), collate_training(rows, FRONT_END))
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)
    assert all(answer.text for answer in completions(wrapped.eval(), rows))


def test_stored_encoder_outputs_give_the_same_answers_and_losses(model, features, rows, make_features, tmp_path):
    path = write_rows(tmp_path / "m.jsonl", rows[:5])
    stored = Features(make_features(path, model_id=WHISPER, folder=tmp_path, store="encoder", dtype="float32"))
    from_mel = short(features)[:5]
    expected = token_losses(partial(FAMILY.answer_logits, model), collate_training(from_mel, FRONT_END))
    skipping = FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU)
    FAMILY.skip_encoder(skipping)
    some = [stored.row(number) for number in range(5)]
    losses = token_losses(partial(FAMILY.answer_logits, skipping), collate_training(some, FRONT_END))
    assert torch.allclose(losses, expected, atol=1e-5)
    assert [a.text for a in completions(skipping, some)] == [a.text for a in completions(model, from_mel)]


def test_long_recordings_need_log_mel(features, rows, make_features, tmp_path):
    path = write_rows(tmp_path / "m.jsonl", rows[-1:])
    stored = Features(make_features(path, model_id=WHISPER, folder=tmp_path, store="encoder", dtype="float32"))
    skipping = FAMILY.load_model(WHISPER, dtype=torch.float32, device=CPU)
    FAMILY.skip_encoder(skipping)
    with pytest.raises(ValueError, match="--store mel or pcm16"):
        completions(skipping, [stored.row(0)])


def test_other_model_types_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(Exception, match="model type 'bert' is not supported: supported are voxtral, whisper"):
        get_family(str(tmp_path))


def test_answers_with_a_context_equal_transformers(model, reference, features):
    """With a named and a detected language, with beams, in batches of several contexts, and in long recordings."""
    from transformers import WhisperProcessor

    contexts = ("환자, 혈압", "Tylenol")
    prompt_ids = WhisperProcessor.from_pretrained(WHISPER).get_prompt_ids
    rows = [with_context(row, contexts[number % 2], FRONT_END) for number, row in enumerate(short(features))]
    prompts = {row.id: torch.from_numpy(prompt_ids(row.prompt)) for row in rows}
    expected = [reference_text(reference, row, prompt_ids=prompts[row.id]) for row in rows]
    answers = completions(model, rows)
    assert [f" {answer.text}" for answer in answers] == [f" {text}" for text in expected]
    spoken = [row["language"] for row in (*read_rows(manifest("base.val"))[:6], *read_rows(manifest("asr.val"))[:3])]
    assert [answer.language for answer in answers] == spoken
    [beams] = completions(model, rows[1:2], num_beams=3)
    assert beams.text == reference_text(reference, rows[1], prompt_ids=prompts[rows[1].id], num_beams=3)
    recording = features.row(len(features) - 1)
    recordings = [with_context(recording, context, FRONT_END) for context in (*contexts, "")]
    texts = [answer.text for answer in completions(model, recordings)]
    for text, context in zip(texts, contexts, strict=False):
        options = {"prompt_ids": torch.from_numpy(prompt_ids(context)), "return_timestamps": True}
        assert text == reference_text(reference, recording, **options)
    assert texts[2] == reference_text(reference, recording, return_timestamps=True)
    assert [with_context(row, "", FRONT_END).prompt_ids.tolist() for row in rows] == [
        row.prompt_ids.tolist() for row in short(features)
    ]


def test_rows_with_times_and_a_context(model, reference, features, make_features, tmp_path):
    row = read_rows(manifest("base.val"))[0]
    row |= {"segments": [{"start": 0.0, "end": 1.0, "text": row["transcript"]}], "context": ["환자"]}
    timed = Features(make_features(write_rows(tmp_path / "t.jsonl", [row]), model_id=WHISPER, folder=tmp_path)).row(0)
    PATHS[timed.id] = row["audio_path"]
    assert timed.prompt == "환자" and FRONT_END.show(timed.prompt_ids).startswith("<|startofprev|> 환자<|startof")
    assert FRONT_END.no_times_id not in with_context(timed, "", FRONT_END).prompt_ids
    from transformers import WhisperProcessor

    prompt_ids = torch.from_numpy(WhisperProcessor.from_pretrained(WHISPER).get_prompt_ids("환자"))
    [answer] = completions(model, [timed])
    assert answer.text == reference_text(reference, timed, return_timestamps=True, prompt_ids=prompt_ids)


def test_recordings_of_different_lengths_go_together(model, features, make_features, tmp_path):
    """Each has the text that it has alone, with a named or a detected language, beside clips of one window."""
    clips = {row["audio_path"]: row["language"] for row in read_rows(manifest("base.val"))}
    by_language = {code: [path for path, each in clips.items() if each == code] for code in set(clips.values())}
    recordings, kinds = [], [(6, "en", True), (21, "en", False), (13, "ko", True), (9, "ko", False)]
    for number, (seconds, code, is_named) in enumerate(kinds):
        path, speech = tmp_path / f"{number}.wav", np.concatenate([decode(each, 16_000) for each in by_language[code]])
        soundfile.write(path, np.resize(speech, seconds * 16_000), 16_000)
        recordings.append({"audio_path": str(path), "transcript": "x", **({"language": code} if is_named else {})})
    manifest_path = write_rows(tmp_path / "long.jsonl", recordings)
    stored = Features(make_features(manifest_path, model_id=WHISPER))
    rows = [stored.row(number) for number in range(len(recordings))]
    assert len({row.num_windows for row in rows}) > 2 and min(row.num_windows for row in rows) > 1
    alone = [completions(model, [row])[0] for row in rows]
    together = completions(model, [*short(features)[:2], *rows])[2:]
    assert [(answer.text, answer.language) for answer in together] == [(each.text, each.language) for each in alone]
    assert all(answer.text for answer in together)
