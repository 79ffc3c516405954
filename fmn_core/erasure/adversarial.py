"""The preset `robust`: a patch trained against words that are learned to bring the concept back.

The closed form starts a LoRA on all four projections of the cross-attention. It is trained in rounds under the hybrid
loss, and between them words are learned with which the model so far draws the concept again (the attack of Circumventing
Concept Erasure, Pham et al., arXiv 2308.01508); they are names of the concept from then on (as in STEREO, Srivatsan et
al., arXiv 2408.16807). Unlike the closed form, queries and outputs see the picture, and not the text alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..host import MATRICES, DiffusionHost, Prompts, Token, TokenEmbeddings
from ..inversion.config import InversionConfig
from ..inversion.textual_inversion import invert
from ..log import phase
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch
from ..text.templates import placeholder_texts
from ..text.tokens import find_tokens
from ..training.loop import Descent, TrainingLoop, TrainingRun, diverged, settled
from ..training.sampling import sampling_calls
from ..training.state import State
from .closed_form import LinearEdit, edit_factors, make_edit
from .hybrid import HybridTraining
from .training_data import PromptSet, images_steps, make_images, sample

WORDS, LEARNED_STEPS, LEARNED_RATE, LEARNED_BATCH = 2, 120, 1e-2, 2  # of an attack
NEAR = 12  # pictures of near words
ETA = 1.0  # how far beyond its target the concept's estimate should go


def forget_robust(run: TrainingRun) -> tuple[Patch, list[float]]:
    """A patch in closed form, trained on pictures in rounds against learned words; returns it and the loss of each step.
    Raises ForgetError for inputs that cannot work."""
    host, config = run.host, run.config
    host.token_embeddings("a")  # a host that cannot learn words says so now
    generator = torch.Generator().manual_seed(config.seed)
    edit = make_edit(host, run.concepts, config)
    prompts = PromptSet.of(host, edit.plan)
    near = prompts.near[[*range(min(NEAR, len(prompts.near)))]]
    sampling = images_steps(run, prompts.concepts) + sampling_calls(len(near), config.num_inference_steps)
    attacks = config.attack_rounds * prompts.concepts * LEARNED_STEPS
    steps = config.steps * (config.attack_rounds + 1)
    with host.progress(sampling + attacks + steps) as bar:
        images = make_images(run, prompts, generator)
        one = images.latents.shape[1:]
        images = replace(images, near=sample(host, near, prompts.empty, config, generator, shape=one))
        shape = (3 * config.batch_size, *one)  # the concept's prompts, near ones on its pictures and on their own
        with host.training(shape):
            lora = start(host, edit, config.rank, generator)
            training = HybridTraining(run, edit, lora, prompts, images, generator, ETA)
            probe = training.make_probe()
            results = {"before": probe(0.0), "fast": probe(1.0)}
            checkpointing = training.checkpointing(shape[0], steps)
        state = new_attack_state(lora, config.learning_rate, generator)
        losses, errors = state.losses, state.figures["errors"]
        loop, finite = TrainingLoop(run, Descent(checkpointing, state), steps), True
        run.checkpoint.resume(state, lambda: training.unfinished_patch(losses, steps))
        bar.skip(len(losses) + len(errors) * LEARNED_STEPS)
        for number in range(config.attack_rounds + 1):
            if number:
                attack(training, state, number)
            with host.training(shape), phase("forget.train", preset="robust", round=number) as info:
                finite = loop.take_steps(config.steps * (number + 1), training.next_step)
                info["steps"] = len(losses)
            if not finite:
                break
        with host.training(shape):
            results["after"], finite = settled(state, lambda: probe(1.0), finite)
            warnings = [] if finite else [diverged(len(losses), steps)]
            rounds = torch.tensor(errors, dtype=torch.float64).reshape(-1, prompts.concepts).mean(1).tolist()
            return training.finish(results, 1.0, losses, warnings, learned_word_errors=rounds), losses


def new_attack_state(lora: CrossAttentionLoRA, learning_rate: float, generator: torch.Generator) -> State:
    """The state of a training that has not begun: `words` learned in attacks, an encoder's after another's, and the `errors`
    of the noise estimates with them."""
    parameters = [*lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0)
    return State(parameters, optimizer, generator, figures={"errors": []}, tensors={"words": []})


def start(host: DiffusionHost, edit: LinearEdit, room: int, generator: torch.Generator) -> CrossAttentionLoRA:
    """A LoRA on all projections, the edit on K and V, with room for so many ranks more."""
    rank = edit.up.shape[1]
    lora = CrossAttentionLoRA(host.cross_attentions(), MATRICES, rank + room, generator).to(host.device)
    with torch.no_grad():
        for target, (up, down) in edit_factors(host, edit, ("to_k", "to_v")).items():
            lora.adapter(*target).up[:, :rank] = up
            lora.adapter(*target).down[:rank] = down
    return lora


def attack(training: HybridTraining, state: State, number: int) -> None:
    """Learns words for each concept on the patched model, and adds them, in every template, to the training's prompts. The
    words and the mean errors of its noise estimates with them go into the state; those that an earlier run has learned are
    taken from it."""
    host, config, plan = training.run.host, training.run.config, training.edit.plan
    settings = InversionConfig(
        concept_type=plan.type,
        init_tokens="|".join(["<rand-1>"] * WORDS),
        steps=LEARNED_STEPS,
        learning_rate=LEARNED_RATE,
        batch_size=LEARNED_BATCH,
        seed=(config.seed + number) % 2**64,
    )
    words, errors, encoders = state.tensors["words"], state.figures["errors"], sorted(host.token_embeddings("a"))
    for concept in range(len(plan.names)):
        attacks = (number - 1) * len(plan.names) + concept
        if attacks == len(errors):
            with training.lora.attached(), phase("forget.attack", round=number, concept=concept) as info:
                inversion = invert(TrainingRun(host, settings), training.images.of(concept))
                info["error"] = inversion.after
            words += [inversion.vectors[name] for name in encoders]
            errors.append(inversion.after)
            training.run.checkpoint.keep(now=True)
        own = words[attacks * len(encoders) : (attacks + 1) * len(encoders)]
        add_words(training, dict(zip(encoders, own, strict=True)), concept)


def add_words(training: HybridTraining, embeddings: TokenEmbeddings, concept: int) -> None:
    """Adds a concept's learned words, in every template, to the training's prompts."""
    host = training.run.host
    phrase = host.tokenize(placeholder_texts("{}", WORDS)[0])
    with host.training((1, *host.latent_shape()), text=True), torch.no_grad():
        for index, template in enumerate(training.edit.plan.prompts):
            prompt = host.encode_with_embeddings(template, embeddings)
            training.prompts = training.prompts.with_row(prompt, learned_mask(prompt, phrase), concept, index)


def learned_mask(prompt: Prompts, phrase: tuple[Token, ...]) -> Tensor:
    """The mask [T] of the learned words in an encoded prompt."""
    mask = torch.zeros(prompt.prompt_embeds.shape[1], dtype=torch.bool)
    mask[find_tokens(prompt.tokens[0], phrase)[0]] = True
    return mask
