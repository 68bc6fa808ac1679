"""BEATs: an encoder of general audio, over 16 x 16 patches of a Kaldi log-mel spectrogram.

Module names are those of the published files. This is the forward pass of a frozen encoder: no dropout (0 in all
published files) and no layer drop.

Shape letters: B clips, N samples, T frames of 10 ms, M mel bins, K tokens (one per patch; each 160 ms has 8, from low
to high mel bins), D width, H heads, C classes.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from voxray.audio.fbank import FLOOR, FRAME_SAMPLES, HOP_SAMPLES, NUM_MEL_BINS, kaldi_fbank, num_fbank_frames
from voxray.models.salmonn.config import BeatsConfig

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582  # of AudioSet, from BEATs' training, which divides by twice the deviation
SILENCE = (math.log(FLOOR) - FBANK_MEAN) / (2 * FBANK_STD)  # value of every bin in a frame of zeros


def beats_fbank(waveform_BN: torch.Tensor) -> torch.Tensor:
    """BEATs' input fbank_BTM: normalized Kaldi filter bank, 128 bins, float32."""
    return (kaldi_fbank(waveform_BN) - FBANK_MEAN) / (2 * FBANK_STD)


class Beats(nn.Module):
    """The encoder: samples -> one vector per patch."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.input_patch_size, config.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width)
        self.encoder = BeatsEncoder(config)
        if config.predictor_class:
            self.predictor = nn.Linear(width, config.predictor_class)

    def forward(self, waveform_BN: torch.Tensor, padding_mask_BN: torch.Tensor | None = None) -> torch.Tensor:
        """Encode clips that are padded with zeros.

        Args:
            waveform_BN: Samples at 16 kHz, at least 0.175 s.
            padding_mask_BN: True where a clip is padded.
        Returns:
            states_BKD. States of padding tokens have values, but no other token attends to them.
        Raises:
            ValueError: The samples are too few for a token.
        """
        self.check_length(waveform_BN.shape[1])
        padding_BK = None if padding_mask_BN is None else self.token_padding(padding_mask_BN.bool())
        return self.encode(beats_fbank(waveform_BN), padding_BK)

    def encode(self, fbank_BTM: torch.Tensor, padding_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Encode the output of ``beats_fbank``.

        Args:
            padding_BK: True for tokens that no other token may attend to.
        Returns:
            states_BKD.
        """
        patches_BDTM = self.patch_embedding(fbank_BTM[:, None].to(self.patch_embedding.weight.dtype))
        states_BKD = self.layer_norm(patches_BDTM.flatten(2).transpose(1, 2))
        return self.encoder(self.post_extract_proj(states_BKD), padding_BK)

    def num_tokens(self, num_samples: int) -> int:
        """Number of tokens of a clip: for 30 s 2,998 // 16 x 128 // 16 = 187 x 8 = 1,496."""
        patch = self.config.input_patch_size
        return num_fbank_frames(num_samples) // patch * (NUM_MEL_BINS // patch)

    def check_length(self, num_samples: int) -> None:
        """Raise ValueError if the longest clip of a batch is too short for a token."""
        if not self.num_tokens(num_samples):
            raise ValueError(f"{num_samples} samples are too few for BEATs; pad them with zeros to 0.175 s or more")

    def token_padding(self, padding_mask_BN: torch.Tensor) -> torch.Tensor:
        """Padding tokens as the reference determines them.

        It assigns samples in proportion: token k of K is padding if all samples from k/K to (k+1)/K of the length are,
        although eight tokens in a row share the same 160 ms.

        Returns:
            bool, shape (B, K).
        """
        num_samples = padding_mask_BN.shape[1]
        frames_BT = _all_in_chunks(padding_mask_BN, num_fbank_frames(num_samples))
        return _all_in_chunks(frames_BT, self.num_tokens(num_samples))

    def probabilities(self, states_BKD: torch.Tensor, padding_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Class probabilities of a fine-tuned BEATs, probabilities_BC."""
        scores_BKC = self.predictor(states_BKD)
        if padding_BK is None:
            return scores_BKC.mean(1).sigmoid()
        is_valid_BK1 = ~padding_BK[..., None]
        return ((scores_BKC * is_valid_BK1).sum(1) / is_valid_BK1.sum(1)).sigmoid()


def _all_in_chunks(mask_BN: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Whether all values are True in each of ``num_chunks`` equal chunks; the remainder at the end is ignored."""
    size = mask_BN.shape[1] // num_chunks
    return mask_BN[:, : size * num_chunks].view(len(mask_BN), num_chunks, size).all(-1)


def past_end_mask(num_samples_B: torch.Tensor, num_tokens: int, config: BeatsConfig) -> torch.Tensor:
    """Tokens that a clip would not have without padding: it ends before the last sample of their 16 frames.

    Returns:
        bool, shape (B, num_tokens).
    """
    patch = config.input_patch_size
    block_K = torch.arange(num_tokens, device=num_samples_B.device) // (NUM_MEL_BINS // patch)
    end_K = FRAME_SAMPLES + HOP_SAMPLES * (patch * (block_K + 1) - 1)
    return num_samples_B[:, None] < end_K


class BeatsEncoder(nn.Module):
    """Positional convolution, then layers that share one table of relative positions."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(PositionConv(config))
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)
        self.layers = nn.ModuleList(BeatsLayer(config, has_table=not index) for index in range(config.encoder_layers))

    def forward(self, states_BKD: torch.Tensor, padding_BK: torch.Tensor | None) -> torch.Tensor:
        if padding_BK is not None:
            states_BKD = states_BKD.masked_fill(padding_BK[..., None], 0)
        states_BKD = self.layer_norm(states_BKD + self.pos_conv(states_BKD.transpose(1, 2)).transpose(1, 2))
        first: Any = self.layers[0]
        bias_HKK = first.self_attn.position_bias(states_BKD.shape[1])
        for layer in self.layers:
            states_BKD = layer(states_BKD, bias_HKK, padding_BK)
        return states_BKD


class PositionConv(nn.Module):
    """A grouped convolution along the tokens, whose weight is stored as direction and norm of every tap."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, taps, self.groups = config.encoder_embed_dim, config.conv_pos, config.conv_pos_groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, taps))
        self.weight_v = nn.Parameter(torch.randn(width, width // self.groups, taps))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states_BDK: torch.Tensor) -> torch.Tensor:
        taps = self.weight_v.shape[2]
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        states_BDK = F.conv1d(states_BDK, weight, self.bias, padding=taps // 2, groups=self.groups)
        if taps % 2 == 0:
            states_BDK = states_BDK[..., :-1]  # with an even number of taps the output has one token too many
        return F.gelu(states_BDK)


class BeatsLayer(nn.Module):
    """Attention and feed-forward with post-norm; residual connections are scaled up by ``alpha`` (DeepNorm)."""

    def __init__(self, config: BeatsConfig, *, has_table: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25
        self.self_attn = BeatsAttention(config, has_table=has_table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self, states_BKD: torch.Tensor, bias_HKK: torch.Tensor, padding_BK: torch.Tensor | None
    ) -> torch.Tensor:
        attended_BKD = self.self_attn(states_BKD, bias_HKK, padding_BK)
        states_BKD = self.self_attn_layer_norm(states_BKD * self.alpha + attended_BKD)
        return self.final_layer_norm(states_BKD * self.alpha + self.fc2(F.gelu(self.fc1(states_BKD))))


class BeatsAttention(nn.Module):
    """Attention with a relative position bias that a gate computed from each query scales.

    WavLM's attention in transformers is similar, but computes its gates from the states before the projection.
    """

    def __init__(self, config: BeatsConfig, *, has_table: bool) -> None:
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        if has_table:
            self.relative_attention_bias: Any = nn.Embedding(self.num_buckets, self.heads)

    def position_bias(self, num_tokens: int) -> torch.Tensor:
        """Bias of every query (first K) for every key, bias_HKK."""
        index_K = torch.arange(num_tokens, device=self.grep_a.device)
        distances = torch.arange(1 - num_tokens, num_tokens, device=self.grep_a.device)  # key minus query
        buckets = relative_buckets(distances, self.num_buckets, self.max_distance)
        rows_KK = index_K[None] - index_K[:, None] + num_tokens - 1
        return self.relative_attention_bias(buckets).t()[:, rows_KK]

    def forward(
        self, states_BKD: torch.Tensor, bias_HKK: torch.Tensor, padding_BK: torch.Tensor | None
    ) -> torch.Tensor:
        shape = (*states_BKD.shape[:2], self.heads, -1)
        query_BHKD, key_BHKD, value_BHKD = (
            project(states_BKD).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates_BHK2 = self.grep_linear(query_BHKD).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        gate_BHK1 = gates_BHK2[..., :1] * (gates_BHK2[..., 1:] * self.grep_a - 1) + 2
        bias_BHKK = (gate_BHK1 * bias_HKK).to(query_BHKD.dtype)
        if padding_BK is not None:
            # not minus infinity, which would give NaN for a clip that is all padding
            bias_BHKK = bias_BHKK.masked_fill(padding_BK[:, None, None], torch.finfo(bias_BHKK.dtype).min)
        output_BHKD = F.scaled_dot_product_attention(query_BHKD, key_BHKD, value_BHKD, attn_mask=bias_BHKK)
        return self.out_proj(output_BHKD.transpose(1, 2).flatten(2))


def relative_buckets(distances: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """Row of the bias table for each distance (key minus query).

    Half of the rows are for keys after the query. In each half, near distances have a row each, far ones share rows in
    logarithmic steps, and all from ``max_distance`` on share the last row.

    Source: T5's bidirectional buckets (a test compares the two).
    """
    half = num_buckets // 2
    num_exact = half // 2
    lengths = distances.abs()
    fraction = torch.log(lengths.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (fraction * (half - num_exact)).long()).clamp(max=half - 1)
    return torch.where(lengths < num_exact, lengths, far) + (distances > 0) * half
