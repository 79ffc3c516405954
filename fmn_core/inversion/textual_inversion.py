"""Concept inversion: words that call for what some pictures show (textual inversion, Gal et al., arXiv 2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost, WordVectors
from ..log import logger, phase, plain
from ..text.concept import make_concepts
from ..text.vocabulary import NOUNS
from ..training.checkpoint import Checkpoint
from ..training.images import prepare_pictures
from ..training.loop import Descent, diverged, settled
from ..training.losses import predicted_x0
from ..training.memory import Economy, out_of_memory_told
from ..training.noise import diffuse, draw
from ..training.preview import linear_decoder
from ..training.sampling import AT_ONCE, sample_pairs, sampling_calls
from ..training.state import State
from .config import InvertSettings
from .embedding import require_embeddings

WEIGHT_DECAY = 0.1  # the original's weight_decay_ti
NORM_PULL = 0.1  # of the way to a word's norm, each step (the original: min(1, 100 * learning rate), 0.1 at its default)
OUTSIDE = 0.05  # what counts outside a mask, beside 1 inside
MOST_VECTORS = 64  # with a template's words, what fits into the 77 columns of a prompt
PROBES = 8  # fixed noisy latents, for the error before and after: single steps depend on their timesteps
RANDOM = re.compile(r"<rand-(\d*\.?\d+)>")
TOKEN_ID = re.compile(r"<id-(\d+)>")


@dataclass(frozen=True)
class Inversion:
    """Vectors that stand for a concept in the place of words, the loss of each step, the loss on fixed noisy latents
    before and after, and what a user should know."""

    vectors: WordVectors
    losses: list[float]
    before: float
    after: float
    warnings: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """What was learned, in a line or two, the warnings first."""
        count = len(next(iter(self.vectors.values())))
        learned = f"{count} {'word' if count == 1 else 'words'} learned in {len(self.losses)} steps"
        return "\n".join(
            [*self.warnings, f"{learned}: the noise estimate's error went from {self.before:.4f} to {self.after:.4f}."]
        )


def invert_pictures(
    host: DiffusionHost,
    settings: InvertSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    concept: str = "",
    checkpoint: Checkpoint | None = None,
) -> Inversion:
    """Words for what pictures show: `images` [P, H, W, 3] in 0..1, or pictures that the model makes of `concept`.

    `mask` [1 or P, H, W] in 0..1 says where in them it is. Inside a `checkpoint`, which the caller has entered, the learning
    goes on where an earlier run with the same inputs got to. Raises ForgetError for inputs that cannot work.
    """
    checkpoint = checkpoint or Checkpoint()
    with out_of_memory_told(), host.sized(settings.resolution), phase("invert", seed=settings.seed) as told:
        (named,) = make_concepts("{}", settings.concept_type, settings.template)
        require_embeddings(host, *named.templates)
        texts = ("" if images is not None else concept, settings.template, settings.initializers)
        checkpoint.begin(host, texts, "invert", asdict(settings), images, mask)
        images, mask = prepare_pictures(host, images, mask, settings.flip)
        made = 0 if images is not None else sampling_calls(settings.num_pictures, settings.sampling_steps)
        with host.one_bar(made + settings.steps):
            latents = make_latents(host, settings, concept) if images is None else host.encode_images(images)
            if images is None and host.may_show_previews():
                images = host.decode(latents)
            inversion = invert(host, latents, settings, mask, images, checkpoint)
        checkpoint.done()
        for warning in inversion.warnings:
            logger.warning("invert.warning %s", plain(warning))
        told |= {"steps": len(inversion.losses), "before": inversion.before, "after": inversion.after}
    return inversion


def make_latents(host: DiffusionHost, settings: InvertSettings, concept: str) -> Tensor:
    """Latents [P, C, h, w] of pictures that the model makes of a concept."""
    (named,) = make_concepts(" ".join(concept.splitlines()), settings.concept_type, settings.template)
    require_embeddings(host, concept)
    prompts, empty = host.encode([prompt for prompt, _ in named.prompts]), host.encode([""])
    with host.training((AT_ONCE, *host.latent_shape())):
        generator = torch.Generator().manual_seed(settings.seed)
        rows = [i % len(prompts) for i in range(settings.num_pictures)]
        return sample_pairs(host, prompts.take(rows), empty, None, settings, generator)[0]


def invert(
    host: DiffusionHost,
    latents: Tensor,
    settings: InvertSettings,
    mask: Tensor | None = None,
    pictures: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
) -> Inversion:
    """Learns vectors with which the model denoises latents [P, C, h, w] best, all else frozen.

    AdamW on the mean squared error of the noise estimate at uniform timesteps (Gal et al., eq. 2); the vectors' norms
    are drawn to those of the text encoder's own words (the original's `clip_ti_decay`, which draws them to SD's 0.4).
    `mask` [1 or P, H, W] weights the error; `pictures` [P, H, W, 3] are what the latents encode, for the preview.
    What is hooked onto the model stays on it: a patched model learns what the patch has left.
    Raises ForgetError for initialisers that cannot work, and where the latents or the first loss are not finite.
    """
    if not latents.isfinite().all():
        raise ForgetError(
            "The pictures' latents are not finite: look for broken pictures, or a model or VAE that overflows in half "
            "precision."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    (named,) = make_concepts("{}", settings.concept_type, settings.template)
    norms = {name: v.norm(dim=-1).mean() for name, v in host.word_vectors(" ".join(NOUNS)).items()}
    first = first_vectors(host, settings, norms, generator)
    weight = None if mask is None else error_weight(mask, latents)
    decoder = linear_decoder(latents, pictures) if pictures is not None and host.may_show_previews() else None
    warnings, checkpoint = [], checkpoint or Checkpoint()
    probe = diffuse(host, latents[draw(len(latents), PROBES, generator)], generator)
    with host.training((settings.batch_size, *latents.shape[1:]), text=True):
        vectors = {name: v.to(host.device).requires_grad_() for name, v in first.items()}
        before = probe_error(host, probe, named.templates[0], vectors)
        optimizer = torch.optim.AdamW(vectors.values(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
        # The loss is a sum, as large as half precision likes it, because AdamW minds no scale.
        state = State([*vectors.values()], optimizer, generator, most_scale=1.0)
        losses, descent = state.losses, Descent(Economy(host), state, max_norm=None)
        host.skip(checkpoint.resume(state, lambda: unfinished(state, [*vectors], settings.steps, before)))

        def step(differentiate: Callable[[Tensor], float]) -> tuple:
            shown = draw(len(latents), settings.batch_size, generator)
            (row,) = draw(len(named.templates), 1, generator)
            x_t, t, noise = diffuse(host, latents[shown], generator)
            prompts = host.encode_vectors(named.templates[row], vectors).expand(len(x_t))
            epsilon = host.predict(x_t, t, prompts)
            error = (epsilon - noise).square()
            if weight is not None:
                error = error * weight[[i % len(weight) for i in shown]]
            differentiate(error.sum())
            return x_t, t, epsilon.detach(), error.detach().mean().item()

        def guess(decoder: Callable[[Tensor], Tensor], x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
            return decoder(predicted_x0(x_t, epsilon, host.alphas_cumprod.to(x_t)[t]))

        while len(losses) < settings.steps and (taken := descent.take(step)) is not None:
            x_t, t, epsilon, error = taken
            if settings.norm_decay:
                pull_norms(vectors, norms, NORM_PULL)
            losses.append(error)
            checkpoint.keep()
            host.progress(len(losses), settings.steps, decoder and partial(guess, decoder, x_t[:1], t[:1], epsilon[:1]))
        learned = {name: v.detach() for name, v in vectors.items()}
        whole = len(losses) == settings.steps
        after, well = settled(state, lambda: probe_error(host, probe, named.templates[0], learned), whole)
    if not well:
        warnings.append(diverged(len(losses), settings.steps))
    elif not after < before:
        warnings.append("Nothing was learned: lower the learning rate, or take more steps.")
    return Inversion({name: v.cpu() for name, v in learned.items()}, losses, before, after, warnings)


def unfinished(state: State, names: list[str], steps: int, before: float) -> Inversion:
    """What was learned by a training that was stopped; how well is not measured."""
    learned = dict(zip(names, state.parameters, strict=True))
    told = (
        f"Unfinished: stopped after step {len(state.losses)} of {steps}. Queued again, the same inputs go on from the last "
        "saved step."
    )
    vectors = {name: v.detach().cpu().clone() for name, v in learned.items()}
    return Inversion(vectors, state.losses, before, state.losses[-1], [told])


@torch.no_grad()
def probe_error(host: DiffusionHost, probe: tuple[Tensor, Tensor, Tensor], template: str, vectors: WordVectors) -> float:
    """The mean squared error of the noise estimate over fixed x_t, t and epsilon, one at a time."""
    prompts = host.encode_vectors(template, vectors)
    errors = []
    for i in range(PROBES):
        host.check_interrupt()
        x_t, t, noise = (x[i : i + 1] for x in probe)
        errors.append((host.predict(x_t, t, prompts) - noise).square().mean().item())
    return sum(errors) / PROBES


def first_vectors(
    host: DiffusionHost, settings: InvertSettings, norms: dict[str, Tensor], generator: torch.Generator
) -> WordVectors:
    """One vector [n, D] for each initialiser: a word's own, noise or zero; raises ForgetError for any other."""
    rows, some = [], host.word_vectors("a")
    for word in (word.strip() for word in settings.initializers.split("|")):
        noise = RANDOM.fullmatch(word)
        if noise:
            row = {name: torch.randn(v.shape, generator=generator) * float(noise[1]) for name, v in some.items()}
            if settings.norm_decay:  # where the decay takes noise of any size anyway
                pull_norms(row, norms, 1.0)
        elif number := TOKEN_ID.fullmatch(word):
            row = host.token_vectors(int(number[1]))
        elif word == "<zero>":
            row = {name: torch.zeros_like(v) for name, v in some.items()}
        else:
            row = host.word_vectors(word)
            if any(len(v) != 1 for v in row.values()):
                raise ForgetError(
                    f"The initialiser `{word}` is {len(next(iter(row.values())))} tokens and must be one: take a shorter or "
                    "commoner word, <rand-1> or <zero>, and `|` between several."
                )
        rows.append(row)
    if len(rows) > MOST_VECTORS:
        raise ForgetError(f"{len(rows)} initialisers do not fit into a prompt: give {MOST_VECTORS} or fewer.")
    return {name: torch.cat([row[name] for row in rows]) for name in some}


@torch.no_grad()
def pull_norms(vectors: WordVectors, norms: dict[str, Tensor], share: float) -> None:
    """Brings the norms of vectors this share of the way to a word's, in place."""
    for name, v in vectors.items():
        norm = v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        v.mul_(1 + share * (norms[name].to(v) / norm - 1))


def error_weight(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask [P, H, W] as weights of the squared error [P, 1, h, w]: a little outside, 1 in the mean."""
    weight = F.interpolate(mask[:, None].to(latents), latents.shape[-2:], mode="area") + OUTSIDE
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)
