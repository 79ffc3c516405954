"""The preset `robust`: a patch trained against words that are learned to bring the concept back.

The closed form starts a LoRA on all four projections of the cross-attention. It is trained in rounds under the hybrid
loss, and between them words are learned with which the model so far draws the concept again (the attack of Circumventing
Concept Erasure, Pham et al., arXiv 2308.01508); they are names of the concept from then on (as in STEREO, Srivatsan et
al., arXiv 2408.16807). Unlike the closed form, queries and outputs see the picture, and not the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import ForgetError
from ..host import MATRICES, DiffusionHost, Token, WordVectors, placeholder_texts
from ..inversion.config import InvertSettings
from ..inversion.textual_inversion import invert
from ..log import phase
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch
from ..text.concept import Concept, find_tokens
from ..training.checkpoint import Checkpoint
from ..training.loop import Descent, diverged, settled
from ..training.sampling import sampling_calls
from ..training.state import State
from .closed_form import Edit, edit_factors, make_edit
from .config import ForgetSettings
from .hybrid import (
    Pictures,
    Texts,
    batch_preview,
    finish,
    gather,
    gather_calls,
    make_batch,
    make_economy,
    make_probe,
    sample,
    train_step,
    unfinished_patch,
)
from .plan import Task

WORDS, LEARNED_STEPS, LEARNED_RATE, LEARNED_BATCH = 2, 120, 1e-2, 2  # of an attack
NEAR = 12  # pictures of near words
ETA = 1.0  # how far beyond what stands in its place the concept's estimate should go


def forget_robust(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    concept_of: Sequence[int] | None = None,
) -> tuple[Patch, list[float]]:
    """A patch in closed form, trained on pictures in rounds against learned words; returns it and the loss of each step.

    Arguments as for `forget`. Raises ForgetError in the mode `correct`, where the concept itself stays.
    """
    if settings.mode == "correct":
        raise ForgetError("The preset `robust` removes or replaces, it cannot correct: choose `fast` or `balanced`.")
    host.word_vectors("a")  # a host that cannot learn words says so now
    generator = torch.Generator().manual_seed(settings.seed)
    edit = make_edit(host, concepts, settings)
    texts = Texts.of(host, edit.task)
    near = texts.near.take([*range(min(NEAR, len(texts.near)))])
    calls = gather_calls(texts, settings, images) + sampling_calls(len(near), settings.sampling_steps)
    attacks = settings.rounds * texts.concepts * LEARNED_STEPS
    with host.one_bar(calls + attacks + settings.steps * (settings.rounds + 1)):
        pictures = gather(host, texts, settings, images, mask, generator, concept_of)
        shape = pictures.latents.shape[1:]
        pictures = replace(pictures, near=sample(host, near, texts.empty, settings, generator, shape))
        shape = (3 * settings.batch_size, *shape)  # the concept's prompts, near ones on its pictures and on their own
        steps = settings.steps * (settings.rounds + 1)
        with host.training(shape):
            lora = start(host, edit, settings, generator)
            probe = make_probe(host, lora, texts, pictures, settings, ETA, generator)
            readings = {"before": probe(0.0), "fast": probe(1.0)}
            economy = make_economy(host, texts, pictures, shape[0], steps)
        state, checkpoint = training_state(lora, settings, generator), checkpoint or Checkpoint()
        losses, errors, descent, taken = state.losses, state.figures["errors"], Descent(economy, state), True
        checkpoint.resume(state, lambda: unfinished_patch(host, lora, concepts, settings, edit, losses, steps))
        host.skip(len(losses) + len(errors) * LEARNED_STEPS)
        for round in range(settings.rounds + 1):
            if round:
                texts = attack(host, lora, edit.task, texts, pictures, round, settings, state, checkpoint)
            with host.training(shape), phase("forget.train", preset="robust", round=round) as told:
                while len(losses) < settings.steps * (round + 1):
                    host.check_interrupt()
                    batch = make_batch(host, texts, pictures, settings, settings.batch_size, ETA, generator)
                    taken = train_step(host, lora, descent, texts, pictures, batch)
                    if taken is None:
                        break
                    loss, maps = taken
                    losses.append(loss)
                    checkpoint.keep()
                    host.progress(len(losses), steps, partial(batch_preview, maps, texts, pictures, batch))
                told["steps"] = len(losses)
            if taken is None:
                break
        with host.training(shape):
            readings["after"], well = settled(state, lambda: probe(1.0), taken is not None)
            found = [] if well else [diverged(len(losses), steps)]
            rounds = torch.tensor(errors, dtype=torch.float64).reshape(-1, texts.concepts).mean(1).tolist()
            edit = replace(edit, report=edit.report | {"error with learned words": rounds})
            return finish(host, lora, concepts, settings, edit, texts, readings, 1.0, losses, found), losses


def training_state(lora: CrossAttentionLoRA, settings: ForgetSettings, generator: torch.Generator) -> State:
    """The state of a training that has not begun: `words` learned in attacks, an encoder's after another's, and the `errors`
    of the noise estimates with them."""
    parameters = [*lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0)
    return State(parameters, optimizer, generator, figures={"errors": []}, tensors={"words": []})


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
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    task: Task,
    texts: Texts,
    pictures: Pictures,
    round: int,
    settings: ForgetSettings,
    state: State,
    checkpoint: Checkpoint,
) -> Texts:
    """The prompts with words learned for each concept, in every template, on the patched model. The words and the mean
    errors of its noise estimates with them go into the state; those that an earlier run has learned are taken from it."""
    inverting = InvertSettings(
        concept_type=task.type,
        initializers="|".join(["<rand-1>"] * WORDS),
        steps=LEARNED_STEPS,
        learning_rate=LEARNED_RATE,
        batch_size=LEARNED_BATCH,
        seed=(settings.seed + round) % 2**64,
    )
    sought = host.tokenize(placeholder_texts("{}", WORDS)[0])
    words, errors, encoders = state.tensors["words"], state.figures["errors"], sorted(host.word_vectors("a"))
    for concept in range(len(task.names)):
        number = (round - 1) * len(task.names) + concept
        if number == len(errors):
            with lora.attached(), phase("forget.attack", round=round, concept=concept) as told:
                inversion = invert(host, pictures.of(concept), inverting)
                told["error"] = inversion.after
            words += [inversion.vectors[name] for name in encoders]
            errors.append(inversion.after)
            checkpoint.keep(now=True)
        own = words[number * len(encoders) : (number + 1) * len(encoders)]
        texts = with_words(host, texts, task, dict(zip(encoders, own, strict=True)), concept, sought)
    return texts


def with_words(
    host: DiffusionHost, texts: Texts, task: Task, vectors: WordVectors, concept: int, sought: tuple[Token, ...]
) -> Texts:
    """The prompts with those of a concept's learned words in every template."""
    with host.training((1, *host.latent_shape()), text=True), torch.no_grad():
        for index, template in enumerate(task.asked):
            prompt = host.encode_vectors(template, vectors)
            columns = torch.zeros(prompt.embeddings.shape[1], dtype=torch.bool)
            columns[find_tokens(prompt.tokens[0], sought)[0]] = True
            texts = texts.with_row(prompt, columns, concept, index)
    return texts
