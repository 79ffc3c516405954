"""The LoRA of a file by others: factors of each layer, whichever way its strength was written down."""

from __future__ import annotations

import json
import math

from torch import Tensor

from .errors import ForgetError
from .key_names import flatten
from .low_rank import Factors
from .weights_file import WeightsFile

MOST_BYTES = 1 << 22  # of what PEFT writes beside its tensors
PARTS = {"down", "up", "alpha", "diff", "diff_b"}


class Adapter:
    """The LoRA in a file; `name` and `parts`, part -> key, say which layer's is asked for."""

    def __init__(self, weights: WeightsFile):
        self.weights, self.config = weights, peft_config(weights)

    def factors(self, name: str, parts: dict[str, str], shape: tuple[int, ...]) -> Factors:
        """up [out, r] and down [r, in] of one layer in double, its strength in up; a convolution's `in` is all behind the
        first dimension of `shape`. Raises ForgetError where they are incomplete or do not fit."""
        if not {"down", "up"} <= set(parts):
            raise ForgetError(f"{self.weights.path.name} has only a part of a LoRA at {name}: it is damaged; get it anew.")
        down, up = self.weights.shape(parts["down"]), self.weights.shape(parts["up"])
        out, inner = shape[0], math.prod(shape[1:])
        rank = down[0] if down else 0
        if not rank or math.prod(down) != rank * inner or up[:2] != (out, rank) or math.prod(up) != out * rank:
            raise self.weights.misfit(name, f"{[*up]} and {[*down]}", shape)
        scale = self.scale(name, parts, rank)
        up, down = self.weights.read(parts["up"]).double(), self.weights.read(parts["down"]).double()
        return up.reshape(out, rank) * scale, down.reshape(rank, inner)

    def full(self, name: str, parts: dict[str, str], shape: tuple[int, int]) -> Tensor:
        """The whole change of one matrix [out, in] in double, whether it is there as a LoRA, as a difference or both."""
        delta = 0.0
        if "diff" in parts:
            found = self.weights.shape(parts["diff"])
            if found != shape:
                raise self.weights.misfit(name, [*found], shape)
            delta = self.weights.read(parts["diff"]).double()
        if "diff" not in parts or {"down", "up"} & set(parts):
            up, down = self.factors(name, parts, shape)
            delta = delta + up @ down
        return delta

    def scale(self, name: str, parts: dict[str, str], rank: int) -> float:
        """alpha / rank; where no alpha is written down it is the rank (as all loaders but diffusers before 0.42 take it)."""
        alpha, root = self.config.get("lora_alpha"), bool(self.config.get("use_rslora"))
        for pattern, special in (self.config.get("alpha_pattern") or {}).items():
            if f"_{name}".endswith(f"_{flatten(pattern)}"):
                alpha = special
        if "alpha" in parts:
            if math.prod(self.weights.shape(parts["alpha"])) != 1:
                raise ForgetError(f"{self.weights.path.name} has more than one alpha at {name}: it is damaged; get it anew.")
            alpha = self.weights.read(parts["alpha"]).double().item()
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root and "alpha" not in parts else rank)


def peft_config(weights: WeightsFile) -> dict:
    """What PEFT keeps of a LoRA outside its tensors: in a file beside it, or, by diffusers, in the metadata."""
    beside = weights.path.with_name("adapter_config.json")
    stored = weights.metadata.get("lora_adapter_metadata")
    try:
        if stored is None and weights.path.stem == "adapter_model" and beside.is_file():
            if beside.stat().st_size > MOST_BYTES:
                raise ValueError(f"{beside.name} has more than {MOST_BYTES:,} bytes")
            stored = beside.read_text()
        config = {key.removeprefix("unet."): value for key, value in json.loads(stored or "{}").items()}
        alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        numbers = [*patterns.values()] + ([] if alpha is None else [alpha])
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise TypeError("an alpha is no number")
    except (AttributeError, TypeError, ValueError, RecursionError, OverflowError, OSError) as error:
        raise ForgetError(
            f"What {weights.path.name} says of its strength cannot be read ({error}): it is damaged; get it anew."
        ) from error
    return config
