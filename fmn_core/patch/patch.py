"""A forget patch: the tensors of a LoRA that every loader takes, and what the pack wants to remember of it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import __version__
from ..errors import ForgetError
from ..files.header import one_line
from ..host import MATRICES, DiffusionHost, weight_of
from ..lora.layers import LoRAs, balanced
from ..text.concept import Concept, concept_metadata
from .bounds import require_room
from .report import PatchReport
from .schema import SCHEMA, bounded, check_info
from .statistics import TextStatistics

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
MODULE = re.compile(r"lora_unet_\w+_attn2_to_(q|k|v|out_0)", re.ASCII)


class Patch(dict):
    """A forget patch: tensors by kohya name, as the host's LoRA nodes take them, and `info`, the JSON of `fmn.patch`.

    `unet_lora`: an ordinary LoRA of what was trained outside the cross-attention, which goes into a file of its own.
    """

    def __init__(self, tensors: dict[str, Tensor], info: dict, unet_lora: dict[str, Tensor] | None = None):
        super().__init__(tensors)
        self.info, self.unet_lora = info, unet_lora or {}

    @property
    def modules(self) -> list[str]:
        """Names of the patched projections."""
        return sorted(key[: -len(ALPHA)] for key in self if key.endswith(ALPHA))

    @property
    def rank(self) -> int:
        """The one rank of all modules."""
        return len(self[self.modules[0] + DOWN])


def make_patch(
    host: DiffusionHost,
    factors: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    concepts: tuple[Concept, ...],
    settings: dict,
    report: PatchReport,
    *,
    statistics: TextStatistics | None,
) -> Patch:
    """Patch from factors, (layer, matrix) -> (up [out, r], down [r, in]) of one r: singular values' roots on both
    sides, fp16, alpha = rank; without statistics where nobody knows the concept's words. Raises ForgetError where they are
    not finite."""
    tensors = {}
    for (layer, matrix), (up, down) in factors.items():
        name = host.lora_key(layer, matrix)
        require_finite(up, down)  # the decomposition in `balanced` takes no others
        up, down = balanced(up.detach().cpu(), down.detach().cpu())
        tensors[name + DOWN] = down.half().contiguous()
        tensors[name + UP] = up.half().contiguous()
        tensors[name + ALPHA] = torch.tensor(float(len(down)), dtype=torch.float16)
    require_finite(*tensors.values())
    info = {
        "schema": SCHEMA,
        "version": __version__,
        **concept_metadata(concepts),
        "settings": settings,
        "base": {"name": one_line(host.model_name()), "family": host.family, "hash": fingerprint(host)},
        "report": report.plain(),
    }
    if statistics is not None:
        info["statistics"] = statistics.encoded()
    return Patch(dict(sorted(tensors.items())), info)


def lora_tensors(loras: LoRAs) -> dict[str, Tensor]:
    """An ordinary LoRA of adapters whose names are kohya's; raises ForgetError where they are not finite."""
    tensors = {}
    for name in loras.patched:
        lora = loras.lora(name)
        tensors[name + DOWN], tensors[name + UP] = (x.detach().half().cpu().contiguous() for x in (lora.down, lora.up))
        tensors[name + ALPHA] = torch.tensor(float(len(lora.down)), dtype=torch.float16)
    require_finite(*tensors.values())
    return tensors


def require_finite(*weights: Tensor) -> None:
    """Raises ForgetError where a patch's weights hold infinity or no number."""
    if not all(torch.isfinite(weight).all() for weight in weights):
        raise ForgetError("The patch's weights are not finite in half precision: lower the learning rate.")


def fingerprint(host: DiffusionHost) -> str:
    """sha256 of the cross-attention's K and V weights: the same for every copy of a base model in one precision."""
    digest = hashlib.sha256()
    for layer in host.cross_attentions():
        for matrix in ("to_k", "to_v"):
            weight = host.weight(layer, matrix).detach().cpu().contiguous()
            digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_patch(patch: Patch, name: str) -> None:
    """Raises ForgetError unless this is a patch of a known schema with well-formed, finite tensors."""
    check_info(patch.info, name)
    check_tensors(patch, name)
    bounded(name, require_room, shapes_of(patch), patch.rank)


def check_tensors(patch: Patch, name: str) -> None:
    """Raises ForgetError unless these are the tensors of a patch, of one rank, fp16, finite."""
    modules = patch.modules
    expected = {module + suffix for module in modules for suffix in (DOWN, UP, ALPHA)}
    if not modules or set(patch) != expected or not all(MODULE.fullmatch(module) for module in modules):
        raise ForgetError(
            f"{name} holds other tensors than a forget patch does: it is damaged or was edited; copy it again."
        )
    rank = (*patch[modules[0] + DOWN].shape, 0)[0]
    for module in modules:
        up, down = patch[module + UP], patch[module + DOWN]
        alpha = patch[module + ALPHA]
        if down.ndim != 2 or up.ndim != 2 or alpha.ndim or not len(down) == up.shape[1] == rank > 0:
            raise ForgetError(f"{name} has tensors of the wrong shape in {module}: it is damaged; copy it again.")
        if not up.dtype == down.dtype == alpha.dtype == torch.float16 or alpha != rank:
            raise ForgetError(f"{name} is not fp16 with alpha = rank in {module}: it was edited; copy the original again.")
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise ForgetError(f"{name} has values that are not finite in {module}: it is damaged; forget the concept again.")


def check_strength(strength: float) -> None:
    """Raises ForgetError for a strength that is infinite or no number."""
    if not math.isfinite(strength):
        raise ForgetError(f"The strength is {strength}: use a number, 1 for the patch as it was made.")


def check_fits(patch: Patch, shapes: dict[str, tuple[int, int]], model: str) -> None:
    """Raises ForgetError unless every module of the patch is a projection of the model: name -> (out, in)."""
    for module, own in shapes_of(patch).items():
        found = shapes.get(module)
        if found != own:
            base = patch.info["base"]
            raise ForgetError(
                f"The patch that forgets `{patch.info['concept']}` was made for {base['name']} ({base['family']}), and "
                f"this model, {model}, has {'another shape' if found else 'no layer'} at {module}: "
                "load the checkpoint it was made for, or forget the concept in this one."
            )


def shapes_of(patch: Patch) -> dict[str, tuple[int, int]]:
    """Kohya name -> (out, in) of every projection that a patch changes."""
    return {module: (len(patch[module + UP]), patch[module + DOWN].shape[1]) for module in patch.modules}


def model_shapes(host: DiffusionHost) -> dict[str, tuple[int, int]]:
    """Kohya name -> (out, in) of every projection a patch may hold."""
    return {
        host.lora_key(layer, matrix): (len(weight), weight.shape[1])
        for layer, cross in host.cross_attentions().items()
        for matrix in MATRICES
        for weight in [weight_of(cross.linear(matrix))]
    }
