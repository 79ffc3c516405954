"""What learned words bring back through a patch: the M-Score, and recovery by inversion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import DiffusionHost, Prompts
from ..inversion.config import InversionConfig
from ..inversion.textual_inversion import invert
from ..patch.apply import applied
from ..patch.patch import Patch
from ..text.concept import PROMPT_TEMPLATES
from ..training.images import prepare_pictures
from ..training.loop import TrainingRun
from ..training.sampling import sample_pictures, sampling_calls
from .config import EvaluationConfig
from .metrics import noise_at_levels, noise_estimates
from .prompts import Subjects

ANCHORS = 8  # pictures the model makes of the concept: words are learned from one half and judged on the other
LEARNING_RATE = 5e-3  # that of Circumventing Concept Erasure (Pham et al., arXiv 2308.01508)
SHOWN_PICTURES = 4  # pictures drawn with the learned words


def recover(
    host: DiffusionHost, patch: Patch, subjects: Subjects, settings: EvaluationConfig, images: Tensor | None = None
) -> tuple[dict, Tensor]:
    """Learns words for the first of a patch's concepts on the base and on the patched model, from the same pictures:
    figures, and latents [SHOWN, C, h, w] of pictures that the words learned through the patch draw.

    `m_score`: Forget-Me-Not's, the cosine of the text embedding with the learned words to that with the name, before
    and after, and its drop; the paper's definition is remembered and not verified. `losses`: of the noise estimate on
    pictures that nothing was learned from. `recovery`: how far the learned words bring the patched model's loss from
    what it is with the name to what the base model's is, 0..1 (after concept inversion, Pham et al., arXiv
    2308.01508), 1 where the patch takes nothing away.
    """
    name = next(iter(subjects.names))
    template = PROMPT_TEMPLATES[subjects.kind]
    inverting = InversionConfig(
        concept_type=subjects.kind,
        init_tokens="|".join(["<rand-1>"] * settings.inversion_vectors),
        steps=settings.inversion_steps,
        learning_rate=LEARNING_RATE,
        seed=settings.seed,
    )
    prompts, empty = host.encode([template.replace("{}", name)]), host.encode([""])
    latents = anchors(host, prompts, empty, settings, images)
    learned, judged = (latents[::2], latents[1::2]) if len(latents) > 1 else (latents, latents)
    before = invert(TrainingRun(host, inverting), learned).vectors
    with applied(host, patch, settings.strength):
        after = invert(TrainingRun(host, inverting), learned).vectors
    with host.training((SHOWN_PICTURES, *latents.shape[1:]), text=True), torch.no_grad():
        with_before, with_after = (host.encode_with_embeddings(template, v) for v in (before, after))
        scores = [text_cosine(words, prompts) for words in (with_before, with_after)]
        losses = {"base, name": denoising_loss(host, judged, prompts, settings.seed)}
        losses["base, learned"] = denoising_loss(host, judged, with_before, settings.seed)
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(SHOWN_PICTURES, *latents.shape[1:], generator=generator).to(host.device)
        with applied(host, patch, settings.strength):
            losses["patched, name"] = denoising_loss(host, judged, prompts, settings.seed)
            losses["patched, learned"] = denoising_loss(host, judged, with_after, settings.seed)
            drawn = sample_pictures(
                host,
                noise,
                with_after[[0] * SHOWN_PICTURES],
                empty,
                steps=settings.num_inference_steps,
                guidance=settings.guidance_scale,
            )
    taken = losses["patched, name"] - losses["base, name"]
    back = losses["patched, name"] - losses["patched, learned"]
    figures = {
        "concept": name,
        "m_score": {"before": scores[0], "after": scores[1], "drop": scores[0] - scores[1]},
        "losses": losses,
        "recovery": 1.0 if taken <= 0 else min(max(back / taken, 0.0), 1.0),
    }
    return figures, drawn


def recover_calls(settings: EvaluationConfig, images: Tensor | None) -> int:
    """How many steps `recover` tells the host of."""
    steps = settings.num_inference_steps
    pictures = sampling_calls(SHOWN_PICTURES, steps) + (sampling_calls(ANCHORS, steps) if images is None else 0)
    return pictures + 2 * settings.inversion_steps


def anchors(
    host: DiffusionHost, prompts: Prompts, empty: Prompts, settings: EvaluationConfig, images: Tensor | None
) -> Tensor:
    """Latents [P, C, h, w] of pictures of the concept: those given, or ANCHORS that the model makes."""
    channels, height, width = host.latent_shape()
    if images is not None:
        fitted, _ = prepare_pictures(host, images, None, flip=False)
        assert fitted is not None
        return host.encode_images(fitted)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(ANCHORS, channels, height, width, generator=generator).to(host.device)
    with host.training((SHOWN_PICTURES, channels, height, width)):
        return sample_pictures(
            host, noise, prompts[[0] * ANCHORS], empty, steps=settings.num_inference_steps, guidance=settings.guidance_scale
        )


def denoising_loss(host: DiffusionHost, latents: Tensor, prompts: Prompts, seed: int) -> float:
    """Mean squared error of the noise estimate on latents [B, C, h, w] at fixed noise, with one prompt for all."""
    x_t, t, noise = noise_at_levels(host, latents, seed)
    return (noise_estimates(host, x_t, t, prompts[[0] * len(latents)]) - noise).square().mean().item()


def text_cosine(words: Prompts, named: Prompts) -> float:
    """The cosine of two prompts' text embeddings, the end token's, at which CLIP's text encoder pools."""
    ends = [p.prompt_embeds[0, [token.kind for token in p.tokens[0]].index("end")].float() for p in (words, named)]
    return F.cosine_similarity(ends[0], ends[1], dim=0).item()
