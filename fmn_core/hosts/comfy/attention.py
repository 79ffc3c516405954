"""Recording cross-attention in ComfyUI, by hooks that watch and change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...attention.capture import is_prompt, layer_size, projections, prompt_columns
from ...attention.eager import run_eagerly, uncompiled
from ...attention.frames import Box
from ...attention.recorder import AT_ONCE, MEGABYTE, AttentionRecording, RecordingConfig
from ...errors import ForgetError
from ...host import CrossAttention, Token
from ..ldm import cross_attentions
from .graph import drop_stale, executing, running
from .model import require_family, tokenize

KEY = "forget_me_not.recording"
ASKED_FOR = ("positive", "middle")  # what a guider calls the prompts that it goes towards
Rows = slice | list[int]
BatchPart = tuple[list[int], tuple | None]  # rows of a batch, and their area of the picture


def record_attention(model, clip, text: str, settings: RecordingConfig | None = None, conditioning=None):
    """A clone of `model` that fills the returned AttentionRecording whenever it is sampled with the prompt `text`, or with
    the given conditioning, whose columns the words of `text` name.

    While the model runs it reads what the layers' own to_q and to_k give, so it sees the queries and keys that the attention
    gets, whatever patches of other packs make of the context, and in whatever order they are. It changes nothing, so the
    picture is the same. The recording starts over with each sampling and covers the conditional rows whose context is that
    of the prompt, in whatever order and company they come. Raises ForgetError where the conditioning has fewer columns than
    the text.
    """
    require_family(model.model)
    settings = settings or RecordingConfig()
    tokens = tokenize(clip, text)
    embedding = clip.encode_from_tokens(clip.tokenize(text))[0]
    if conditioning and not any(is_prompt(context[0], embedding) for context, _ in conditioning):
        embedding = conditioning[0][0][0]
        tokens = as_long_as(tokens, len(embedding))
    recording = AttentionRecording(text, tokens, settings)
    watch = Watch(recording, embedding)
    watched = model.clone()
    watched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, watch.begin)
    watched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, watch.end)
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, watch.sample)
    watched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, watch.ask)
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, watch.run)
    return watched, recording


@dataclass(frozen=True)
class Forward:
    """One run of the UNet: the context [B, R * T, D] and the size of the latents that the host gives it, the parts that are
    recorded, and what the host tells its layers."""

    context: Tensor
    latents: tuple[int, int]
    parts: list[BatchPart]
    extra: dict

    def size_of_layer(self, pixels: int) -> tuple[int, int]:
        """Height and width of the layer that runs, which has so many pixels."""
        height, width = self.extra.get("activations_shape", (0, 0))[-2:]
        return (height, width) if height * width == pixels else layer_size(self.latents[0], self.latents[1], pixels)


class Watch:
    """What is known of the sampling that a recording sees."""

    def __init__(self, recording: AttentionRecording, embedding: Tensor):
        self.recording, self.embedding = recording, embedding
        self.forget()

    def forget(self) -> None:
        """Nothing samples."""
        self.sampling = False
        self.span: tuple[float, float] = (math.inf, 0.0)  # sigmas between which is recorded
        self.whole: tuple[int, ...] = ()  # height and width of the latents
        self.windowed = False  # whether they come in windows of which nobody says where they are
        self.asked: set = set()  # numbers of the conditions that are asked for
        self.areas: dict = {}  # a condition's number -> (height, width, top, left) in the latents, or None
        self.step = 0
        self.unet: nn.Module | None = None
        self.layers: dict[str, CrossAttention] = {}
        self.compiled = False  # before the layers were watched, whose hooks would not be seen

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
        first, last = (float(sampling.percent_to_sigma(p)) for p in (settings.start_percent, settings.end_percent))
        self.span = (first, last)
        self.sampling = True
        self.compiled = is_compiled(patcher)
        origin = executing()
        self.recording.begin(origin)
        if origin:
            drop_stale(self.recording, running(origin.job))

    def end(self, patcher) -> None:
        """The model has run, or stopped."""
        if self.sampling:
            self.recording.end()
        self.forget()

    def ask(self, executor, model, conds, x_in, timestep, model_options):
        """The host asks for the estimates of all conditions: notes which parts of the picture they are for."""
        self.areas = {cond["uuid"]: cond.get("area") for part in conds for cond in part or [] if "uuid" in cond}
        self.windowed = bool(self.whole) and tuple(x_in.shape[-2:]) != self.whole
        with run_eagerly(model.diffusion_model) if self.compiled else nullcontext():
            return executor(model, conds, x_in, timestep, model_options)

    def run(self, executor, x, timesteps, context, y=None, control=None, transformer_options=None, **kwargs):
        """The UNet runs: its layers are read where they attend to the prompt."""
        extra = {} if transformer_options is None else transformer_options
        if not self.sampling or context is None or not self.find_step(extra.get("sigmas"), extra.get("sample_sigmas")):
            return executor(x, timesteps, context, y, control, extra, **kwargs)
        if self.unet is not executor.class_obj:
            self.unet = executor.class_obj
            self.layers = self.recording.settings.chosen(cross_attentions(self.unet))
        latents, kinds = x.shape[-2:], extra.get("cond_or_uncond") or [0]
        forward = Forward(context, latents, [*self.parts_of(context, kinds, extra.get("uuids"), latents)], extra)
        with projections(self.layers, partial(self.see, forward)):
            return executor(x, timesteps, context, y, control, extra, **kwargs)

    def see(self, forward: Forward, name: str, q: Tensor, k: Tensor, context: Tensor) -> None:
        """One layer of one forward: q [B, N, heads * d] is what attends, k [B', L, heads * d] what is attended to, and the
        context [B', L, D] where k comes from: the forward's, unless a patch of another pack has changed it."""
        size = forward.size_of_layer(q.shape[1])
        parts, given = forward.parts, forward.context
        if len(q) != len(given):  # a patch has other rows, one for each of several prompts, say
            parts = [(self.rows_of(context[: len(q)]), None)] if self.is_placed(None, forward.latents) else []
            given = context
        together = max(
            self.recording.settings.max_memory_mb * MEGABYTE // AT_ONCE // q[0].nbytes, 1
        )  # pictures, by their queries
        for rows, area in parts:
            box = box_of(area, self.whole, forward.latents, size)
            for first in range(0, len(rows), together):
                some = as_slice(rows[first : first + together])
                self.recording.add(
                    name,
                    q[some],
                    k[some],
                    self.layers[name].heads,
                    size,
                    step=self.step,
                    box=box,
                    pictures=len(rows),
                    first=first,
                    names=None if context is given else prompt_columns(context[some], given[some], len(self.embedding)),
                )

    def find_step(self, sigma: Tensor | None, schedule: Tensor | None) -> bool:
        """Finds the step that a noise is of; whether it is to be recorded."""
        if sigma is None:
            return True
        now = float(sigma.flatten()[0])
        if schedule is not None:
            self.step = max(int((schedule >= now * 0.9999).sum()) - 1, 0)
        return self.span[1] <= now <= self.span[0]

    def parts_of(self, context: Tensor, kinds: list[int], numbers: list | None, shape: Sequence[int]) -> Iterator[BatchPart]:
        """The rows of every condition that asks for the prompt, and its area; none where nobody says where the part is."""
        chunk = len(context) // len(kinds)
        for i, kind in enumerate(kinds):
            number = numbers[i] if numbers else None
            area = self.areas.get(number)
            asked = number in self.asked if self.asked else kind == 0  # kinds: 0 is the guider's first, mostly positive
            if not asked or not self.is_placed(area, shape):
                continue
            rows = [row + i * chunk for row in self.rows_of(context[i * chunk : (i + 1) * chunk])]
            if rows:
                yield rows, area

    def is_placed(self, area: tuple | None, latents: Sequence[int]) -> bool:
        """Whether somebody says where in the picture these latents are."""
        return not self.windowed and (area is not None or not self.whole or tuple(latents) == self.whole)

    def rows_of(self, context: Tensor) -> list[int]:
        """The rows of a context [B, R * T, D] that are the prompt's."""
        return [row for row, one in enumerate(context) if is_prompt(one, self.embedding)]


def is_compiled(patcher) -> bool:
    """Whether a model patcher's model, or a part of it, is compiled by torch."""
    compiled = patcher.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile")  # as Torch Compile Model puts it on
    return bool(compiled) or any(uncompiled(m) is not m for m in patcher.model.diffusion_model.modules())


def as_slice(rows: list[int]) -> Rows:
    """Row numbers as a slice where they follow one another: it copies nothing."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


def box_of(area: tuple | None, whole: tuple[int, ...], part: Sequence[int], size: Sequence[int]) -> Box | None:
    """Where a layer of `size` that ran for `part` of the latents is in the layer's map of all of them; None where it ran for
    all."""
    if area is None or len(area) != 4 or tuple(part) == tuple(whole):
        return None
    times = halvings(part, size)
    height, width = (halved(latent, times) for latent in whole)
    top, left = (start >> times for start in area[2:])
    return Box(height, width, min(top, max(height - size[0], 0)), min(left, max(width - size[1], 0)))


def halvings(part: Sequence[int], size: Sequence[int]) -> int:
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
