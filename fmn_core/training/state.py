"""The state of a training after its last whole step, while the next one writes to its tensors in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Mark(NamedTuple):
    """What a state was after a whole step, but for what is written to in place: the number of its losses, and lists of the
    others as they were."""

    generator: Tensor
    losses: int
    figures: dict[str, list[float]]
    tensors: dict[str, list[Tensor]]


@dataclass
class State:
    """All that the next step of a training depends on, beside its inputs; parameters and optimiser are changed in place, by
    `step` and `take` alone.

    `scale` among the figures: what the loss is multiplied by, `most_scale` at first and at most, and for how many steps it
    has been that; `good` among the tensors: the parameters with which the loss was last finite. `before`: copies of the
    parameters as they were at the `mark`, once they have been written to since; `torn`: what the optimiser remembers has
    been written to since.
    """

    parameters: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    losses: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    most_scale: float = 2.0**16
    mark: Mark | None = None
    before: list[Tensor] | None = None
    torn: bool = False

    def __post_init__(self):
        self.figures.setdefault("scale", [self.most_scale, 0.0])
        self.tensors.setdefault("good", self.copies())

    def copies(self) -> list[Tensor]:
        """The parameters' values, where they are."""
        return [p.detach().clone() for p in self.parameters]

    def hold(self) -> None:
        """The loss is finite with the parameters as they are."""
        self.tensors["good"][:] = self.copies()

    def step(self) -> None:
        """The optimiser's step, from the parameters that were just held."""
        self.before, self.torn = self.before or [*self.tensors["good"]], True
        self.optimizer.step()

    def set_mark(self) -> None:
        """A step is whole: `back` comes here. Copies no parameter."""
        figures = {name: [*values] for name, values in self.figures.items()}
        tensors = {name: [*several] for name, several in self.tensors.items()}
        self.mark = Mark(self.generator.get_state(), len(self.losses), figures, tensors)
        self.before, self.torn = None, False

    def back(self) -> None:
        """Goes back to the mark with all but, if that is `torn`, what the optimiser remembers."""
        assert self.mark is not None
        self.generator.set_state(self.mark.generator)
        del self.losses[self.mark.losses :]
        self.figures.update(self.mark.figures)
        self.tensors.update(self.mark.tensors)
        if self.before is not None:
            self.take(self.before)

    def stored(self) -> dict[str, Tensor]:
        """Copies of everything, on the CPU, as the file holds it."""
        kept = {"generator": self.generator.get_state(), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        kept |= {f"parameters.{i}": p for i, p in enumerate(self.parameters)}
        for i, values in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in values.items() if value is not None}
        kept |= {f"figures.{name}": torch.tensor(values, dtype=torch.float64) for name, values in self.figures.items()}
        kept |= {f"tensors.{name}.{i}": t for name, several in self.tensors.items() for i, t in enumerate(several)}
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in kept.items()}

    @torch.no_grad()
    def take(self, values: list[Tensor]) -> None:
        """Sets the parameters to these values."""
        self.before = self.copies() if self.before is None else self.before
        for own, new in zip(self.parameters, values, strict=True):
            own.copy_(new)

    def load(self, kept: dict[str, Tensor]) -> None:
        """Takes over what `stored` gave; raises KeyError, ValueError or RuntimeError for what does not fit, half done."""
        given = [kept[f"parameters.{i}"] for i in range(len(self.parameters))]
        for new, own in zip(given, self.parameters, strict=True):
            if (new.shape, new.dtype) != (own.shape, own.dtype) or not new.isfinite().all():
                raise ValueError("other shapes or types than the training's, or values that are not finite")
        self.generator.set_state(kept["generator"])
        optimizer = self.optimizer.state_dict() | {"state": {}}
        for key, value in kept.items():
            kind, _, name = key.partition(".")
            if kind == "optimizer":
                index, _, name = name.partition(".")
                optimizer["state"].setdefault(int(index), {})[name] = value.clone()  # the optimiser steps in it
        self.optimizer.load_state_dict(optimizer)
        self.take(given)
        self.losses[:] = kept["losses"].tolist()
        for name, values in self.figures.items():
            values[:] = kept[f"figures.{name}"].tolist()
        device = self.parameters[0].device
        for name, several in self.tensors.items():
            count = sum(key.startswith(f"tensors.{name}.") for key in kept)
            several[:] = [kept[f"tensors.{name}.{i}"].to(device) for i in range(count)]
