"""The LoRA of a file by others: factors of each layer, whichever way its strength was written down."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from ..errors import ForgetError, brief
from ..files.bounded_json import parse_json
from ..files.safetensors import WeightsFile
from ..lora.decompose import Factors
from ..lora.keys import flatten
from .lycoris import LOHA, LOKR, loha, lokr

MOST_PEFT_BYTES = 1 << 22  # of what PEFT writes beside its tensors
FORMS = {"LoRA": {"down", "up", "mid"}, "difference": {"diff"}, "LoHa": LOHA, "LoKr": LOKR}
FACTORS = FORMS["LoRA"] | {"alpha", "up_b", "diff_b"}  # of a layer that is in its factors already, and perhaps a bias
KNOWN = set().union(*FORMS.values(), FACTORS, {"weight", "bias"})
OF_THE_WEIGHTS = "whose change depends on the weights it is added to"
FOREIGN = {  # what a tensor is that no form has
    f"a DoRA, {OF_THE_WEIGHTS}": r"dora_scale|lora_magnitude_vector.*",
    f"a GLoRA, {OF_THE_WEIGHTS}": r"[ab][12]\.weight",
    f"an OFT, {OF_THE_WEIGHTS}": r"b?oft_.*|rescale",
    f"an (IA)³, {OF_THE_WEIGHTS}": r"on_input|ia3_l.*",
    "quantised weights (scaled fp8, nf4 and their kind)": r".*(?:scale|absmax|quant|zeros|qweight|SCB|weight_format).*",
}


class Adapter:
    """The LoRA in a file; `name` and `parts`, part -> key, say which layer's is asked for."""

    def __init__(self, weights: WeightsFile):
        self.weights, self.config = weights, peft_config(weights)

    def factors(self, name: str, parts: dict[str, str], shape: tuple[int, ...]) -> Factors:
        """up [out, r] and down [r, in] of one layer in double, its strength in up; a convolution's `in` is all behind the
        first dimension of `shape`. Raises ForgetError where they are incomplete or do not fit."""
        if not {"down", "up"} <= set(parts):
            raise self.incomplete(name)
        of_down, of_up = self.weights.shape(parts["down"]), self.weights.shape(parts["up"])
        mid = self.weights.shape(parts["mid"]) if "mid" in parts else None
        out, inner = shape[0], math.prod(shape[1:])
        rank = of_down[0] if of_down else 0
        inner_of_down = shape[1] if mid else inner
        if mid is not None and mid != (rank, rank, *shape[2:]):
            raise self.weights.misfit(name, f"{[*mid]} between {[*of_up]} and {[*of_down]}", shape)
        whole = math.prod(of_down) == rank * inner_of_down and math.prod(of_up) == out * rank
        if not rank or not whole or of_up[:2] != (out, rank):
            raise self.weights.misfit(name, f"{[*of_up]} and {[*of_down]}", shape)
        scale = self.scale(name, parts, rank)
        up, down = self.weights.read(parts["up"]).double(), self.weights.read(parts["down"]).double()
        down = down.reshape(rank, inner_of_down)
        if mid is not None:  # CP decomposition: the window of the convolution is in between
            down = torch.einsum("r s ..., s i -> r i ...", self.weights.read(parts["mid"]).double(), down)
        return up.reshape(out, rank) * scale, down.reshape(rank, inner)

    def full(self, name: str, parts: dict[str, str], shape: tuple[int, ...]) -> Tensor:
        """The whole change of one layer in double, [out, in] as in `factors`, in whichever forms the file has it."""
        forms = forms_of(parts)
        delta: Tensor | float = 0.0
        if "difference" in forms:
            of_diff = self.weights.shape(parts["diff"])
            if of_diff != shape:
                raise self.weights.misfit(name, [*of_diff], shape)
            delta = self.weights.read(parts["diff"]).double()
        for form, multiplied in (("LoHa", loha), ("LoKr", lokr)):
            if form in forms:
                found = {part: self.weights.read(parts[part]).double() for part in FORMS[form] & {*parts}}
                try:
                    change, rank = multiplied(found, shape)
                except KeyError:
                    raise self.incomplete(name) from None
                except (ValueError, IndexError, RuntimeError):
                    shapes = [[*part.shape] for part in found.values()]
                    raise self.weights.misfit(name, shapes, shape) from None
                delta = delta + change * self.scale(name, parts, rank)
        delta = delta if isinstance(delta, float) else delta.reshape(shape[0], -1)
        if "LoRA" in forms:
            up, down = self.factors(name, parts, shape)
            delta = delta + up @ down
        assert isinstance(delta, Tensor)
        return delta

    def incomplete(self, name: str) -> ForgetError:
        return ForgetError(
            f"{self.weights.path.name} has only a part of a LoRA at {name}: it is damaged; download it again."
        )

    def scale(self, name: str, parts: dict[str, str], rank: int) -> float:
        """alpha / rank; where no alpha is written down it is the rank (as all loaders but diffusers before 0.42 take it).

        `rank` is 0 for a LoKr of whole matrices: loaders pass over its alpha, and PEFT says the rank in its settings.
        """
        alpha, root = self.told(name, "lora_alpha", "alpha"), bool(self.config.get("use_rslora"))
        if "alpha" in parts:
            if math.prod(self.weights.shape(parts["alpha"])) != 1:
                raise ForgetError(
                    f"{self.weights.path.name} has more than one alpha at {name}: it is damaged; download it again."
                )
            alpha, root = self.weights.read(parts["alpha"]).double().item() if rank else None, False
        divisor = (math.sqrt(rank) if root else rank) or self.told(name, "r", "rank")
        return 1.0 if alpha is None or not divisor else alpha / divisor

    def told(self, name: str, key: str, short: str) -> float | None:
        """What PEFT's settings say of one layer: in a pattern for some, or for all under `key`, or `short` where the method
        is LyCORIS'."""
        for pattern, special in reversed((self.config.get(f"{short}_pattern") or {}).items()):
            if f"_{name}".endswith(f"_{flatten(pattern)}"):
                return special
        return self.config.get(key, self.config.get(short))


