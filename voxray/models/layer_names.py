"""Names by which the memory estimate of preflight recognises layers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerNames:
    """Names of layers whose stored activations follow special rules.

    The defaults are the names that transformers gives these layers in Voxtral's and Whisper's parts.

    Attributes:
        shared_inputs: Groups of Linear layers that read the same tensor, which autograd stores once.
        attention_outputs: Linear layers that read the output of attention, which attention stores itself.
        mlps: (first layer, last layer, number of gradients as wide as the inside of the MLP that exist at a time).
        cross_attention: (module, its key layer, its value layer) of attention to encoder outputs.
        encoder_norms: Norms that belong to the projector but run at encoder positions.
    """

    shared_inputs: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    attention_outputs: tuple[str, ...] = ("o_proj", "out_proj")
    mlps: tuple[tuple[str, str, int], ...] = (
        ("gate_proj", "down_proj", 3),
        ("fc1", "fc2", 2),
        ("linear_1", "linear_2", 2),
        ("linear1", "linear2", 2),
    )
    cross_attention: tuple[tuple[str, str, str], ...] = (("encoder_attn", "k_proj", "v_proj"),)
    encoder_norms: tuple[str, ...] = ()
