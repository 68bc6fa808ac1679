"""An independent SALMONN: the official files' tensors, plain torch, transformers' Whisper and LLaMA, no code of voxray.

It is slow and processes one row at a time, without padding where the reference needs none.

Shape letters: B clips, N samples, T frames of 10 ms, K tokens, D width, P LLM positions, L tokens.
"""

from typing import Any

import torch
from torch.nn import functional as F
from torchaudio.compliance import kaldi
from transformers import LlamaForCausalLM, WhisperModel
from transformers.models.t5.modeling_t5 import T5Attention

LLM = "llama_model.base_model.model."
QFORMER = "speech_Qformer.bert."
LORA_SCALE = 32 / 8
WINDOW = 17  # frames
HEADS = 4  # of every attention here


def normed(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


class Oracle:
    """SALMONN after its paper and files, for the reference's small weights.

    Attributes:
        trained: Tensors of the checkpoint that training changes, by official name; they require gradients.
    """

    def __init__(self, files: dict[str, Any]) -> None:
        self.whisper = WhisperModel.from_pretrained(files["whisper"]).encoder.eval().requires_grad_(False)
        content = torch.load(files["beats"], weights_only=True)
        self.beats_layers, self.beats_weights = content["cfg"]["encoder_layers"], content["model"]
        stored = torch.load(files["checkpoint"], weights_only=True)["model"]
        ignored = ("inv_freq", "position_ids", "relative_attention_bias.weight")
        self.trained = {
            name: tensor.clone().requires_grad_() for name, tensor in stored.items() if not name.endswith(ignored)
        }
        self.llm = LlamaForCausalLM.from_pretrained(files["llm"]).eval().requires_grad_(False)
        self.llm.resize_token_embeddings(421, mean_resizing=False)
        rows = torch.load(files["pad_rows"], weights_only=True)["pad_rows"]
        self.llm.model.embed_tokens.weight[-1] = rows[f"{LLM}model.embed_tokens.weight"]
        self.llm.lm_head.weight[-1] = rows[f"{LLM}lm_head.weight"]

    def beats(self, waveform_BN: torch.Tensor, padding_BN: torch.Tensor) -> torch.Tensor:
        """BEATs' outputs states_BKD, computed clip by clip and head by head."""
        return torch.stack([self._beats(wave, pad) for wave, pad in zip(waveform_BN, padding_BN, strict=True)])

    def _beats(self, wave_N: torch.Tensor, padding_N: torch.Tensor) -> torch.Tensor:
        weights = self.beats_weights
        fbank_TM = kaldi.fbank(wave_N[None] * 2**15, num_mel_bins=128, sample_frequency=16_000)
        fbank_TM = (fbank_TM - 15.41663) / (2 * 6.55582)
        blocks = len(fbank_TM) // 16
        patches = fbank_TM[: blocks * 16].reshape(blocks, 16, 8, 16).transpose(1, 2).reshape(blocks * 8, 256)
        x = normed(patches @ weights["patch_embedding.weight"].flatten(1).T, weights, "layer_norm", 1e-5)
        x = linear(x, weights, "post_extract_proj")
        padding = padding_N
        for num_chunks in (len(fbank_TM), len(x)):
            size = len(padding) // num_chunks
            padding = padding[: size * num_chunks].view(num_chunks, size).all(1)
        x = torch.where(padding[:, None], 0, x)
        kernel = torch._weight_norm(weights["encoder.pos_conv.0.weight_v"], weights["encoder.pos_conv.0.weight_g"], 2)
        convolved = F.conv1d(x.T[None], kernel, weights["encoder.pos_conv.0.bias"], padding=64, groups=16)[0, :, :-1].T
        x = normed(x + F.gelu(convolved), weights, "encoder.layer_norm", 1e-5)
        index = torch.arange(len(x))
        buckets = T5Attention._relative_position_bucket(
            index[None] - index[:, None], bidirectional=True, num_buckets=320, max_distance=800
        )
        bias_KKH = weights["encoder.layers.0.self_attn.relative_attention_bias.weight"][buckets]
        alpha = (2 * self.beats_layers) ** 0.25
        for number in range(self.beats_layers):
            layer = f"encoder.layers.{number}."
            attended = self._beats_attention(x, f"{layer}self_attn.", bias_KKH, padding)
            x = normed(x * alpha + attended, weights, f"{layer}self_attn_layer_norm", 1e-5)
            wide = F.gelu(linear(x, weights, f"{layer}fc1"))
            x = normed(x * alpha + linear(wide, weights, f"{layer}fc2"), weights, f"{layer}final_layer_norm", 1e-5)
        return x

    def _beats_attention(
        self, x: torch.Tensor, name: str, bias_KKH: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        weights, outputs = self.beats_weights, []
        query, key, value = (linear(x, weights, f"{name}{part}_proj").chunk(HEADS, dim=-1) for part in "qkv")
        for head in range(HEADS):
            gates = linear(query[head], weights, f"{name}grep_linear")
            first, second = gates[:, :4].sum(1).sigmoid(), gates[:, 4:].sum(1).sigmoid()
            gate = first * (second * weights[f"{name}grep_a"].flatten()[head] - 1) + 2
            scores = query[head] @ key[head].T / query[head].shape[1] ** 0.5 + gate[:, None] * bias_KKH[..., head]
            outputs.append(scores.masked_fill(padding[None], -torch.inf).softmax(-1) @ value[head])
        return linear(torch.cat(outputs, dim=-1), weights, f"{name}out_proj")

    def audio_embeds(
        self, mel_BFT: torch.Tensor, waveform_BN: torch.Tensor, padding_BN: torch.Tensor
    ) -> list[torch.Tensor]:
        """embeds_PD of every clip."""
        embeds = []
        for mel, audio in zip(mel_BFT, self.beats(waveform_BN, padding_BN), strict=True):
            speech = normed(self.whisper(mel[None]).last_hidden_state[0], self.trained, "ln_speech", 1e-5)
            audio = normed(audio, self.trained, "ln_audio", 1e-5)
            frames = torch.zeros(max(len(speech), len(audio)), speech.shape[1] + audio.shape[1])
            frames[: len(speech), : speech.shape[1]] = speech
            frames[: len(audio), speech.shape[1] :] = audio
            windows = [frames[start : start + WINDOW] for start in range(0, len(frames) - WINDOW + 1, WINDOW)]
            outputs = torch.stack([self._qformer(window)[0] for window in windows])
            embeds.append(linear(outputs, self.trained, "speech_llama_proj"))
        return embeds

    def _qformer(self, window: torch.Tensor) -> torch.Tensor:
        """BERT's layers over the one query, with cross-attention to the window in each of them."""
        weights = self.trained
        x = normed(weights["speech_query_tokens"][0], weights, f"{QFORMER}embeddings.LayerNorm", 1e-12)
        for number in range(2):
            layer = f"{QFORMER}encoder.layer.{number}."
            for kind, context in (("attention", None), ("crossattention", window)):
                attended = self._attention(x, x if context is None else context, f"{layer}{kind}.self.")
                attended = linear(attended, weights, f"{layer}{kind}.output.dense")
                x = normed(x + attended, weights, f"{layer}{kind}.output.LayerNorm", 1e-12)
            wide = F.gelu(linear(x, weights, f"{layer}intermediate_query.dense"))
            x = x + linear(wide, weights, f"{layer}output_query.dense")
            x = normed(x, weights, f"{layer}output_query.LayerNorm", 1e-12)
        return x

    def _attention(self, x: torch.Tensor, context: torch.Tensor, name: str) -> torch.Tensor:
        query = linear(x, self.trained, f"{name}query").chunk(HEADS, dim=-1)
        key, value = (linear(context, self.trained, f"{name}{part}").chunk(HEADS, dim=-1) for part in ("key", "value"))
        return torch.cat(
            [(q @ k.T / q.shape[1] ** 0.5).softmax(-1) @ v for q, k, v in zip(query, key, value, strict=True)], dim=-1
        )

    def merged(self) -> dict[str, torch.Tensor]:
        """The language model's weights that LoRA adapts, with LoRA merged."""
        merged = {}
        for name, lora_a in self.trained.items():
            if ".lora_A." in name:
                layer = name.removeprefix(LLM).replace(".lora_A.default", "")
                lora_b = self.trained[name.replace(".lora_A.", ".lora_B.")]
                merged[layer] = self.llm.get_parameter(layer) + LORA_SCALE * lora_b @ lora_a
        return merged

    def inputs(self, before: list[int], audio_PD: torch.Tensor, after: list[int]) -> torch.Tensor:
        """embeds_LD of one prompt."""
        embed = self.llm.model.embed_tokens
        return torch.cat([embed(torch.tensor(before)), audio_PD, embed(torch.tensor(after))])

    def loss_sum(self, prompt_LD: torch.Tensor, target: list[int]) -> torch.Tensor:
        """Cross entropy of one answer, summed over its tokens."""
        embeds_LD = torch.cat([prompt_LD, self.llm.model.embed_tokens(torch.tensor(target[:-1]))])
        logits = torch.func.functional_call(self.llm, self.merged(), kwargs={"inputs_embeds": embeds_LD[None]}).logits[
            0
        ]
        return F.cross_entropy(logits[-len(target) :], torch.tensor(target), reduction="sum")

    @torch.no_grad()
    def generate(self, prompt_LD: torch.Tensor, **options: Any) -> list[int]:
        """Ids of one answer, generated by transformers."""
        original = {name: self.llm.get_parameter(name).clone() for name in self.merged()}
        for name, weight in self.merged().items():
            self.llm.get_parameter(name).copy_(weight)
        mask = torch.ones(1, len(prompt_LD), dtype=torch.long)
        ids = self.llm.generate(inputs_embeds=prompt_LD[None], attention_mask=mask, **options)[0].tolist()
        for name, weight in original.items():
            self.llm.get_parameter(name).copy_(weight)
        return ids
