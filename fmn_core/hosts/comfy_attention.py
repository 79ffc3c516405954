"""Recording cross-attention in ComfyUI, by a patch that watches and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ..attention import is_prompt, layer_size
from ..errors import ForgetError
from ..recording import AT_ONCE, MEGABYTE, AttentionRecording, Box, RecordingSettings
from .base import CrossAttention, Token
from .comfy import require_family, tokenize
from .comfy_graph import executing
from .ldm import block_of, cross_attentions

KEY = "forget_me_not.recording"
ASKED_FOR = ("positive", "middle")  # what a guider calls the prompts that it goes towards
Rows = slice | list[int]


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
    embedding = clip.encode_from_tokens(clip.tokenize(text))[0]
    if conditioning and not any(is_prompt(context[0], embedding) for context, _ in conditioning):
        embedding = conditioning[0][0][0]
        tokens = as_long_as(tokens, len(embedding))
    recording = AttentionRecording(text, tokens, settings)
    watch = Watch(recording, embedding)

    def patch(n, context, value, extra):
        name, layer = named.get((*extra["block"], extra["block_index"]), (None, None))
        if watch.sampling and name is not None:
            watch.see(name, layer, n, context, extra)
        return n, context, value

    watched = model.clone()
    watched.set_model_attn2_patch(patch)
    watched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, watch.begin)
    watched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, watch.end)
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, watch.sample)
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, watch.ask)
    return watched, recording


class Watch:
    """What is known of the sampling that a recording sees."""

    def __init__(self, recording: AttentionRecording, embedding: Tensor):
        self.recording, self.embedding = recording, embedding
        self.forget()

    def forget(self) -> None:
        """Nothing samples."""
        self.sampling = False
        self.span = (float("inf"), 0.0)  # sigmas between which is recorded
        self.whole: tuple[int, ...] = ()  # height and width of the latents
        self.windowed = False  # whether they come in windows of which nobody says where they are
        self.asked: set = set()  # numbers of the conditions that are asked for
        self.areas: dict = {}  # a condition's number -> (height, width, top, left) in the latents, or None
        self.seen: tuple = ()  # what a forward gives all its layers is looked at once
        self.step, self.parts = 0, []

    def sample(self, executor, noise, *args, **kwargs):
        """The host samples: notes the picture's size, and what is asked for."""
        conds = getattr(executor.class_obj, "conds", {})
        self.whole = tuple(noise.shape[-2:])
        self.asked = {cond.get("uuid") for name in ASKED_FOR for cond in conds.get(name) or []} - {None}
        return executor(noise, *args, **kwargs)

    def begin(self, patcher) -> None:
        """The model is about to run."""
        sampling = patcher.get_model_object("model_sampling")
        settings = self.recording.settings
        self.span = tuple(float(sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent))
        self.sampling = True
        self.recording.begin(executing())

    def end(self, patcher) -> None:
        """The model has run, or stopped."""
        if self.sampling:
            self.recording.end()
        self.forget()

    def ask(self, executor, model, conds, x_in, timestep, model_options):
        """The host asks for the estimates of all conditions: notes which parts of the picture they are for."""
        self.areas = {cond["uuid"]: cond.get("area") for part in conds for cond in part or [] if "uuid" in cond}
        self.windowed = bool(self.whole) and tuple(x_in.shape[-2:]) != self.whole
        return executor(model, conds, x_in, timestep, model_options)

    def see(self, name: str, layer: CrossAttention, n: Tensor, context: Tensor, extra: dict) -> None:
        """One layer of one forward: n [B, N, C] is what attends, context [B, R * T, D] what is attended to."""
        self.look(context, extra)
        shape = extra["original_shape"][-2:]
        size = extra.get("activations_shape", ())[-2:]
        if len(size) != 2 or size[0] * size[1] != n.shape[1]:
            size = layer_size(*shape, n.shape[1])
        together = max(self.recording.settings.memory * MEGABYTE // AT_ONCE // n[0].nbytes, 1)  # pictures, by their queries
        for rows, area in self.parts:
            box = box_of(area, self.whole, shape, size)
            for first in range(0, len(rows), together):
                some = as_slice(rows[first : first + together])
                q, k = layer.module.to_q(n[some]), layer.module.to_k(context[some])
                place = {"step": self.step, "box": box, "pictures": len(rows), "first": first}
                self.recording.add(name, q, k, layer.heads, *size, **place)

    def look(self, context: Tensor, extra: dict) -> None:
        """Finds the step, and the rows of the prompt with their parts of the picture."""
        sigma, schedule, numbers = extra.get("sigmas"), extra.get("sample_sigmas"), extra.get("uuids")
        if self.seen and self.seen[0] is context and self.seen[1] is sigma and self.seen[2] is numbers:
            return
        self.seen, self.parts = (context, sigma, numbers), []
        if sigma is not None:
            now = float(sigma.flatten()[0])
            if not self.span[1] <= now <= self.span[0]:
                return
            if schedule is not None:
                self.step = max(int((schedule >= now * 0.9999).sum()) - 1, 0)
        self.parts = [*self.parts_of(context, extra.get("cond_or_uncond") or [0], numbers, extra["original_shape"][-2:])]

    def parts_of(
        self, context: Tensor, kinds: list[int], numbers: list | None, shape: list[int]
    ) -> Iterator[tuple[list[int], tuple | None]]:
        """The rows of every condition that asks for the prompt, and its area; none where nobody says where the part is."""
        chunk = len(context) // len(kinds)
        for i, kind in enumerate(kinds):
            number = numbers[i] if numbers else None
            area = self.areas.get(number)
            asked = number in self.asked if self.asked else kind == 0  # kinds: 0 is the guider's first, mostly positive
            placed = area is not None or not self.whole or tuple(shape) == self.whole
            if not asked or not placed or self.windowed:
                continue
            rows = [row for row in range(i * chunk, (i + 1) * chunk) if is_prompt(context[row], self.embedding)]
            if rows:
                yield rows, area


def as_slice(rows: list[int]) -> Rows:
    """Row numbers as a slice where they follow one another: it copies nothing."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


def box_of(area: tuple | None, whole: tuple[int, ...], part: list[int], size: list[int]) -> Box | None:
    """Where a layer of `size` that ran for `part` of the latents is in the layer's map of all of them; None where it ran for
    all."""
    if area is None or len(area) != 4 or tuple(part) == tuple(whole):
        return None
    times = halvings(part, size)
    height, width = (halved(latent, times) for latent in whole)
    top, left = (start >> times for start in area[2:])
    return Box(height, width, min(top, max(height - size[0], 0)), min(left, max(width - size[1], 0)))


def halvings(part: list[int], size: list[int]) -> int:
    """How often latents were halved to come to a layer's size, as nearly as can be said."""
    return min(range(8), key=lambda times: sum(abs(halved(a, times) - b) for a, b in zip(part, size, strict=True)))


def halved(side: int, times: int) -> int:
    """A side after so many halvings, each rounded up, as the UNet's convolutions do it."""
    return -(-side // 2**times)


def as_long_as(tokens: tuple[Token, ...], columns: int) -> tuple[Token, ...]:
    """The tokens, with padding for columns that a conditioning has beyond them (another prompt, appended)."""
    if columns < len(tokens):
        raise ForgetError(
            f"The conditioning has {columns} columns and the text {len(tokens)}: give the text that it encodes."
        )
    return tokens + (Token(0, "", "padding"),) * (columns - len(tokens))
