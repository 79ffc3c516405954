"""Recording cross-attention in ComfyUI, by a patch that watches and changes nothing."""

from __future__ import annotations

import torch
from comfy.patcher_extension import CallbacksMP

from ..attention import AttentionRecording, attention_probabilities, layer_size
from ..errors import ForgetError
from .comfy import cross_attentions, require_cross_attention, tokenize

KEY = "forget_me_not.recording"


def record_attention(model, clip, text: str):
    """A clone of `model` that fills the returned AttentionRecording whenever it is sampled with the prompt `text`.

    It uses the host's list of attn2 patches, to which any number of packs may add, and not the single place for a
    replacement. What it gives back is what it got, so the picture is the same. The recording starts anew with each
    sampling and covers the conditional rows.
    """
    require_cross_attention(model)
    layers = {block_of(name): (name, layer) for name, layer in cross_attentions(model.model.diffusion_model).items()}
    recording = AttentionRecording(text, tokenize(clip, text))

    def watch(n, context, value, extra):
        kinds = extra.get("cond_or_uncond") or [0]
        chunk = len(n) // len(kinds)
        rows = [row for i, kind in enumerate(kinds) if kind == 0 for row in range(i * chunk, (i + 1) * chunk)]
        name, layer = layers.get((*extra["block"], extra["block_index"]), (None, None))
        if rows and name is not None and not torch.is_grad_enabled():
            check_length(recording, context[rows])
            probabilities = attention_probabilities(
                layer.module.to_q(n[rows]), layer.module.to_k(context[rows]), layer.heads
            )
            recording.add(name, probabilities, *layer_size(*extra["original_shape"][-2:], n.shape[1]))
        return n, context, value

    watched = model.clone()
    watched.set_model_attn2_patch(watch)
    watched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda patcher: recording.clear())
    return watched, recording


def block_of(layer: str) -> tuple[str, int, int]:
    """`input_blocks.4.1.transformer_blocks.0.attn2` -> ("input", 4, 0), as the host names it to patches."""
    parts = layer.split(".")
    number = 0 if parts[0] == "middle_block" else int(parts[1])
    return parts[0].split("_")[0], number, int(parts[-2])


def check_length(recording: AttentionRecording, context: torch.Tensor) -> None:
    """Raises ForgetError unless the sampler's context [B, T, D] is as long as the recorded text, or that text tiled."""
    length, expected = context.shape[1], len(recording.tokens)
    tiled = length % expected == 0 and all(
        torch.equal(context[:, :expected], context[:, start : start + expected]) for start in range(0, length, expected)
    )
    if not tiled:
        raise ForgetError(
            f"The sampler's prompt has {length} tokens and the text given to Record Token Attention has {expected}: "
            "give both the same text."
        )
