"""Recording cross-attention in ComfyUI, by a patch that watches and changes nothing."""

from __future__ import annotations

from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..attention import is_prompt, layer_size
from ..errors import ForgetError
from ..hosts.base import Token
from ..recording import AttentionRecording, Box, RecordingSettings
from .comfy import cross_attentions, require_family, tokenize

KEY = "forget_me_not.recording"


def record_attention(model, clip, text: str, settings: RecordingSettings | None = None, conditioning=None):
    """A clone of `model` that fills the returned AttentionRecording whenever it is sampled with the prompt `text`, or with
    the given conditioning, whose columns the words of `text` name.

    It uses the host's list of attn2 patches, to which any number of packs may add, and not the single place for a
    replacement. What it gives back is what it got, so the picture is the same. The recording starts anew with each
    sampling and covers the conditional rows whose context is that of the prompt, in whatever order and company they come.
    Raises ForgetError where the conditioning has fewer columns than the text.
    """
    require_family(model.model)
    settings = settings or RecordingSettings()
    layers = settings.chosen(cross_attentions(model.model.diffusion_model))
    named = {block_of(name): (name, layer) for name, layer in layers.items()}
    tokens = tokenize(clip, text)
    if conditioning is None:
        embeddings = [clip.encode_from_tokens(clip.tokenize(text))[0]]
    else:
        embeddings = [context[0] for context, _ in conditioning]
        tokens = as_long_as(tokens, len(embeddings[0]))
    recording = AttentionRecording(text, tokens, settings)
    watch = Watch(recording, embeddings)

    def patch(n, context, value, extra):
        name, layer = named.get((*extra["block"], extra["block_index"]), (None, None))
        if watch.sampling and name is not None:
            watch.see(name, layer, n, context, extra)
        return n, context, value

    watched = model.clone()
    watched.set_model_attn2_patch(patch)
    watched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, watch.begin)
    watched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, watch.end)
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, watch.ask)
    return watched, recording


class Watch:
    """What is known of the sampling that a recording sees."""

    def __init__(self, recording: AttentionRecording, embeddings: list[Tensor]):
        self.recording, self.embeddings = recording, embeddings
        self.sampling = False
        self.span = (float("inf"), 0.0)  # sigmas between which is recorded
        self.whole: tuple[int, int] = (0, 0)  # height and width of the latents
        self.areas: dict = {}  # a condition's number -> (height, width, top, left) in the latents, or None
        self.seen: tuple = ()  # what a forward gives all its layers is looked at once
        self.step, self.parts = 0, []

    def begin(self, patcher) -> None:
        """The host is about to sample."""
        sampling = patcher.get_model_object("model_sampling")
        settings = self.recording.settings
        self.span = tuple(float(sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent))
        self.sampling = True
        who = get_executing_context()
        self.recording.begin(*((who.prompt_id, who.node_id) if who else (None, None)))

    def end(self, patcher) -> None:
        """The host has sampled, or stopped."""
        if self.sampling:
            self.recording.end()
        self.sampling, self.seen, self.areas = False, (), {}

    def ask(self, executor, model, conds, x_in, timestep, model_options):
        """The host asks for the estimates of all conditions: notes which parts of the picture they are for."""
        self.whole = tuple(x_in.shape[-2:])
        self.areas = {cond["uuid"]: cond.get("area") for part in conds for cond in part or [] if "uuid" in cond}
        return executor(model, conds, x_in, timestep, model_options)

    def see(self, name: str, layer, n: Tensor, context: Tensor, extra: dict) -> None:
        """One layer of one forward: n [B, N, C] is what attends, context [B, R * T, D] what is attended to."""
        self.look(context, extra)
        shape = extra["original_shape"][-2:]
        size = extra.get("activations_shape", ())[-2:]
        if len(size) != 2 or size[0] * size[1] != n.shape[1]:
            size = layer_size(*shape, n.shape[1])
        for rows, area in self.parts:
            q, k = layer.module.to_q(n[rows]), layer.module.to_k(context[rows])
            box = box_of(area, self.whole, shape, size)
            self.recording.add(name, q, k, layer.heads, *size, step=self.step, box=box)

    def look(self, context: Tensor, extra: dict) -> None:
        """Finds the step, and the rows of the prompt with their parts of the picture."""
        sigma, schedule, numbers = (extra.get(key) for key in ("sigmas", "sample_sigmas", "uuids"))
        given = (context, sigma, numbers)
        if self.seen and all(one is other for one, other in zip(self.seen, given, strict=True)):
            return
        self.seen, self.parts = given, []
        if sigma is not None:
            now = float(sigma.flatten()[0])
            if not self.span[1] <= now <= self.span[0]:
                return
            if schedule is not None:
                self.step = max(int((schedule >= now * 0.9999).sum()) - 1, 0)
        kinds = extra.get("cond_or_uncond") or [0]  # a chunk of the batch each, 0 for conditional
        chunk = len(context) // len(kinds)
        for i, kind in enumerate(kinds):
            part = range(i * chunk, (i + 1) * chunk)
            rows = [row for row in part if kind == 0 and self.is_recorded(context[row])]
            if rows:
                all_of_it = slice(part.start, part.stop)  # a slice copies nothing
                area = self.areas.get(numbers[i]) if numbers else None
                self.parts.append((all_of_it if len(rows) == chunk else rows, area))

    def is_recorded(self, context: Tensor) -> bool:
        return any(is_prompt(context, embedding) for embedding in self.embeddings)


def box_of(area, whole: tuple[int, int], part: list[int], size: list[int]) -> Box | None:
    """Where a layer of `size` that ran for `part` of the latents is in the layer's map of all of them; None where the host
    names no area."""
    if area is None or len(area) != 4 or tuple(part) == tuple(whole):
        return None
    sides = [latent / pixels for latent, pixels in zip(part, size, strict=True)]
    height, width = (round(latent / side) for latent, side in zip(whole, sides, strict=True))
    top, left = (round(start / side) for start, side in zip(area[2:], sides, strict=True))
    return Box(max(height, top + size[0]), max(width, left + size[1]), top, left)


def block_of(layer: str) -> tuple[str, int, int]:
    """`input_blocks.4.1.transformer_blocks.0.attn2` -> ("input", 4, 0), as the host names it to patches."""
    parts = layer.split(".")
    number = 0 if parts[0] == "middle_block" else int(parts[1])
    return parts[0].split("_")[0], number, int(parts[-2])


def as_long_as(tokens: tuple[Token, ...], columns: int) -> tuple[Token, ...]:
    """The tokens, with padding for columns that a conditioning has beyond them (another prompt, appended)."""
    if columns < len(tokens):
        raise ForgetError(
            f"The conditioning has {columns} columns and the text {len(tokens)}: give the text that it encodes."
        )
    return tokens + (Token(0, "", "padding"),) * (columns - len(tokens))
