"""The one training loop, in any precision: small gradients survive it, overflowing steps are repeated, and a loss that is
not finite ends it at the last good state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost
from ..text.concept import Concept
from .checkpoint import Checkpoint
from .memory import AdaptiveCheckpointing
from .state import State

T = TypeVar("T")
MAX_GRAD_NORM = 1.0  # the original's max_grad_norm
HALVINGS = 16  # of the scale, at most
STEADY = 20  # steps without an overflow after which a halved scale is doubled

Differentiate = Callable[[Tensor], float]  # takes the gradient of a loss, and returns its value
Preview = Callable[[], Tensor]  # makes a picture [H, W, 3] in 0..1
Step = Callable[[Differentiate], "tuple[float, Preview | None]"]  # one forward: the loss to report, and a preview


@dataclass(frozen=True)
class TrainingRun:
    """What a training is given.

    `images` [P, H, W, 3] in 0..1 show the concepts, each the one that `concept_of` has the number of, or each concept an
    equal part of them, in order; without them the model makes its own. `mask` [1 or P, H, W] in 0..1 says where in them
    the concept is. Inside a `checkpoint`, which the caller has entered, the training resumes an earlier run with the same
    inputs.
    """

    host: DiffusionHost
    config: Any
    concepts: tuple[Concept, ...] = ()
    images: Tensor | None = None
    mask: Tensor | None = None
    concept_of: Sequence[int] | None = None
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


class TrainingLoop:
    """Steps of a training, each told to whoever watches: the checkpoint, and the host's progress bar with its preview.
    `after_optimizer` may change the parameters after each of the optimiser's steps."""

    def __init__(self, run: TrainingRun, descent: Descent, steps: int, after_optimizer: Callable[[], None] | None = None):
        self.host, self.checkpoint, self.descent, self.steps = run.host, run.checkpoint, descent, steps
        self.losses, self.after_optimizer = descent.state.losses, after_optimizer

    def take_steps(self, until: int, next_step: Callable[[], Step], after_step: Callable[[], bool] | None = None) -> bool:
        """Takes steps until there are `until` losses or `after_step` returns True; returns whether all were finite.

        `next_step` draws what the next step trains on. Raises the host's own exception where the user asks to stop.
        """
        stop = False
        with self.host.progress(self.steps) as bar:
            while len(self.losses) < until and not stop:
                self.host.check_interrupt()
                taken = self.descent.take(next_step())
                if taken is None:
                    return False
                loss, preview = taken
                if self.after_optimizer:
                    self.after_optimizer()
                self.losses.append(loss)
                self.checkpoint.keep()
                stop = after_step() if after_step else False
                bar.update(preview)
        return True


class Descent:
    """Steps of a state's optimiser down a loss that is multiplied by a power of two while it is differentiated.

    Half precision rounds small gradients to zero otherwise (loss scaling, Micikevicius et al., arXiv 1710.03740); single
    precision gives the same gradient at any such scale. Where a gradient overflows, the scale is halved and the step taken
    again with the same random numbers; it comes back to the state's `most_scale` when steps have been steady.
    """

    def __init__(self, checkpointing: AdaptiveCheckpointing, state: State, max_norm: float | None = MAX_GRAD_NORM):
        self.checkpointing, self.state, self.max_norm = checkpointing, state, max_norm
        self.loss = math.nan
        self.gradients: Sequence[Tensor | None] = ()

    def take(self, step: Callable[[Callable[[Tensor], float]], T]) -> T | None:
        """What `step` returns, which has to hand its loss to the function that it is given, and gets its value back.

        Parameters with which the loss is finite become the state's `good` ones, and the optimiser steps from them. Returns
        None, and takes no step, where the loss is not finite, or its gradient at no scale; at the first step that raises
        ForgetError.
        """
        generator, scale = self.state.generator, self.state.figures["scale"]
        before = generator.get_state()
        while True:
            self.checkpointing.host.check_interrupt()
            taken = self.checkpointing.take(lambda: step(self.differentiate), generator)
            if not math.isfinite(self.loss):
                break
            self.state.hold()
            if all_finite(self.gradients):
                self.follow()
                return taken
            if scale[0] <= self.state.most_scale / 2**HALVINGS:
                break
            scale[:] = [scale[0] / 2, 0.0]
            generator.set_state(before)
        if not self.state.losses:
            raise ForgetError("The loss is not finite at step 1: look for broken pictures or a broken model.")
        return None

    def differentiate(self, loss: Tensor) -> float:
        """Takes the gradient, unless the loss is not finite, and returns the loss's value."""
        self.loss, self.gradients = loss.item(), ()
        if math.isfinite(self.loss):
            scaled = loss * self.state.figures["scale"][0]
            self.gradients = torch.autograd.grad(scaled, self.state.parameters, allow_unused=True)
        return self.loss

    def follow(self) -> None:
        """The optimiser's step."""
        state = self.state
        scale, steady = state.figures["scale"]
        for parameter, own in zip(state.parameters, self.gradients, strict=True):
            parameter.grad = None if own is None else own / scale
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(state.parameters, self.max_norm)
        state.step()
        self.gradients = ()
        grows = steady + 1 >= STEADY and scale < state.most_scale
        state.figures["scale"][:] = [scale * 2, 0.0] if grows else [scale, steady + 1]


def all_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether every gradient is there in numbers; None is that of a parameter which the loss does not depend on."""
    return bool(torch.stack([own.isfinite().all() for own in gradients if own is not None]).all())


def settled(state: State, measure: Callable[[], T], taken: bool) -> tuple[T, bool]:
    """What is measured of the model after a training, and whether all its steps were taken well. If not, or if what is
    measured (a number or several) is not finite because the last step led there, the parameters are the last good ones."""
    if not taken:
        state.take(state.tensors["good"])
    found = measure()
    if taken and not torch.as_tensor(found).isfinite().all():
        state.take(state.tensors["good"])
        return measure(), False
    return found, taken


def unfinished(done: int, steps: int) -> str:
    """What a user is told of the result of a training that was stopped."""
    return (
        f"Unfinished: stopped after step {done} of {steps}. Queue the same inputs again to resume from the last saved step."
    )


def diverged(done: int, steps: int, kept: str = "last good") -> str:
    """What a user is told of a training that ended where the loss, a gradient or an estimate was not finite."""
    return f"The training diverged after step {done} of {steps}, and the {kept} state was kept: lower the learning rate."
