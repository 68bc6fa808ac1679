"""Deviations from the reference where its behaviour is undesirable.

In other files: pads in the middle of a batch and batches of one prompt (``test_parity``); the encoders' eval mode, the
[PAD] row and SentencePiece (``test_checkpoint``); the filter bank under autocast (``tests/audio/test_fbank.py``);
recordings over 30 s (``test_front_end``); a second clip (``test_json_formats``); files that cannot
be read (``tests/jobs/test_salmonn_evaluation.py``); what is frozen in training, and answers to a batch of mixed prompts
token by token (``tests/jobs/test_salmonn.py``).
"""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 12


@pytest.fixture
def alone(model):
    """The model with embeddings that do not depend on the other clips of a batch."""
    model.config.alone = True
    yield model
    model.config.alone = False


def prompts(batch: dict, expected: dict) -> list[dict]:
    """Rows of a training batch -> their prompts, one batch each."""
    rows = []
    for number in range(len(batch["input_ids"])):
        length = int((batch["labels"][number] != -100).int().argmax())
        row = {name: tensor[number : number + 1] for name, tensor in batch.items() if name != "labels"}
        row["input_ids"], row["attention_mask"] = (row[key][:, :length] for key in ("input_ids", "attention_mask"))
        num_samples = int(row["waveform_mask"].sum())
        rows.append({**row, "waveform": row["waveform"][:, :num_samples], "waveform_mask": None})
    return rows


def padded_left(batch: dict, rows: list[dict], pad: int) -> dict:
    """The same prompts as one batch."""
    size = max(row["input_ids"].shape[1] for row in rows)
    joined = {key: batch[key] for key in ("input_features", "waveform", "waveform_mask")}
    for key, fill in (("input_ids", pad), ("attention_mask", 0)):
        padded = [torch.nn.functional.pad(row[key], (size - row[key].shape[1], 0), value=fill) for row in rows]
        joined[key] = torch.cat(padded)
    return joined


@torch.no_grad()
def test_each_row_of_a_batch_ends_independently(alone, rows_of, expected):
    """The reference stops the whole batch when its first row ends, and pads in the middle of mixed prompts."""
    batch = rows_of(["w10", "w3"], ["asr", "audiocaption"], [0, 1])
    rows = prompts(batch, expected)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": expected["tok.pad"]}
    singles = [alone.generate(**row, **options, eos_token_id=None)[0] for row in rows]
    assert [len(ids) for ids in singles] == [NEW, NEW]  # new ids alone, without a leading bos
    first, second = (ids.tolist() for ids in singles)
    end = next(token for token in first if token not in second)
    together = alone.generate(**padded_left(batch, rows, expected["tok.pad"]), **options, eos_token_id=end)
    stop = first.index(end) + 1
    assert together[0].tolist() == first[:stop] + [expected["tok.pad"]] * (NEW - stop)
    assert together[1].tolist() == second


@torch.no_grad()
def test_greedy_answers_are_the_most_likely_tokens(model, rows_of, expected):
    batch = rows_of(["w5"], ["asr"], [0])
    row = prompts(batch, expected)[0]
    ids = model.generate(**row, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=420)[0]
    for number in range(4):
        row["input_ids"] = torch.cat([row["input_ids"], ids[None, number : number + 1]], dim=1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    logits = model(**row).logits[0, -5:-1]
    assert torch.equal(logits.argmax(-1), ids)


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_batch(alone, batch_of):
    """In the reference they include BEATs' outputs for the padding up to the longest clip of the batch."""
    mel, wave, padding = batch_of("w10", "w3")
    together = alone.audio_embeds(mel, wave, padding)
    for number, name in enumerate(("w10", "w3")):
        torch.testing.assert_close(together[number], alone.audio_embeds(*batch_of(name))[0], rtol=0, atol=1e-5)
    alone.config.alone = False
    torch.testing.assert_close(together[0], alone.audio_embeds(mel, wave, padding)[0], rtol=0, atol=1e-5)
    assert (together[1] - alone.audio_embeds(mel, wave, padding)[1]).abs().max() > 1


@torch.no_grad()
def test_a_clip_too_short_for_beats_has_finite_embeddings(alone, batch_of):
    mel, wave, padding = batch_of("w3", "w3")
    padding[1, 2_000:] = True
    embeds = alone.audio_embeds(mel, wave, padding)
    assert embeds.isfinite().all()
    torch.testing.assert_close(embeds[0], alone.audio_embeds(*batch_of("w3"))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_samples", "fits"), [(100, False), (2_799, False), (2_800, True)])
@torch.no_grad()
def test_the_longest_clip_must_have_a_beats_token(model, batch_of, num_samples, fits):
    mel, wave, _ = batch_of("w3")
    if fits:
        assert model.audio_embeds(mel, wave[:, :num_samples]).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"{num_samples} samples are too few"):
        model.audio_embeds(mel, wave[:, :num_samples])


@torch.no_grad()
def test_samples_in_float64_are_rounded_to_float32(model, batch_of):
    """The reference computes BEATs' features in the dtype of the samples, which changes them by 5e-5."""
    mel, wave, padding = batch_of("w3")
    assert torch.equal(model.audio_embeds(mel, wave.double(), padding), model.audio_embeds(mel, wave, padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_gives_finite_values(model, batch_of, dtype):
    """In the reference float16 gives NaN if samples are float32."""
    mel, wave, padding = batch_of("w5", "w3")
    with torch.autocast("cpu", dtype=dtype):
        embeds = model.audio_embeds(mel, wave, padding)
    torch.testing.assert_close(embeds.float(), model.audio_embeds(mel, wave, padding), rtol=0, atol=0.3)


@pytest.mark.parametrize(("change", "num_tokens"), [(-1, 87), (1, 89)])
def test_the_number_of_audio_tokens_must_match_the_positions(model, rows_of, change, num_tokens):
    batch = rows_of(["w3"], ["asr"], [0])
    ids = batch["input_ids"][0].tolist()
    ids[10 if change < 0 else 0] = 300 if change < 0 else model.config.audio_token_id
    batch["input_ids"] = torch.tensor([ids])
    with pytest.raises(ValueError, match=f"{num_tokens} audio tokens for 1 clips, which have 88 positions"):
        model(**batch)


@torch.no_grad()
def test_text_rows_need_no_audio(model, expected):
    ids = torch.tensor([[expected["tok.bos"], *expected["tok.text"][0]]])
    torch.testing.assert_close(model(ids).logits, model.llama_model(input_ids=ids).logits)
