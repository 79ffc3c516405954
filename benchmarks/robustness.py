"""How far a concept is gone from the weights, and not from the prompts alone."""

from functools import cache

import torch

from benchmarks.baselines import applied
from benchmarks.prompts import HEAD
from demo.evaluate import GUIDANCE, STEPS, sample
from fmn_core.evaluation.recovery import LEARNING_RATE, text_cosine
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert
from fmn_core.text.concept import PROMPT_TEMPLATES
from fmn_core.training.loop import TrainingRun
from fmn_core.training.sampling import sample_ddim

ANCHORS, SHOWN = 8, 8
ATTACKED = ("cat", "rose", "neon", "ada")  # alone: an inversion takes longer than all the pictures of a target


@cache
def anchors(host, kind, name):
    """Latents of pictures that the untouched model makes of the concept, and what words learned there are worth."""
    prompt = PROMPT_TEMPLATES[kind].replace("{}", name)
    return host.encode_images(sample(host, [prompt] * ANCHORS, range(900_000, 900_000 + ANCHORS)))


def learned_back(host, weights, kind, names, classifier, steps=300):
    """What words learned on the edited model from pictures of the first name bring back: `m_score`, the Memorization
    Score (arXiv 2303.17591, section 4: the cosine of the learned words' text embedding to the name's), and `recovery`,
    the share of pictures recognised again; None where it is not measured."""
    if len(names) > 1 or names[0] not in ATTACKED:
        return {"m_score": None, "recovery": None}
    name, template = names[0], PROMPT_TEMPLATES[kind]
    latents = anchors(host, kind, name)
    settings = InversionConfig(concept_type=kind, init_tokens="<rand-1>|<rand-1>", steps=steps, learning_rate=LEARNING_RATE)
    named, empty = host.encode([template.replace("{}", name)]), host.encode([""])
    noise = torch.randn(SHOWN, *latents.shape[1:], generator=torch.Generator().manual_seed(1))
    with applied(host, weights):
        vectors = invert(TrainingRun(host, settings), latents).vectors
        with host.training(noise.shape, text=True), torch.no_grad():
            words = host.encode_with_embeddings(template, vectors)
            made = sample_ddim(host, noise, words[[0] * SHOWN], empty[[0] * SHOWN], steps=STEPS, guidance=GUIDANCE)
    seen = classifier.names(HEAD[kind], classifier.features(host.decode(made)))
    return {"m_score": text_cosine(words, named), "recovery": seen.count(name) / SHOWN}
