"""The preset `robust`: `balanced`, made to withstand words that are learned to bring the concept back.

In rounds, words are learned with which the patched model draws the concept again (the attack of Circumventing Concept
Erasure, Pham et al., arXiv 2308.01508), and the closed form is solved anew with them as further names of the concept
(the two stages of STEREO, Srivatsan et al., arXiv 2408.16807, with the erasure in closed form).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .balanced import Pictures, gather, refine
from .concept import Concept, find_tokens
from .errors import ForgetError
from .fast import Edit, Places, edit_factors, make_edit
from .hosts.base import DiffusionHost, WordVectors, placeholder_texts
from .inversion import Inversion, invert
from .lora import CrossAttentionLoRA
from .paraphrases import PADDING, Place
from .patch import Patch
from .settings import ForgetSettings, InvertSettings

WORDS = 4  # learned in each round
STEPS, LEARNING_RATE, BATCH = 200, 5e-3, 4  # of learning them


def forget_robust(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Patch, list[float]]:
    """A patch in closed form, hardened in rounds and refined on pictures; returns it and the loss of each step.

    Arguments as for `forget`. Raises ForgetError in the mode `correct`, where the concept itself stays.
    """
    if settings.mode == "correct":
        raise ForgetError("The preset `robust` removes or replaces, it cannot correct: choose `fast` or `balanced`.")
    learned: dict[str, list[Places]] = {}
    errors: dict[str, list[float]] = {}
    edit = make_edit(host, concepts, settings)
    pictures = gather(host, edit.task, settings, images, mask)
    for round in range(settings.rounds):
        for index, name in enumerate(edit.task.names):
            inversion = attack(host, edit, settings, pictures, index, settings.seed + round)
            learned.setdefault(name, []).append(read_places(host, inversion.vectors, edit.task.templates))
            errors.setdefault(name, []).append(inversion.after)
        edit = make_edit(host, concepts, settings, learned)
    edit = replace(edit, report=edit.report | {"error with learned words": errors})
    return refine(host, concepts, settings, edit, pictures)


def attack(
    host: DiffusionHost, edit: Edit, settings: ForgetSettings, pictures: Pictures, concept: int, seed: int
) -> Inversion:
    """Words that call for one of the concepts, by its number, in the model with the edit."""
    inverting = InvertSettings(
        concept_type=edit.task.type,
        initializers="|".join(["<rand-1>"] * WORDS),
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        seed=seed,
    )
    with CrossAttentionLoRA.of(host, edit_factors(host, edit, settings)).attached():
        return invert(host, pictures.of(concept), inverting)


def read_places(host: DiffusionHost, words: WordVectors, templates: tuple[str, ...]) -> Places:
    """Where learned words stand in every template, as far as the tokenizer keeps them whole."""
    places, count = {}, len(next(iter(words.values())))
    with host.training((1, *host.latent_shape()), text=True), torch.no_grad():
        words = {name: vectors.to(host.device) for name, vectors in words.items()}
        sought = host.tokenize(placeholder_texts("{}", count)[0])
        for template in templates:
            prompts = host.encode_vectors(template, words)
            tokens, columns = prompts.tokens[0], prompts.embeddings[0].cpu().double()
            mentions = find_tokens(tokens, sought)
            if mentions:
                end = [token.kind for token in tokens].index("end")
                places[template] = Place(columns[mentions[0]], columns[mentions[0][-1] + 1 : end + 1 + PADDING])
    return places
