"""The preset `balanced`: the closed form, refined by attention re-steering under a hybrid loss.

The closed form starts a LoRA on K and V. Its downs stay as they are, so what the solution leaves alone (the start token,
the empty prompt, what is kept) stays left alone; its ups are trained, on given pictures of the concept or on the model's
own of what stands in its place, since the patched model draws such a picture when it is asked for the concept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..host import DiffusionHost
from ..log import phase
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch
from ..text.concept import Concept
from ..training.checkpoint import Checkpoint
from ..training.loop import Descent, diverged
from ..training.state import State
from .closed_form import edit_factors, make_edit
from .config import ForgetSettings
from .hybrid import (
    Pictures,
    Reading,
    Texts,
    batch_preview,
    finish,
    gather,
    gather_calls,
    make_batch,
    make_economy,
    make_probe,
    train_step,
    unfinished_patch,
)

STRENGTHS = (0.8, 0.9, 1.0, 1.1, 1.2)  # tried in the end
CHECK, PATIENCE = 5, 3  # steps between measurements, and how many without progress end the training


def forget_balanced(
    host: DiffusionHost,
    concepts: tuple[Concept, ...],
    settings: ForgetSettings,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    concept_of: Sequence[int] | None = None,
) -> tuple[Patch, list[float]]:
    """A patch in closed form, refined on pictures; returns it and the loss of each step. Arguments as for `forget`."""
    generator = torch.Generator().manual_seed(settings.seed)
    edit = make_edit(host, concepts, settings)
    texts = Texts.of(host, edit.task)
    with host.one_bar(gather_calls(texts, settings, images) + settings.steps):
        pictures = gather(host, texts, settings, images, mask, generator, concept_of, of_places=True)
        with host.training((2 * settings.batch_size, *pictures.latents.shape[1:])):  # the concept's prompts and near ones
            lora = CrossAttentionLoRA.of(host, edit_factors(host, edit, settings))
            probe = make_probe(host, lora, texts, pictures, settings, 0.0, generator)
            readings = {"before": probe(0.0), "fast": probe(1.0)}
            state, checkpoint = training_state(lora, settings, readings["fast"].total, generator), checkpoint or Checkpoint()
            losses, steps = state.losses, settings.steps
            host.skip(
                checkpoint.resume(state, lambda: unfinished_patch(host, lora, concepts, settings, edit, losses, steps))
            )
            economy = make_economy(host, texts, pictures, 2 * settings.batch_size, steps)
            with phase("forget.train", preset="balanced") as told:
                descent = Descent(economy, state)
                well = train(host, lora, descent, texts, pictures, settings, probe, checkpoint)
                told["steps"] = len(losses)
            tried = {strength: probe(strength) for strength in STRENGTHS}
            strength = min(tried, key=lambda strength: tried[strength].total)
            readings["after"] = tried[strength]
            found = [] if well else [diverged(len(losses), steps, "best")]
            return finish(host, lora, concepts, settings, edit, texts, readings, strength, losses, found), losses


def training_state(lora: CrossAttentionLoRA, settings: ForgetSettings, first: float, generator: torch.Generator) -> State:
    """The state of a training of the ups that has not begun: `totals` of the probe so far, `best` ups so far."""
    ups = [adapter.up for adapter in lora.values()]
    optimizer = torch.optim.AdamW(ups, lr=settings.learning_rate, weight_decay=0)
    best = [up.detach().clone() for up in ups]
    return State(ups, optimizer, generator, figures={"totals": [first]}, tensors={"best": best})


def train(
    host: DiffusionHost,
    lora: CrossAttentionLoRA,
    descent: Descent,
    texts: Texts,
    pictures: Pictures,
    settings: ForgetSettings,
    probe: Callable[[float], Reading],
    checkpoint: Checkpoint,
) -> bool:
    """Trains the ups until the steps are up or the probe has not fallen for a while, and leaves the best of them.

    Goes on from a state; returns whether all steps could be taken.
    """
    state, well = descent.state, True
    losses, totals, best = state.losses, state.figures["totals"], state.tensors["best"]

    def measure() -> None:
        due = len(losses) // CHECK + (len(losses) == settings.steps and len(losses) % CHECK > 0)
        if len(totals) <= due:
            totals.append(probe(1.0).total)
            if totals[-1] == min(totals):
                best[:] = state.copies()
            checkpoint.keep()

    measure()  # what a stopped run was about to
    while len(losses) < settings.steps and min(totals) in totals[-PATIENCE:]:
        host.check_interrupt()
        batch = make_batch(host, texts, pictures, settings, settings.batch_size, 0.0, state.generator)
        taken = train_step(host, lora, descent, texts, pictures, batch)
        well = taken is not None
        if not well:
            break
        loss, maps = taken
        losses.append(loss)
        checkpoint.keep()
        measure()
        host.progress(len(losses), settings.steps, partial(batch_preview, maps, texts, pictures, batch))
    state.take(best)
    return well
