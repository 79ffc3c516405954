"""Recording cross-attention while a diffusers pipeline samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...attention.capture import is_prompt, layer_size, projections
from ...attention.eager import run_eagerly
from ...attention.recorder import AttentionRecording, RecordingConfig
from .model import DiffusersHost


@contextmanager
def record_attention(
    host: DiffusersHost, text: str, settings: RecordingConfig | None = None
) -> Iterator[AttentionRecording]:
    """Context whose recording fills while the host's pipeline samples with the prompt `text`; each of the UNet's calls is a
    step. A negative prompt of the same text counts as well: the pipeline does not say which rows are which."""
    settings = settings or RecordingConfig()
    recording = AttentionRecording(text, host.tokenize(text), settings)
    recording.begin()
    embedding = host.encode([text]).prompt_embeds[0]
    layers = settings.chosen(host.cross_attentions())
    size, step, seen, rows = (0, 0), -1, None, []

    def ask(unet, args, kwargs):
        nonlocal size, step
        latents = args[0] if args else kwargs["sample"]
        size, step = tuple(latents.shape[-2:]), step + 1

    def take(name, q, k, context):
        nonlocal seen, rows
        if context is not seen:
            seen, rows = context, [row for row in range(len(context)) if is_prompt(context[row], embedding)]
        if rows:
            recording.add(name, q[rows], k[rows], layers[name].heads, layer_size(*size, q.shape[1]), step=step)

    hook = host.unet.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        with projections(layers, take), run_eagerly(host.pipeline.unet):
            yield recording
    finally:
        hook.remove()
        recording.end()
