"""The preset `balanced`: the closed form, refined by attention re-steering under a hybrid loss.

The closed form starts a LoRA on K and V. Its downs stay as they are, so what the solution leaves alone (the start token,
the empty prompt, what is preserved) stays left alone; its ups are trained, on given pictures of the concept or on the
model's own of its target, since the patched model draws such a picture when it is asked for the concept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..log import phase
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch
from ..training.loop import Descent, TrainingLoop, TrainingRun, diverged
from ..training.state import State
from .closed_form import edit_factors, make_edit
from .config import projection_names
from .hybrid import HybridTraining, ProbeResult
from .training_data import PromptSet, images_steps, make_images

STRENGTHS = (0.8, 0.9, 1.0, 1.1, 1.2)  # tried in the end
CHECK, PATIENCE = 5, 3  # steps between measurements, and how many without progress end the training


def forget_balanced(run: TrainingRun) -> tuple[Patch, list[float]]:
    """A patch in closed form, refined on pictures; returns it and the loss of each step. Raises ForgetError for inputs that
    cannot work."""
    host, config = run.host, run.config
    generator = torch.Generator().manual_seed(config.seed)
    edit = make_edit(host, run.concepts, config)
    prompts = PromptSet.of(host, edit.plan)
    with host.progress(images_steps(run, prompts.concepts) + config.steps) as bar:
        images = make_images(run, prompts, generator, of_targets=True)
        rows = 2 * config.batch_size  # the concept's prompts and near ones
        with host.training((rows, *images.latents.shape[1:])):
            lora = CrossAttentionLoRA.of(host, edit_factors(host, edit, projection_names(config)))
            training = HybridTraining(run, edit, lora, prompts, images, generator)
            probe = training.make_probe()
            results = {"before": probe(0.0), "fast": probe(1.0)}
            state = new_refining_state(training, results["fast"].total)
            losses = state.losses
            bar.skip(run.checkpoint.resume(state, lambda: training.unfinished_patch(losses, config.steps)))
            descent = Descent(training.checkpointing(rows, config.steps), state)
            with phase("forget.train", preset="balanced") as info:
                finite = train_ups(training, TrainingLoop(run, descent, config.steps), probe)
                info["steps"] = len(losses)
            tried = {strength: probe(strength) for strength in STRENGTHS}
            strength = min(tried, key=lambda strength: tried[strength].total)
            results["after"] = tried[strength]
            warnings = [] if finite else [diverged(len(losses), config.steps, "best")]
            return training.finish(results, strength, losses, warnings), losses


def new_refining_state(training: HybridTraining, first: float) -> State:
    """The state of a training of the ups that has not begun: `totals` of the probe so far, `best` ups so far."""
    ups = [training.lora.adapter(*target).up for target in training.lora.targets]
    optimizer = torch.optim.AdamW(ups, lr=training.run.config.learning_rate, weight_decay=0)
    best = [up.detach().clone() for up in ups]
    return State(ups, optimizer, training.generator, figures={"totals": [first]}, tensors={"best": best})


def train_ups(training: HybridTraining, loop: TrainingLoop, probe: Callable[[float], ProbeResult]) -> bool:
    """Trains the ups until the steps are up or the probe has not fallen for a while, and leaves the best of them.

    Resumes a state; returns whether every loss was finite.
    """
    state, steps = loop.descent.state, training.run.config.steps
    losses, totals, best = state.losses, state.figures["totals"], state.tensors["best"]

    def measure() -> bool:
        due = len(losses) // CHECK + (len(losses) == steps and len(losses) % CHECK > 0)
        if len(totals) <= due:
            totals.append(probe(1.0).total)
            if totals[-1] == min(totals):
                best[:] = state.copies()
            loop.checkpoint.keep()
        return min(totals) not in totals[-PATIENCE:]

    done = measure()  # what a stopped run was about to
    finite = done or loop.take_steps(steps, training.next_step, measure)
    state.take(best)
    return finite
