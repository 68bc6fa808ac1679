"""Predictions for released models on six GPUs, beside what one computes by hand from their published sizes.

LoRA of rank 16 (on q_proj and v_proj for Whisper and SALMONN), --bf16, --grad_ckpt, two clips of 30 s with 20 tokens of
text and 100 tokens of answer.
"""

from dataclasses import dataclass

import memory_table
import pytest
import torch

from voxray.preflight.budget import GPUS, worker_budget
from voxray.preflight.memory import MemoryModel, Training
from voxray.preflight.shapes import ComputeConfig, PackShape

RANK, ROWS, ANSWER_TOKENS = 16, 2, 100
SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model or decoder, from its published configuration."""

    layers: int
    width: int
    attention: int
    keys: int
    mlp: int
    vocabulary: int
    tokens: int
    """Of a row: audio, text and answer."""
    lora_inputs_and_outputs: int
    """Of all adapted Linear layers of one layer."""
    factors: int = 3
    """Outputs of the MLP's first layers that are saved: the gate before and after its activation, and its factor."""

    @property
    def lora_weights(self) -> int:
        return self.layers * RANK * self.lora_inputs_and_outputs

    def activation_bytes(self) -> float:
        """The inputs of all layers in 16 bits, and of one layer what LoRA, norms, attention and MLP save."""
        positions = ROWS * self.tokens
        inputs = 2 * positions * self.layers * self.width
        norms = 2 * 4 * positions * self.width
        branches = 5 * positions * self.lora_inputs_and_outputs / 2  # after dropout in float32, and a mask of a byte
        attention = 2 * positions * (2 * self.attention + 2 * self.keys)
        return inputs + norms + branches + attention + 2 * positions * self.factors * self.mlp

    @property
    def logits_bytes(self) -> float:
        return 3 * 4 * ROWS * ANSWER_TOKENS * self.vocabulary


def every_layer(width: int, attention: int, keys: int, mlp: int) -> int:
    """Inputs and outputs of q, k, v, o, gate, up and down."""
    return 2 * (width + attention) + 2 * (width + keys) + 3 * (width + mlp)


MINI = Decoder(30, 3072, 4096, 1024, 8192, 131_072, 495, every_layer(3072, 4096, 1024, 8192))
SMALL = Decoder(40, 5120, 4096, 1024, 32_768, 131_072, 495, every_layer(5120, 4096, 1024, 32_768))
# cross-attention has q_proj and v_proj, too; the encoder is counted as further layers of 1,500 positions
WHISPER = Decoder(32, 1280, 1280, 1280, 5120, 51_866, 120, 2 * 2 * 2 * 1280, factors=1)
WHISPER_ENCODER = Decoder(32, 1280, 1280, 1280, 5120, 0, 1500, 2 * 2 * 1280, factors=1)
SALMONN_7B = Decoder(32, 4096, 4096, 4096, 11_008, 32_000, 208, 2 * 2 * 4096)
SALMONN_13B = Decoder(40, 5120, 5120, 5120, 13_824, 32_000, 208, 2 * 2 * 5120)
QFORMER_WEIGHTS = 2 * 11.4e6
"""Two layers: 4 x 768 x 768 twice, of which keys and values of cross-attention read 2,048, and an MLP of 3,072."""


def state_bytes(num_trained: float) -> float:
    """Trained weights and AdamW's two moments in float32."""
    return num_trained * 3 * 4


def by_hand(name: str, bits: int) -> float:
    """Peak in bytes: weights, trained weights with their state, activations, and logits if they are larger.

    The peak is at the loss or in the backward pass of the last layer, before there are gradients of many weights.
    """
    four = 0.516  # bytes per weight: half a byte, and the scales
    if name == "whisper-large-v3":
        embeddings = 1280 * (51_866 + 448 + 1500)
        weights = 2 * embeddings + (2 if bits == 16 else four) * (1_543.5e6 - embeddings)
        trained = WHISPER.lora_weights + WHISPER_ENCODER.lora_weights
        working = 2 * 5 * ROWS * 1500 * 1280  # gradients of the MLP's inner layer, and of the residual stream
        return weights + state_bytes(trained) + WHISPER_ENCODER.activation_bytes() + working
    if name.startswith("SALMONN"):
        llm, sizes = (6.738e9, SALMONN_7B) if name.endswith("7B") else (13.016e9, SALMONN_13B)
        encoders = 2 * (637e6 + 90e6)  # Whisper large-v2's and BEATs'
        trained = sizes.lora_weights + QFORMER_WEIGHTS + 768 * sizes.width
    else:
        llm, sizes = (4.0141e9, MINI) if "Mini" in name else (23.572e9, SMALL)
        encoders = 2 * 637e6 + 2 * 4 * 1280 * sizes.width + 2 * sizes.width**2
        trained = sizes.lora_weights
    unquantized = 2 * sizes.vocabulary * sizes.width
    weights = 2 * llm if bits == 16 else four * (llm - unquantized) + 2 * unquantized
    dequantized = 0 if bits == 16 else 2 * sizes.width * sizes.mlp
    working = 2 * ROWS * sizes.tokens * (2 * sizes.mlp + 2 * sizes.width)
    at_work = max(sizes.activation_bytes() + working + dequantized, sizes.logits_bytes + 2e8)
    return weights + encoders + state_bytes(trained) + at_work


CASES = [
    ("Voxtral-Mini-3B", 16, "t4 l4 a100-40 a100-80 h100 h200"),
    ("Voxtral-Mini-3B", 4, "t4 l4 a100-40 a100-80 h100 h200"),
    ("Voxtral-Small-24B", 16, "a100-80 h100 h200"),
    ("Voxtral-Small-24B", 4, "l4 a100-40 a100-80 h100 h200"),
    ("whisper-large-v3", 16, "t4 l4 a100-40 a100-80 h100 h200"),
    ("SALMONN-7B", 16, "l4 a100-40 a100-80 h100 h200"),
    ("SALMONN-7B", 4, "t4 l4 a100-40 a100-80 h100 h200"),
    ("SALMONN-13B", 16, "a100-40 a100-80 h100 h200"),
    ("SALMONN-13B", 4, "t4 l4 a100-40 a100-80 h100 h200"),
]


@pytest.mark.parametrize(
    ("name", "bits", "fitting"), [pytest.param(*case, marks=SLOW if "24B" in case[0] else ()) for case in CASES]
)
def test_released_models_on_six_gpus(name: str, bits: int, fitting: str) -> None:
    """Within 5 % of the hand's figure, and the same GPUs suffice."""
    model, family = memory_table.build(name)
    front_end, audio_tokens, windows = memory_table.clip_sizes(name, model.get_base_model().config)
    quantize = "none" if bits == 16 else "4bit"
    computing = ComputeConfig(torch.bfloat16, on_gpu=True, grad_ckpt=True, quantize=quantize)
    length = audio_tokens + 20 + ANSWER_TOKENS
    shape = PackShape(ROWS, ROWS * length, length, ROWS * windows, ROWS * ANSWER_TOKENS)
    predicted = MemoryModel(model, family, front_end, computing, Training()).need(shape).peak_bytes
    expected = by_hand(name, bits)
    assert predicted == pytest.approx(expected, rel=0.05)
    for figure in (predicted, expected):
        suffice = {gpu for gpu in GPUS if figure <= worker_budget(1, 0, gpu).num_bytes}
        assert suffice == set(fitting.split())
