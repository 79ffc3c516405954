"""Forget patches out of what others made: a LoRA in any spelling, or full weights of a model that has forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from . import adapter
from .concept import make_concepts
from .contents import Contents, Layers
from .errors import ForgetError
from .fast import word_moments
from .hosts.base import DiffusionHost
from .low_rank import Factors, least_rank, of_one_rank, spectrum, truncated
from .patch import ALPHA, DOWN, UP, Patch, make_patch, require_finite
from .settings import ForgetSettings, ImportSettings
from .tuned import TunedWeights
from .weights_file import WeightsFile, open_weights

LARGEST = 65504.0  # of fp16
MUCH = 0.3  # relative error: a patch that leaves out more is worth a warning
NAMED = 6  # layers that a sentence names before it counts


@torch.no_grad()
def import_patch(
    host: DiffusionHost, file: Path, settings: ImportSettings, concept: str = "", base: Path | None = None
) -> Patch:
    """A forget patch for the host's model from a .safetensors file: a LoRA, or weights of which the host's own, or those of
    the file `base`, are taken away. What it changes outside the cross-attention as a LoRA becomes the patch's `rest`.

    `concept` names what it forgets, one concept a line; without it the patch goes by the file's name and knows no words.
    Raises ForgetError for files that are damaged, of an unknown kind or made for another architecture.
    """
    concepts = make_concepts(concept, settings.concept_type) if concept.strip() else ()
    with ExitStack() as stack:
        weights, layers = stack.enter_context(open_weights(file)), Layers(host)
        contents = Contents(weights, layers)
        kind = require_kind(weights, contents)
        rest, given = {}, None
        if kind == "LoRA":
            source = adapter.Adapter(weights)
            rest, warnings = take_rest(source, contents, layers)
            named = [name for name, parts in contents.cross.items() if {"down", "up", "diff"} & {*parts}]
            if "diff" not in contents.kinds:
                given = {name: source.factors(name, contents.cross[name], layers.shapes[name]) for name in named}
                if 0 < settings.rank < max(len(down) for _, down in given.values()):
                    given = None

            def delta(name: str) -> Tensor:
                return source.full(name, contents.cross[name], layers.shapes[name])
        else:
            tuned = TunedWeights(host, weights, stack.enter_context(open_weights(base)) if base else None, layers, contents)
            named, warnings, delta = tuned.changed(), tuned.left_out(), tuned.delta
        if given is None:
            given = low_rank(host, named, delta, settings)
        given = of_one_rank(given, lambda name: min(layers.shapes[name]))
        require_half(weights, given)
        factors = {layers.targets[name]: pair for name, pair in given.items()}
        report = {"imported": {"file": weights.path.name, "kind": kind, "rest": len(rest) // 3}, "warnings": warnings}
        moments, unknown = None, []
        if concepts:
            moments, unknown = word_moments(host, concepts, ForgetSettings(concept_type=settings.concept_type))
        warnings += unknown
        how = {"preset": "imported"} | asdict(settings)
        patch = make_patch(host, factors, concepts, how, report, moments)
        patch.info["concept"] = patch.info["concept"] or weights.path.stem
        patch.rest = rest
        report["imported"] |= {"rank": patch.rank, "projections": len(patch.modules)} | errors(
            weights, patch, layers, named, delta
        )
    if report["imported"]["error"] > MUCH:
        warnings.append(
            f"The patch leaves out much of what {weights.path.name} changes, {report['imported']['error']:.0%}: raise "
            "`rank` or `energy`."
        )
    return patch


def require_kind(weights: WeightsFile, contents: Contents) -> str:
    """`LoRA` or `full weights`; raises ForgetError for files of neither kind."""
    foreign = contents.kinds - adapter.PARTS - {"weight", "bias"}
    if foreign:
        raise ForgetError(
            f"{weights.path.name} holds `{min(foreign)[:40]}`, as LoHa, LoKr, DoRA and their kind do, and plain LoRAs "
            "and full weights alone can be imported: merge it into a checkpoint, and import that."
        )
    if contents.kinds & {"down", "up", "diff"}:
        return "LoRA"
    if "weight" in contents.kinds:
        return "full weights"
    raise ForgetError(
        f"{weights.path.name} changes nothing in the cross-attention of this model, and a forget patch changes nothing "
        "else: load it with the host's own Load LoRA, or use the model that it was made for."
    )


def take_rest(source: adapter.Adapter, contents: Contents, layers: Layers) -> tuple[dict[str, Tensor], list[str]]:
    """An ordinary LoRA, by kohya's names, of the layers outside the cross-attention, and a sentence for each kind of thing
    that is left out."""
    factors, other = {}, dict(contents.unknown)
    for name, parts in contents.others.items():
        if {*parts} <= {"down", "up", "alpha"} and {"down", "up"} & {*parts}:
            factors[name] = source.factors(name, parts, shape_of(layers.others[name][1]))
        else:
            other[name] = None
    rest = {}
    if factors:
        factors = of_one_rank(factors, lambda name: least_side(shape_of(layers.others[name][1])))
        require_half(source.weights, factors)
        for name, (up, down) in factors.items():
            key, module = layers.others[name]
            out, *inner = shape_of(module)
            rest[key + DOWN] = down.reshape(-1, *inner).half().contiguous()
            rest[key + UP] = up.reshape(out, -1, *[1] * (len(inner) - 1)).half().contiguous()
            rest[key + ALPHA] = torch.tensor(float(len(down)), dtype=torch.float16)
        require_finite(*rest.values())
    biases = {name: None for name, parts in contents.cross.items() if "diff_b" in parts}
    whole = {name: None for name, parts in contents.cross.items() if {"weight", "bias"} & {*parts}}
    left = {
        "Of the text encoders": contents.text,
        "Outside the cross-attention": other,
        "Biases of": biases,
        "Full weights beside the LoRA, of": whole,
    }
    return rest, [f"{what}, {several(names)} left out." for what, names in left.items() if names]


def several(names: dict[str, None]) -> str:
    """The first names, how many there are beyond, and the verb."""
    first = ", ".join(name[:120] for name in list(names)[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{first}{more} {'is' if len(names) == 1 else 'are'}"


def shape_of(module) -> tuple[int, ...]:
    return tuple(getattr(module, "base_layer", module).weight.shape)


def least_side(shape: tuple[int, ...]) -> int:
    """The highest rank that a layer's change can have."""
    return min(shape[0], math.prod(shape[1:]))


