"""The preset `robust`: a patch trained against words that are learned to bring the concept back.

The closed form starts a LoRA on all four projections of the cross-attention. It is trained in rounds under the hybrid
loss, and between them words are learned with which the model so far draws the concept again (the attack of Circumventing
Concept Erasure, Pham et al., arXiv 2308.01508); they are names of the concept from then on (as in STEREO, Srivatsan et
al., arXiv 2408.16807). Unlike the closed form, queries and outputs see the picture, and not the text alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .concept import Concept, find_tokens
from .errors import ForgetError
from .fast import Edit, Task, edit_factors, make_edit
from .hosts.base import MATRICES, DiffusionHost, placeholder_texts
from .hybrid import Pictures, Texts, finish, gather, gather_calls, make_batch, make_probe, sample, train_step
from .inversion import invert
from .lora import CrossAttentionLoRA
from .patch import Patch
from .resteering import preview
from .sampling import sampling_calls
from .settings import ForgetSettings, InvertSettings

WORDS, LEARNED_STEPS, LEARNED_RATE, LEARNED_BATCH = 2, 120, 1e-2, 2  # of an attack
NEAR = 12  # pictures of near words
ETA = 1.0  # how far beyond what stands in its place the concept's estimate should go


def forget_robust(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Patch, list[float]]:
    """A patch in closed form, trained on pictures in rounds against learned words; returns it and the loss of each step.

    Arguments as for `forget`. Raises ForgetError in the mode `correct`, where the concept itself stays.
    """
    if settings.mode == "correct":
        raise ForgetError("The preset `robust` removes or replaces, it cannot correct: choose `fast` or `balanced`.")
    generator = torch.Generator().manual_seed(settings.seed)
    edit = make_edit(host, concepts, settings)
    texts = Texts.of(host, edit.task)
    near = texts.near.take([*range(min(NEAR, len(texts.near)))])
    calls = gather_calls(texts, settings, images) + sampling_calls(len(near), settings.sampling_steps)
    attacks = settings.rounds * texts.concepts * LEARNED_STEPS
    with host.one_bar(calls + attacks + settings.steps * (settings.rounds + 1)):
        pictures = gather(host, texts, settings, images, mask, generator)
        shape = pictures.latents.shape[1:]
        pictures = replace(pictures, near=sample(host, near, texts.empty, settings, generator, shape))
        shape = (3 * settings.batch_size, *shape)  # the concept's prompts, near ones on its pictures and on their own
        losses, errors, diverged = [], [], False
        with host.training(shape):
            lora = start(host, edit, settings, generator)
            probe = make_probe(host, lora, texts, pictures, settings, ETA, generator)
            readings = {"before": probe(0.0), "fast": probe(1.0)}
            optimizer = torch.optim.AdamW(lora.parameters(), lr=settings.learning_rate, weight_decay=0)
        for round in range(settings.rounds + 1):
            if losses and host.stops():
                break
            if round:
                texts, error = attack(host, lora, edit.task, texts, pictures, (settings.seed + round) % 2**64)
                errors.append(error)
            with host.training(shape):
                for _ in range(settings.steps):
                    if losses and host.stops():
                        break
                    host.check_interrupt()
                    batch = make_batch(host, texts, pictures, settings, settings.batch_size, ETA, generator)
                    before = [parameter.detach().clone() for parameter in lora.parameters()]
                    loss, maps = train_step(host, lora, optimizer, texts, pictures, batch)
                    diverged = not math.isfinite(loss)
                    if diverged:
                        break
                    good = before
                    losses.append(loss)
                    shown = preview(maps, texts.columns[batch.rows], pictures.images, batch.shown, batch.x_t)
                    host.progress(len(losses), settings.steps * (settings.rounds + 1), shown)
            if diverged:
                break
        if not losses:
            raise ForgetError("The loss is not finite at step 1: look for broken pictures.")
        with host.training(shape):
            if diverged:
                with torch.no_grad():
                    for parameter, value in zip(lora.parameters(), good, strict=True):
                        parameter.copy_(value)
            readings["after"] = probe(1.0)
            edit = replace(edit, report=edit.report | {"error with learned words": errors})
            return finish(host, lora, concepts, settings, edit, readings, 1.0, losses, diverged), losses


def start(host: DiffusionHost, edit: Edit, settings: ForgetSettings, generator: torch.Generator) -> CrossAttentionLoRA:
    """A LoRA on all projections, the edit on K and V, with room for `rank` more."""
    rank = edit.up.shape[1]
    lora = CrossAttentionLoRA(host.cross_attentions(), MATRICES, rank + settings.rank, generator).to(host.device)
    with torch.no_grad():
        for target, (up, down) in edit_factors(host, edit, replace(settings, matrices="k v")).items():
            lora.adapter(*target).up[:, :rank] = up
            lora.adapter(*target).down[:rank] = down
    return lora


def attack(
    host: DiffusionHost, lora: CrossAttentionLoRA, task: Task, texts: Texts, pictures: Pictures, seed: int
) -> tuple[Texts, float]:
    """The prompts with words learned for each concept, in every template, on the patched model; and the mean error of its
    noise estimates with them."""
    inverting = InvertSettings(
        concept_type=task.type,
        initializers="|".join(["<rand-1>"] * WORDS),
        steps=LEARNED_STEPS,
        learning_rate=LEARNED_RATE,
        batch_size=LEARNED_BATCH,
        seed=seed,
    )
    errors, sought = [], host.tokenize(placeholder_texts("{}", WORDS)[0])
    for concept in range(len(task.names)):
        with lora.attached():
            inversion = invert(host, pictures.of(concept), inverting)
        errors.append(inversion.after)
        with host.training((1, *host.latent_shape()), text=True), torch.no_grad():
            for index, template in enumerate(task.asked):
                prompt = host.encode_vectors(template, inversion.vectors)
                columns = torch.zeros(prompt.embeddings.shape[1], dtype=torch.bool)
                columns[find_tokens(prompt.tokens[0], sought)[0]] = True
                texts = texts.with_row(prompt, columns, concept, index)
    return texts, sum(errors) / len(errors)
