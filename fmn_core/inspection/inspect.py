"""What a patch is: whether it fits a model, what it measured of itself, and how strongly it changes each projection."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import ForgetError
from ..files.header import tensor_hash
from ..host import MATRICES, DiffusionHost
from ..patch.patch import DOWN, UP, Patch, check_fits, fingerprint, model_shapes
from ..patch.report import PatchReport

# A layer's kohya name begins with diffusers' name of its block or, in SDXL, with sgm's.
BLOCK_PREFIX = re.compile(r"^lora_unet_(down|mid|up|input|middle|output)_")
BLOCK_NAMES = {"down": "down", "input": "down", "mid": "mid", "middle": "mid", "up": "up", "output": "up", "": "other"}
ORDER = ("down", "mid", "up", "other")
SHOWN_FIRST = ("to_k", "to_v", "to_q", "to_out")  # K and V are what every preset changes


@dataclass(frozen=True)
class Change:
    """How much one projection changes: |delta W| (Frobenius norm), and what part of |W| that is where the model is known.

    `unet_block` is `down`, `mid`, `up` or `other`, `block` its number there, `depth` that of the layer in the block.
    """

    module: str
    unet_block: str
    block: tuple[int, ...]
    depth: int
    matrix: str
    norm: float
    relative: float | None

    @property
    def amount(self) -> float:
        """What bars show: the part of |W|, or |delta W| without a model."""
        return self.norm if self.relative is None else self.relative


@dataclass(frozen=True)
class Fit:
    """Whether a patch fits a model, whether that is the one it was made on, and this as a sentence."""

    fits: bool
    same: bool
    sentence: str


@dataclass(frozen=True)
class Inspection:
    """A patch, its own report without what cannot be read, its changes in the order of the layers, whether it fits the
    model where there is one, and the bytes of its file or, where it has none yet, of its weights."""

    patch: Patch
    report: PatchReport
    changes: list[Change]
    fit: Fit | None
    file: Path | None
    size: int

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the patch, by its own report, a measurement or the model."""
        unfit = [self.fit.sentence] if self.fit and not self.fit.fits else []
        return [*unfit, *self.report.warnings, *self.report.evaluation.get("warnings", [])]

    def plain(self) -> dict:
        """For JSON: everything that the patch says of itself, and what was found."""
        info = without_statistics(self.patch.info)
        return info | {
            "file": {"bytes": self.size, "sha256": tensor_hash(dict(self.patch)), "rank": self.patch.rank},
            "model": self.fit and {"fits": self.fit.fits, "same": self.fit.same, "sentence": self.fit.sentence},
            "change": {change.module: {"norm": change.norm, "relative": change.relative} for change in self.changes},
        }


def without_statistics(info: dict) -> dict:
    """JSON without the arrays that stacking needs, which are for no reader."""

    def shown(value: object) -> object:
        if isinstance(value, dict):
            return without_statistics(value)
        return [shown(each) for each in value] if isinstance(value, list) else value

    return {key: shown(value) for key, value in info.items() if key != "statistics"}


def inspect_patch(patch: Patch, host: DiffusionHost | None = None, file: Path | None = None) -> Inspection:
    """What a patch says of itself and what it changes; with a host, whether it fits and the changes beside the weights."""
    fit = None if host is None else fit_to(patch, host)
    weights = base_norms(host) if host is not None and fit is not None and fit.fits else {}
    size = file.stat().st_size if file else sum(tensor.nbytes for tensor in patch.values())
    return Inspection(patch, PatchReport.read(patch.info.get("report")), changes_of(patch, weights), fit, file, size)


def delta_norm(up: Tensor, down: Tensor) -> float:
    """|up @ down| (Frobenius) of up [out, r], down [r, in] by r x r matrices, |U D|^2 = tr(U^T U D D^T), where these are
    smaller than the product."""
    up, down = up.double(), down.double()
    if len(up) * down.shape[1] < len(down) ** 2:
        return (up @ down).norm().item()
    return (up.T @ up * (down @ down.T)).sum().clamp(min=0).sqrt().item()


def base_norms(host: DiffusionHost) -> dict[str, float]:
    """Kohya name -> |W| (Frobenius) of every projection a patch may hold."""
    return {
        host.lora_key(layer, matrix): host.weight(layer, matrix).detach().float().norm().item()
        for layer in host.cross_attentions()
        for matrix in MATRICES
    }


def changes_of(patch: Patch, weights: dict[str, float]) -> list[Change]:
    """The change of every projection, layers in forward order; `weights` has |W| by kohya name, or nothing."""
    found = []
    for module in patch.modules:
        layer, matrix = module.rsplit("_attn2_", 1)
        block_name = BLOCK_PREFIX.match(layer)
        *block, depth = map(int, re.findall(r"\d+", layer) or [0])
        norm = delta_norm(patch[module + UP], patch[module + DOWN])
        relative = norm / max(weights[module], 1e-12) if weights else None
        unet_block = BLOCK_NAMES[block_name[1] if block_name else ""]
        found.append(Change(module, unet_block, tuple(block), depth, matrix.removesuffix("_0"), norm, relative))
    return sorted(found, key=lambda c: (ORDER.index(c.unet_block), c.block, c.depth, SHOWN_FIRST.index(c.matrix)))


def fit_to(patch: Patch, host: DiffusionHost) -> Fit:
    """Whether a patch can be applied to the host's model, and whether it was made on these very weights."""
    name = host.model_name()
    try:
        check_fits(patch, model_shapes(host), name)
    except ForgetError as error:
        return Fit(False, False, f"Does not fit the model: {error}")
    made_on = patch.info["base"].get("hash")
    if not made_on:
        return Fit(True, False, f"Fits the model, {name}; the patch does not say on which weights it was made.")
    if made_on == fingerprint(host):
        return Fit(True, True, f"Made for this very model, {name}.")
    return Fit(
        True,
        False,
        f"Fits the model, {name}, but was made on other weights of the same architecture, or on these in another precision.",
    )