def require_half(weights: WeightsFile, factors: dict[str, Factors]) -> None:
    """Raises ForgetError where half precision cannot hold a layer's factors."""
    for name, (up, down) in factors.items():
        if not max(up.norm() * down.norm(), up.abs().max(), down.abs().max()) < LARGEST:
            raise ForgetError(f"{weights.path.name} has values at {name} too large for a patch: it is damaged; get it anew.")


def low_rank(
    host: DiffusionHost, names: list[str], delta: Callable[[str], Tensor], settings: ImportSettings
) -> dict[str, Factors]:
    """The best factors of every layer's change at the chosen rank, or at the least that keeps the chosen energy."""
    rank = settings.rank
    total = len(names) * (1 if rank else 2)

    def step(number: int) -> None:
        host.check_interrupt()
        host.progress(number, total, None)

    if not rank:
        spectra = []
        for number, name in enumerate(names):
            step(number + 1)
            spectra.append(spectrum(delta(name)))
        rank = least_rank(spectra, settings.energy)
    factors = {}
    for number, name in enumerate(names):
        factors[name] = truncated(delta(name), rank)
        step(total - len(names) + number + 1)
    return factors


def errors(weights: WeightsFile, patch: Patch, layers: Layers, names: list[str], delta: Callable[[str], Tensor]) -> dict:
    """|delta - patch| / |delta| in the Frobenius norm: of all layers together, and the worst layer's with its name; raises
    ForgetError where there is no change."""
    missing, whole, worst = 0.0, 0.0, ("", 0.0)
    for name in names:
        wanted = delta(name)
        key = layers.keys[name]
        lost = (wanted - patch[key + UP].double() @ patch[key + DOWN].double()).square().sum().item()
        size = wanted.square().sum().item()
        missing, whole = missing + lost, whole + size
        worst = max(worst, (key, math.sqrt(lost / size) if size else 0.0), key=lambda one: one[1])
    if not whole:
        raise ForgetError(f"{weights.path.name} changes nothing, all its differences are zero: choose another file.")
    return {"error": math.sqrt(missing / whole), "worst": {"projection": worst[0], "error": worst[1]}}


def import_summary(imported: dict) -> list[str]:
    """What the report of an import says, for people."""
    rest = f", and {imported['rest']} layers outside the cross-attention as an ordinary LoRA" if imported["rest"] else ""
    what, worst = f"{imported['projections']} projections at rank {imported['rank']}", imported["worst"]
    return [
        f"From {imported['file']} ({imported['kind']}): {what}{rest}.",
        f"Relative error of the change (Frobenius norm): {imported['error']:.2%}; the worst, {worst['error']:.2%}, at "
        f"{worst['projection']}.",
    ]
