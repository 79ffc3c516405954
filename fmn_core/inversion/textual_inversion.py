"""Concept inversion: words that call for what some pictures show (textual inversion, Gal et al., arXiv 2208.01618)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost, TokenEmbeddings
from ..log import logger, phase, quoted
from ..text.concept import make_concepts
from ..text.vocabulary import NOUNS
from ..training.checkpoint import Checkpoint
from ..training.images import prepare_pictures
from ..training.loop import Descent, Differentiate, Preview, TrainingLoop, TrainingRun, diverged, settled, unfinished
from ..training.losses import predicted_x0
from ..training.memory import AdaptiveCheckpointing, out_of_memory_told
from ..training.noise import add_noise, draw
from ..training.preview import linear_decoder
from ..training.sampling import AT_ONCE, sample_pairs, sampling_calls
from ..training.state import State
from .config import InversionConfig
from .embedding import require_embeddings

WEIGHT_DECAY = 0.1  # the original's weight_decay_ti
NORM_PULL = 0.1  # of the way to a word's norm, each step (the original: min(1, 100 * learning rate), 0.1 at its default)
OUTSIDE_WEIGHT = 0.05  # what counts outside a mask, beside 1 inside
MOST_VECTORS = 64  # with a template's words, what fits into the 77 columns of a prompt
PROBES = 8  # fixed noisy latents, for the error before and after: single steps depend on their timesteps
RANDOM = re.compile(r"<rand-(\d*\.?\d+)>")
TOKEN_ID = re.compile(r"<id-(\d+)>")


@dataclass(frozen=True)
class Inversion:
    """Vectors that stand for a concept in the place of words, the loss of each step, the loss on fixed noisy latents
    before and after, and what a user should know."""

    vectors: TokenEmbeddings
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
    config: InversionConfig,
    *,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    concept: str = "",
    checkpoint: Checkpoint | None = None,
) -> Inversion:
    """Words for what pictures show: `images` [P, H, W, 3] in 0..1, or pictures that the model makes of `concept`.

    `mask` [1 or P, H, W] in 0..1 says where in them it is. Inside a `checkpoint`, which the caller has entered, the learning
    resumes an earlier run with the same inputs. Raises ForgetError for inputs that cannot work.
    """
    checkpoint = checkpoint or Checkpoint()
    with out_of_memory_told(), host.sized(config.resolution), phase("invert", seed=config.seed) as info:
        (named,) = make_concepts("{}", config.concept_type, config.template)
        require_embeddings(host, *named.templates)
        texts = ("" if images is not None else concept, config.template, config.init_tokens)
        checkpoint.begin(host, texts, "invert", asdict(config), images, mask)
        images, mask = prepare_pictures(host, images, mask, config.horizontal_flip)
        made = 0 if images is not None else sampling_calls(config.num_images, config.num_inference_steps)
        with host.progress(made + config.steps):
            latents = make_latents(host, config, concept) if images is None else host.encode_images(images)
            if images is None and host.may_show_previews():
                images = host.decode(latents)
            run = TrainingRun(host, config, images=images, mask=mask, checkpoint=checkpoint)
            inversion = invert(run, latents)
        checkpoint.done()
        for warning in inversion.warnings:
            logger.warning("invert.warning %s", quoted(warning))
        info |= {"steps": len(inversion.losses), "before": inversion.before, "after": inversion.after}
    return inversion


def make_latents(host: DiffusionHost, config: InversionConfig, concept: str) -> Tensor:
    """Latents [P, C, h, w] of pictures that the model makes of a concept."""
    (named,) = make_concepts(" ".join(concept.splitlines()), config.concept_type, config.template)
    require_embeddings(host, concept)
    prompts, empty = host.encode([prompt for prompt, _ in named.prompts]), host.encode([""])
    with host.training((AT_ONCE, *host.latent_shape())):
        generator = torch.Generator().manual_seed(config.seed)
        rows = [i % len(prompts) for i in range(config.num_images)]
        return sample_pairs(host, prompts[rows], empty, config=config, generator=generator)[0]


def invert(run: TrainingRun, latents: Tensor) -> Inversion:
    """Learns vectors with which the model denoises latents [P, C, h, w] best, all else frozen.

    AdamW on the mean squared error of the noise estimate at uniform timesteps (Gal et al., eq. 2); the vectors' norms
    are drawn to those of the text encoder's own words (the original's `clip_ti_decay`, which draws them to SD's 0.4).
    The run's mask weights the error; its images are what the latents encode, for the preview.
    What is hooked onto the model stays on it: a patched model learns what the patch has left.
    Raises ForgetError for init tokens that cannot work, and where the latents or the first loss are not finite.
    """
    host, config = run.host, run.config
    if not latents.isfinite().all():
        raise ForgetError(
            "The pictures' latents are not finite: look for broken pictures, or a model or VAE that overflows in half "
            "precision."
        )
    generator = torch.Generator().manual_seed(config.seed)
    (named,) = make_concepts("{}", config.concept_type, config.template)
    norms = {name: v.norm(dim=-1).mean() for name, v in host.token_embeddings(" ".join(NOUNS)).items()}
    first = first_vectors(host, config, norms, generator)
    weight = None if run.mask is None else error_weight(run.mask, latents)
    decoder = linear_decoder(latents, run.images) if run.images is not None and host.may_show_previews() else None
    warnings = []
    probe = add_noise(host, latents[draw(len(latents), PROBES, generator)], generator)
    with host.training((config.batch_size, *latents.shape[1:]), text=True), host.progress(config.steps) as bar:
        vectors = {name: v.to(host.device).requires_grad_() for name, v in first.items()}
        before = probe_error(host, probe, named.templates[0], vectors)
        optimizer = torch.optim.AdamW(vectors.values(), lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
        # The loss is a sum, as large as half precision likes it, because AdamW minds no scale.
        state = State([*vectors.values()], optimizer, generator, most_scale=1.0)
        descent = Descent(AdaptiveCheckpointing(host), state, max_norm=None)
        bar.skip(run.checkpoint.resume(state, lambda: unfinished_inversion(state, [*vectors], config.steps, before)))

        def step(differentiate: Differentiate) -> tuple[float, Preview | None]:
            indices = draw(len(latents), config.batch_size, generator)
            (row,) = draw(len(named.templates), 1, generator)
            x_t, t, noise = add_noise(host, latents[indices], generator)
            prompts = host.encode_with_embeddings(named.templates[row], vectors).expand(len(x_t))
            epsilon = host.predict(x_t, t, prompts)
            error = (epsilon - noise).square()
            if weight is not None:
                error = error * weight[[i % len(weight) for i in indices]]
            differentiate(error.sum())
            first, alpha_bar = (x_t[:1], epsilon.detach()[:1]), host.alphas_cumprod.to(x_t)[t[:1]]
            return error.detach().mean().item(), decoder and (lambda: decoder(predicted_x0(*first, alpha_bar)))

        def after_optimizer() -> None:
            if config.norm_decay:
                pull_norms(vectors, norms, NORM_PULL)

        loop = TrainingLoop(run, descent, config.steps, after_optimizer)
        finite = loop.take_steps(config.steps, lambda: step)
        learned = {name: v.detach() for name, v in vectors.items()}
        after, finite = settled(state, lambda: probe_error(host, probe, named.templates[0], learned), finite)
    losses = state.losses
    if not finite:
        warnings.append(diverged(len(losses), config.steps))
    elif not after < before:
        warnings.append("Nothing was learned: lower the learning rate, or take more steps.")
    return Inversion({name: v.cpu() for name, v in learned.items()}, losses, before, after, warnings)


def unfinished_inversion(state: State, names: list[str], steps: int, before: float) -> Inversion:
    """What was learned by a training that was stopped; how well is not measured."""
    learned = dict(zip(names, state.parameters, strict=True))
    vectors = {name: v.detach().cpu().clone() for name, v in learned.items()}
    return Inversion(vectors, state.losses, before, state.losses[-1], [unfinished(len(state.losses), steps)])


@torch.no_grad()
def probe_error(host: DiffusionHost, probe: tuple[Tensor, Tensor, Tensor], template: str, vectors: TokenEmbeddings) -> float:
    """The mean squared error of the noise estimate over fixed x_t, t and epsilon, one at a time."""
    prompts = host.encode_with_embeddings(template, vectors)
    errors = []
    for i in range(PROBES):
        host.check_interrupt()
        x_t, t, noise = (x[i : i + 1] for x in probe)
        errors.append((host.predict(x_t, t, prompts) - noise).square().mean().item())
    return sum(errors) / PROBES


def first_vectors(
    host: DiffusionHost, config: InversionConfig, norms: dict[str, Tensor], generator: torch.Generator
) -> TokenEmbeddings:
    """One vector [n, D] for each init token: a word's own, noise or zero; raises ForgetError for any other."""
    rows, some = [], host.token_embeddings("a")
    for word in (word.strip() for word in config.init_tokens.split("|")):
        noise = RANDOM.fullmatch(word)
        if noise:
            row = {name: torch.randn(v.shape, generator=generator) * float(noise[1]) for name, v in some.items()}
            if config.norm_decay:  # where the decay takes noise of any size anyway
                pull_norms(row, norms, 1.0)
        elif number := TOKEN_ID.fullmatch(word):
            row = host.token_embedding(int(number[1]))
        elif word == "<zero>":
            row = {name: torch.zeros_like(v) for name, v in some.items()}
        else:
            row = host.token_embeddings(word)
            if any(len(v) != 1 for v in row.values()):
                raise ForgetError(
                    f"The init token `{word}` is {len(next(iter(row.values())))} tokens and must be one: take a shorter or "
                    "commoner word, <rand-1> or <zero>, and `|` between several."
                )
        rows.append(row)
    if len(rows) > MOST_VECTORS:
        raise ForgetError(f"{len(rows)} init tokens do not fit into a prompt: give {MOST_VECTORS} or fewer.")
    return {name: torch.cat([row[name] for row in rows]) for name in some}


@torch.no_grad()
def pull_norms(vectors: TokenEmbeddings, norms: dict[str, Tensor], share: float) -> None:
    """Brings the norms of vectors this share of the way to a word's, in place."""
    for name, v in vectors.items():
        norm = v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        v.mul_(1 + share * (norms[name].to(v) / norm - 1))


def error_weight(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask [P, H, W] as weights of the squared error [P, 1, h, w]: a little outside, 1 in the mean."""
    weight = F.interpolate(mask[:, None].to(latents), latents.shape[-2:], mode="area") + OUTSIDE_WEIGHT
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)
