"""What a patch does to prompts that have nothing to do with its concept: the last check of every preset."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack

import torch

from ..errors import ForgetError
from ..host import DiffusionHost, Prompts
from ..text.tokens import find_tokens
from ..text.vocabulary import SCENES
from ..training.losses import predicted_x0
from ..training.noise import noise_drift, noised

PROMPTS = 4
LATENT_SIDE = 16  # of the latents: small, since `fast` takes seconds in all; it is what the demo model was made for
LEVEL = 0.7  # of the schedule, from clean to noise, at which they are compared
# Of the estimates' energy: more is worth a warning. On the demo model patches that keep other pictures lie well below,
# and those that draw them as something else above it; of other models nothing is known.
LARGE_DRIFT = 0.02


def unrelated_prompts(host: DiffusionHost, names: Iterable[str]) -> Prompts:
    """A few encoded captions in which none of the names occurs."""
    phrases = [host.tokenize(name) for name in names]
    free = [caption for caption in SCENES if not any(find_tokens(host.tokenize(caption), phrase) for phrase in phrases)]
    captions = free or SCENES
    return host.encode([*captions[:: -(-len(captions) // PROMPTS)]])


class NotFinite(ForgetError):
    """A patch with which the model's estimates are not finite."""


def latents_shape(host: DiffusionHost) -> tuple[int, ...]:
    """[B, C, h, w] of the latents that are looked at."""
    channels, *sides = host.latent_shape()
    return PROMPTS, channels, *(min(side, LATENT_SIDE) for side in sides)


@torch.no_grad()
def unrelated_drift(host: DiffusionHost, prompts: Prompts, *patches: AbstractContextManager) -> float | None:
    """Noise-prediction drift |eps - eps0|^2 / |eps0|^2 of unrelated prompts, their mean: eps with what the contexts put on
    the model, eps0 without; None where eps0 is not finite. For inside the host's `training`, and the same each time.

    They are asked of what the model first takes pure noise for, noised again to LEVEL. Raises NotFinite where the patched
    model's estimates are not finite.
    """
    shape = len(prompts), *latents_shape(host)[1:]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(host.device)
    last = len(host.alphas_cumprod) - 1
    first, t = (torch.full((len(prompts),), at, device=noise.device) for at in (last, round(LEVEL * last)))
    alphas = host.alphas_cumprod.to(noise)
    x0, a = predicted_x0(noise, host.predict(noise, first, prompts), alphas[first]), alphas[t[0]]
    x_t = noised(x0, a, noise)
    before = host.predict(x_t, t, prompts)
    if not before.isfinite().all():
        return None
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        drift = noise_drift(host.predict(x_t, t, prompts), before).mean()
    if not drift.isfinite():
        raise NotFinite(
            "The patch gives no finite noise estimates: forget fewer concepts at once, or lower the learning rate where the "
            "preset has one."
        )
    return round(drift.item(), 7)


def unrelated_warnings(drift: float | None, trained: bool = True) -> list[str]:
    """A sentence where unrelated prompts suffer, with what helps a training or an edit in closed form; or where nobody
    knows."""
    if drift is None:
        return [
            "The model's own noise estimates are not finite, so that what unrelated prompts suffer is not known: load it in "
            "fp32 or bf16."
        ]
    if drift <= LARGE_DRIFT:
        return []
    lower = "the learning rate or the steps" if trained else "the rank"
    return [
        f"Unrelated prompts suffer: their noise estimates change by {drift:.0%}. Lower {lower}, forget fewer concepts at "
        "once, or apply the patch less strongly."
    ]
