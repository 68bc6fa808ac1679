"""BEATs: an encoder of sound of any kind, which hears 16 x 16 patches of a Kaldi log-mel spectrogram.

Module names are those of the published files. Only what a frozen encoder needs is here: no dropout (all published
files have 0), no dropping of layers.

Shape letters: B rows, N samples, T frames, M mel bins, K tokens (8 mel blocks of each 160 ms, one after the other),
D width, H heads.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from voxray.audio.fbank import FLOOR, FRAME_SAMPLES, HOP_SAMPLES, NUM_MEL_BINS, kaldi_fbank, num_fbank_frames
from voxray.models.salmonn.config import BeatsConfig

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582  # of AudioSet, as BEATs was trained; the divisor is twice the deviation
SILENCE = (math.log(FLOOR) - FBANK_MEAN) / (2 * FBANK_STD)  # every bin of a frame of zeros


def beats_fbank(waveform_BN: torch.Tensor) -> torch.Tensor:
    """BEATs' input, shape (B, T, 128), float32."""
    return (kaldi_fbank(waveform_BN) - FBANK_MEAN) / (2 * FBANK_STD)


class Beats(nn.Module):
    """Samples in, tokens out."""

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
        """Encode clips padded with zeros.

        Args:
            waveform_BN: Samples at 16 kHz, of at least 0.175 s.
            padding_mask_BN: True where a clip is padded.
        Returns:
            states_BKD; those of tokens that are padding alone have values, but no other token sees them.
        Raises:
            ValueError: The samples make no token.
        """
        self.check_length(waveform_BN.shape[1])
        padding_BK = None if padding_mask_BN is None else self.token_padding(padding_mask_BN.bool())
        return self.encode(beats_fbank(waveform_BN), padding_BK)

    def encode(self, fbank_BTM: torch.Tensor, padding_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Encode what ``beats_fbank`` gives.

        Args:
            padding_BK: True for tokens that no other may see.
        Returns:
            states_BKD.
        """
        patches_BDTM = self.patch_embedding(fbank_BTM[:, None].to(self.patch_embedding.weight.dtype))
        states_BKD = self.layer_norm(patches_BDTM.flatten(2).transpose(1, 2))
        return self.encoder(self.post_extract_proj(states_BKD), padding_BK)

    def num_tokens(self, num_samples: int) -> int:
        """Tokens of a clip: 30 s are 2,998 // 16 x 128 // 16 = 187 x 8 = 1,496."""
        patch = self.config.input_patch_size
        return num_fbank_frames(num_samples) // patch * (NUM_MEL_BINS // patch)

    def check_length(self, num_samples: int) -> None:
        """Refuse a batch of which no clip makes a token."""
        if not self.num_tokens(num_samples):
            raise ValueError(f"{num_samples} samples are too few for BEATs; pad them with zeros to 0.175 s or more")

    def token_padding(self, padding_mask_BN: torch.Tensor) -> torch.Tensor:
        """Tokens that are padding alone, in the reference's count.

        It goes by shares of the whole: token k of K is padding if the samples from k/K to (k+1)/K of the length are,
        although eight tokens in a row share the same 160 ms.

        Returns:
            bool, shape (B, K).
        """
        num_samples = padding_mask_BN.shape[1]
        frames_BT = _whole_shares(padding_mask_BN, num_fbank_frames(num_samples))
        return _whole_shares(frames_BT, self.num_tokens(num_samples))

    def probabilities(self, states_BKD: torch.Tensor, padding_BK: torch.Tensor | None = None) -> torch.Tensor:
        """How likely each sound is that a fine-tuned BEATs knows, shape (B, predictor_class)."""
        scores_BKC = self.predictor(states_BKD)
        if padding_BK is None:
            return scores_BKC.mean(1).sigmoid()
        kept_BK1 = ~padding_BK[..., None]
        return ((scores_BKC * kept_BK1).sum(1) / kept_BK1.sum(1)).sigmoid()


def _whole_shares(mask_BN: torch.Tensor, num_shares: int) -> torch.Tensor:
    """Which of so many equal shares are True throughout; what is left over at the end does not count."""
    each = mask_BN.shape[1] // num_shares
    return mask_BN[:, : each * num_shares].view(len(mask_BN), num_shares, each).all(-1)


def beyond(num_samples_B: torch.Tensor, num_tokens: int, config: BeatsConfig) -> torch.Tensor:
    """Tokens that a clip by itself would not have: it does not reach the last sample of their 16 frames.

    Returns:
        bool, shape (B, num_tokens).
    """
    patch = config.input_patch_size
    block_K = torch.arange(num_tokens, device=num_samples_B.device) // (NUM_MEL_BINS // patch)
    needed_K = FRAME_SAMPLES + HOP_SAMPLES * (patch * (block_K + 1) - 1)
    return num_samples_B[:, None] < needed_K


class BeatsEncoder(nn.Module):
    """Convolution over positions, then layers that share one table of relative positions."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(PositionConv(config))
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)
        self.layers = nn.ModuleList(BeatsLayer(config, first=not n) for n in range(config.encoder_layers))

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
    """A grouped convolution along the tokens, with the weight stored as direction and length of every tap."""

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
            states_BDK = states_BDK[..., :-1]  # an even number of taps gives one token too many
        return F.gelu(states_BDK)


class BeatsLayer(nn.Module):
    """Attention and feed-forward; what goes past them is scaled up (DeepNorm), and there is no norm at the end."""

    def __init__(self, config: BeatsConfig, *, first: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25
        self.self_attn = BeatsAttention(config, has_table=first)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self, states_BKD: torch.Tensor, bias_HKK: torch.Tensor, padding_BK: torch.Tensor | None
    ) -> torch.Tensor:
        heard_BKD = self.self_attn(states_BKD, bias_HKK, padding_BK)
        states_BKD = self.self_attn_layer_norm(states_BKD * self.alpha + heard_BKD)
        return self.final_layer_norm(states_BKD * self.alpha + self.fc2(F.gelu(self.fc1(states_BKD))))


class BeatsAttention(nn.Module):
    """Attention with a bias for relative positions, which every query scales by a gate of its own.

    WavLM's in transformers is alike, but its gates look at the states before the projection.
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
        """What a query at one place adds for a key at another one, shape (H, num_tokens, num_tokens)."""
        place_K = torch.arange(num_tokens, device=self.grep_a.device)
        distances = torch.arange(1 - num_tokens, num_tokens, device=self.grep_a.device)  # key less query
        buckets = relative_buckets(distances, self.num_buckets, self.max_distance)
        rows_KK = place_K[None] - place_K[:, None] + num_tokens - 1
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
            # not minus infinity: a row that is padding throughout must give numbers too
            bias_BHKK = bias_BHKK.masked_fill(padding_BK[:, None, None], torch.finfo(bias_BHKK.dtype).min)
        heard_BHKD = F.scaled_dot_product_attention(query_BHKD, key_BHKD, value_BHKD, attn_mask=bias_BHKK)
        return self.out_proj(heard_BHKD.transpose(1, 2).flatten(2))


def relative_buckets(distances: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """Row of the table for each distance: half of them for keys after the query; near ones one by one, far ones in
    logarithmic steps, and one for all from ``max_distance`` on.

    Source: T5's bidirectional buckets (a test holds the two against each other).
    """
    half = num_buckets // 2
    single = half // 2
    steps = distances.abs()
    share = torch.log(steps.clamp(min=1).float() / single) / math.log(max_distance / single)
    far = (single + (share * (half - single)).long()).clamp(max=half - 1)
    return torch.where(steps < single, steps, far) + (distances > 0) * half
