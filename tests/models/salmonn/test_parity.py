"""Our SALMONN against the outputs of the reference implementation for the same files."""

import pytest
import torch

from voxray.models import salmonn
from voxray.models.salmonn.beats import beats_fbank, relative_buckets

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("one_thread")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_every_step_of_beats(files, clips, expected):
    beats = salmonn.load_beats(files["beats"], classes=True)
    wave_1N, outputs = clips["w5"][1][None], {}
    steps = {
        "patch": beats.patch_embedding,
        "patch_ln": beats.layer_norm,
        "pos_conv": beats.encoder.pos_conv,
        "enc_in": beats.encoder.layer_norm,
        **{f"layer{number}": layer for number, layer in enumerate(beats.encoder.layers)},
    }
    for name, module in steps.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    states = beats(wave_1N)
    close(beats_fbank(wave_1N), expected["beats.fbank_f32"])
    for name in steps:
        close(outputs[name], expected[f"beats.h.{name}"])
    close(states, expected["beats.out_w5_f32"])
    close(beats.encoder.layers[0].self_attn.position_bias(31 * 8), expected["beats.pos_bias_31x8"])
    close(beats.probabilities(states), expected["beats.probs_w5"])


@torch.no_grad()
def test_beats_of_a_padded_batch(model, batch_of, expected):
    _, wave, padding = batch_of("w5", "w3")
    close(model.beats(wave, padding), expected["beats.out_w5_w3"])
    assert torch.equal(model.beats.token_padding(padding), expected["beats.padmask_w5_w3"])


@torch.no_grad()
def test_embeddings_of_a_clip(model, batch_of, expected):
    outputs = {}
    hook = model.speech_Qformer.register_forward_hook(lambda module, inputs, output: outputs.update(output))
    embeds = model.audio_embeds(*batch_of("w5"))
    hook.remove()
    close(embeds, expected["enc.w5.embeds"])
    close(outputs["last_hidden_state"], expected["enc.w5.q_out"])
    assert embeds.shape[:2] == expected["enc.w5.atts"].shape == (1, model.config.positions_per_clip)


@torch.no_grad()
def test_embeddings_of_a_padded_batch(model, batch_of, expected):
    embeds = model.audio_embeds(*batch_of("w10", "w3"))
    close(embeds, expected["enc.w10_w3.embeds"])
    assert embeds.shape[:2] == expected["enc.w10_w3.atts"].shape


@torch.no_grad()
def test_loss(model, rows_of, expected):
    batch = rows_of(["w5"], ["asr"], [0])
    assert torch.equal(batch["labels"], expected["loss.asr.labels"])
    assert torch.equal(batch["attention_mask"], expected["loss.asr.attention_mask"])
    close(model(**batch).loss, expected["loss.asr"])


@torch.no_grad()
def test_losses_of_batches(model, rows_of):
    """Losses of the reference. The last one is its model's in our layout, with all padding at the end."""
    equal = rows_of(["w10", "w3"], ["asr", "asr"], [0, 1])
    close(model(**equal).loss, torch.tensor(7.821014))
    mixed = (["w10", "w3"], ["asr", "audiocaption"], [0, 1])
    close(model(**rows_of(*mixed, reference_layout=True)).loss, torch.tensor(8.0209))
    close(model(**rows_of(*mixed)).loss, torch.tensor(8.1429))


@torch.no_grad()
def test_rows_with_different_prompts_do_not_influence_each_other(model, rows_of):
    """In the reference's layout the answer to the shorter prompt follows padding, which changes its logits."""
    together = model(**rows_of(["w3", "w3"], ["asr", "audiocaption"], [0, 1])).logits[1]
    alone = model(**rows_of(["w3"], ["audiocaption"], [1])).logits[0]
    close(together[: len(alone)], alone)
    padded = model(**rows_of(["w3", "w3"], ["asr", "audiocaption"], [0, 1], reference_layout=True))
    assert (padded.logits[1][-5:] - alone[-5:]).abs().max() > 0.1


def test_relative_buckets_equal_t5s():
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(distances, bidirectional=True, num_buckets=320, max_distance=800)
    assert torch.equal(relative_buckets(distances, 320, 800), expected)