def forms_of(parts: Iterable[str]) -> set[str]:
    """In which of FORMS a layer's change is there."""
    return {form for form, names in FORMS.items() if names & {*parts}}


def foreign(part: str) -> str | None:
    """What a tensor is that belongs to none of FORMS nor to full weights; None for all others."""
    if part in KNOWN:
        return None
    ending, unknown = part.lstrip("._"), "of a form that is not known here"
    return next((what for what, name in FOREIGN.items() if re.fullmatch(name, ending)), unknown)


def peft_config(weights: WeightsFile) -> dict:
    """What PEFT keeps of a LoRA outside its tensors: in a file beside it, or, by diffusers, in the metadata."""
    beside = weights.path.with_name("adapter_config.json")
    stored: str | bytes | None = weights.metadata.get("lora_adapter_metadata")
    try:
        if stored is None and weights.path.stem == "adapter_model" and beside.is_file():
            if beside.stat().st_size > MOST_PEFT_BYTES:
                raise ValueError(f"{beside.name} has more than {MOST_PEFT_BYTES:,} bytes")
            stored = beside.read_bytes()
        settings = parse_json(stored or "{}")
        if not isinstance(settings, dict):
            raise TypeError("it holds no settings")
        config = {key.removeprefix("unet."): value for key, value in settings.items()}
        patterns = [(config.get(f"{key}_pattern") or {}).values() for key in ("alpha", "rank")]
        numbers = [config[key] for key in ("lora_alpha", "alpha", "r") if config.get(key) is not None] + [*chain(*patterns)]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise TypeError("an alpha is not a number")
    except (AttributeError, TypeError, ValueError, OverflowError, OSError) as error:
        raise ForgetError(
            f"What {weights.path.name} says of its strength cannot be read ({brief(error)}): it is damaged; download "
            "it again."
        ) from error
    return config
