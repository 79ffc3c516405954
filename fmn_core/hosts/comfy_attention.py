"""Recording cross-attention in ComfyUI, by a patch that watches and changes nothing."""

from __future__ import annotations

from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import get_executing_context

from ..attention import AttentionRecording, attention_probabilities, layer_size
from .comfy import require_family, tokenize
from .ldm import block_of, cross_attentions, is_text

KEY = "forget_me_not.recording"


def record_attention(model, clip, text: str):
    """A clone of `model` that fills the returned AttentionRecording whenever it is sampled with the prompt `text`.

    It uses the host's list of attn2 patches, to which any number of packs may add, and not the single place for a
    replacement. What it gives back is what it got, so the picture is the same. The recording starts anew with each
    sampling and covers the conditional rows whose context is that of `text`, in whatever order and company they come.
    """
    require_family(model.model)
    layers = {block_of(name): (name, layer) for name, layer in cross_attentions(model.model.diffusion_model).items()}
    recording = AttentionRecording(text, tokenize(clip, text))
    embedding = clip.encode_from_tokens(clip.tokenize(text))
    sampling = False
    matched = (None, None, [])  # a forward gives all layers one context: its rows are matched once

    def rows_of_text(context, kinds):
        nonlocal matched
        if matched[0] is not context or matched[1] != kinds:
            rows = [row for row in conditional_rows(len(context), kinds) if is_text(context[row], embedding[0])]
            matched = (context, kinds, rows)
        return matched[2]

    def watch(n, context, value, extra):
        name, layer = layers.get((*extra["block"], extra["block_index"]), (None, None))
        if sampling and name is not None:
            rows = rows_of_text(context, extra.get("cond_or_uncond") or [0])
            if rows:
                q, k = layer.module.to_q(n[rows]), layer.module.to_k(context[rows])
                size = layer_size(*extra["original_shape"][-2:], n.shape[1])
                recording.add(name, attention_probabilities(q, k, layer.heads), *size)
        return n, context, value

    def begin(patcher):
        nonlocal sampling
        sampling = True
        who = get_executing_context()
        recording.begin(*((who.prompt_id, who.node_id) if who else (None, None)))

    def end(patcher):
        nonlocal sampling, matched
        sampling, matched = False, (None, None, [])

    watched = model.clone()
    watched.set_model_attn2_patch(watch)
    watched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, begin)
    watched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, end)
    return watched, recording


def conditional_rows(batch: int, kinds: list[int]) -> list[int]:
    """Rows of the batch that are conditional, by the host's list: a chunk an entry, 0 for conditional."""
    chunk = batch // len(kinds)
    return [row for i, kind in enumerate(kinds) if kind == 0 for row in range(i * chunk, (i + 1) * chunk)]
