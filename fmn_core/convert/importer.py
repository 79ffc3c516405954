"""Forget patches out of what others made: a LoRA in any spelling, or full weights of a model that has forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..erasure.closed_form import word_statistics
from ..erasure.config import ClosedFormConfig
from ..errors import ForgetError
from ..files.header import one_line
from ..files.safetensors import WeightsFile, open_weights
from ..host import DiffusionHost
from ..inversion.embedding import require_embeddings
from ..lora.decompose import Factors, OneRank, least_rank, of_one_rank, spectrum, truncated
from ..patch.patch import ALPHA, DOWN, UP, Patch, make_patch, require_finite
from ..patch.report import ImportReport, PatchReport
from ..text.concept import make_concepts
from . import lora_file as adapter
from .config import ImportConfig
from .file_kinds import extension, part_of_model
from .full_weights import TunedWeights
from .inventory import Contents, Layers

FULL = "full weights"
LARGEST_FP16 = 65504.0  # of fp16
LARGE_ERROR = 0.3  # relative error: a patch that leaves out more is worth a warning
NAMED = 6  # layers that a sentence names before it counts


@torch.no_grad()
def import_patch(
    host: DiffusionHost, file: Path, settings: ImportConfig, concept: str = "", base: Path | None = None
) -> Patch:
    """A forget patch for the host's model from a .safetensors file: a LoRA, or weights of which the host's own, or those of
    the file `base`, are taken away. What it changes outside the cross-attention becomes the patch's `unet_lora`.

    `concept` names what it forgets, one concept a line; without it the patch goes by the file's name and knows no words.
    Raises ForgetError for files that are damaged, of an unknown kind or made for another architecture.
    """
    concepts = make_concepts(concept, settings.concept_type) if concept.strip() else ()
    require_embeddings(host, concept)
    with ExitStack() as stack:
        weights, layers = stack.enter_context(open_weights(file)), Layers(host)
        require_no_extension(weights)
        contents = Contents(weights, layers)
        kind = require_kind(weights, contents)
        unet_lora: dict[str, Tensor] = {}
        given: dict[str, Factors] | None = None
        lost = 0.0
        if kind != FULL:
            source = adapter.Adapter(weights)
            unet_lora, warnings, lost = take_unet_lora(host, source, contents, layers, settings)
            named = [name for name, parts in contents.cross.items() if adapter.forms_of(parts)]
            if adapter.forms_of(contents.kinds) == {"LoRA"}:
                given = own_factors(source, contents, layers, settings.rank)

            def delta(name: str) -> Tensor:
                return source.full(name, contents.cross[name], layers.shapes[name])
        else:
            tuned = TunedWeights(host, weights, stack.enter_context(open_weights(base)) if base else None, layers, contents)
            named, warnings, delta = tuned.changed(), tuned.left_out(), tuned.delta
        if given is None:
            given = low_rank(host, named, delta, settings)
        padded = one_rank(weights, given, lambda name: min(layers.shapes[name]))
        require_half(weights, padded)
        factors = OneRank({layers.targets[name]: pair for name, pair in padded.factors.items()})
        words = ClosedFormConfig(concept_type=settings.concept_type)
        statistics, unknown = word_statistics(host, concepts, words) if concepts else (None, [])
        how = {"preset": "imported"} | asdict(settings)
        patch = make_patch(host, factors, concepts, how, PatchReport(), statistics=statistics)
        patch.info["concept"] = patch.info["concept"] or one_line(weights.path.stem)
        patch.unet_lora = unet_lora
        imported = ImportReport(
            file=weights.path.name,
            kind=kind,
            rank=patch.rank,
            projections=len(patch.modules),
            unet_layers=len(unet_lora) // 3,
            unet_error=lost,
            **errors(weights, patch, layers, named, delta),
        )
    warnings += unknown
    if imported.error > LARGE_ERROR:
        warnings.append(
            f"The patch leaves out much of what {weights.path.name} changes, {imported.error:.0%}: raise "
            f"`{'rank' if settings.rank else 'energy'}`."
        )
    patch.info["report"] = PatchReport(imported=imported, warnings=warnings).plain()
    return patch


def own_factors(source: adapter.Adapter, contents: Contents, layers: Layers, most: int) -> dict[str, Factors] | None:
    """The factors of every projection as a LoRA's file has them; None where one has a higher rank than `most`, if that is
    not 0."""
    given = {
        name: source.factors(name, parts, layers.shapes[name])
        for name, parts in contents.cross.items()
        if adapter.forms_of(parts)
    }
    return None if 0 < most < max(len(down) for _, down in given.values()) else given


def require_no_extension(weights: WeightsFile) -> None:
    """Raises ForgetError for files that are neither a LoRA for a UNet nor a UNet's weights, but may have keys like those."""
    what = extension(weights.keys)
    if what:
        raise ForgetError(f"{weights.path.name} is {what}: choose a LoRA for the UNet, or weights of a UNet.")


def require_kind(weights: WeightsFile, contents: Contents) -> str:
    """FULL, or the forms in which a file has its changes; raises ForgetError for files of neither kind."""
    for name, parts in contents.cross.items():
        for part in sorted(parts):
            what = adapter.foreign(part)
            if what:
                raise ForgetError(
                    f"{weights.path.name} holds `{part.lstrip('._')[:40]}` at {name}: that is {what}. LoRA, LoCon, "
                    "LoHa, LoKr, full differences and full weights can be imported: merge it into a checkpoint in fp16, and "
                    "import that."
                )
    forms = adapter.forms_of(contents.kinds)
    if forms:
        return " and ".join(sorted(forms, reverse=True))
    if "weight" in contents.kinds:
        return FULL
    what = None if contents.others else part_of_model(weights.keys)
    if what:
        raise ForgetError(f"{weights.path.name} is {what}: choose a LoRA for the UNet, or weights of a UNet.")
    raise ForgetError(
        f"{weights.path.name} changes nothing in the cross-attention of this model, and a forget patch changes nothing "
        "else: load it with the host's own Load LoRA, or use the model that it was made for."
    )


def take_unet_lora(
    host: DiffusionHost, source: adapter.Adapter, contents: Contents, layers: Layers, settings: ImportConfig
) -> tuple[dict[str, Tensor], list[str], float]:
    """An ordinary LoRA, by kohya's names, of the layers outside the cross-attention, a sentence for each kind of thing that
    is left out, and the relative error of those layers that the file does not have in factors. No layer refuses a file,
    whatever is wrong with it."""
    factors: dict[str, Factors] = {}
    whole: list[str] = []
    other: dict[str, str | None] = {**contents.unknown}
    lost = 0.0
    biases = dict.fromkeys(name for name, parts in contents.cross.items() if {"diff_b", "up_b"} & {*parts})

    def delta(name: str) -> Tensor:
        return source.full(name, contents.others[name], shape_of(layers.others[name][1]))

    for name, parts in contents.others.items():
        forms, strange = adapter.forms_of(parts), next(filter(None, map(adapter.foreign, sorted(parts))), None)
        if not forms or strange or {"weight", "bias"} & {*parts}:
            other[name] = strange
            continue
        try:
            if forms == {"LoRA"}:
                pair = source.factors(name, parts, shape_of(layers.others[name][1]))
                require_half(source.weights, {name: pair})
                factors[name] = pair
            elif delta(name).norm() < LARGEST_FP16:  # read once to see whether it can be
                whole.append(name)
        except ForgetError:
            other[name] = "damaged, or made for another model"
            continue
        if {"diff_b", "up_b"} & {*parts}:
            biases[name] = None
    if whole:
        nearest = low_rank(host, whole, delta, settings)
        lost = relative_error(delta, nearest)
        factors |= nearest
    unet_lora = {}
    if factors:
        padded = one_rank(source.weights, factors, lambda name: least_side(shape_of(layers.others[name][1])))
        require_half(source.weights, padded)
        for name, (up, down) in padded.items():
            key, module = layers.others[name]
            out, *inner = shape_of(module)
            unet_lora[key + DOWN] = down.reshape(-1, *inner).half().contiguous()
            unet_lora[key + UP] = up.reshape(out, -1, *[1] * (len(inner) - 1)).half().contiguous()
            unet_lora[key + ALPHA] = torch.tensor(float(len(down)), dtype=torch.float16)
        require_finite(*unet_lora.values())
    full = dict.fromkeys(name for name, parts in contents.cross.items() if {"weight", "bias"} & {*parts})
    left: dict[str, Mapping[str, str | None]] = {
        "Of the text encoders": contents.text,
        "Outside the cross-attention": other,
        "Biases of": biases,
        "Full weights beside the LoRA, of": full,
    }
    return unet_lora, [f"{what}, {first_names(names)} left out." for what, names in left.items() if names], lost


def one_rank(weights: WeightsFile, factors: dict[str, Factors], most: Callable[[str], int]) -> OneRank[str]:
    """`of_one_rank`; raises ForgetError where that would be mostly zeros."""
    try:
        return of_one_rank(factors, most)
    except ValueError as error:
        raise ForgetError(f"{weights.path.name} cannot be imported: {error}. Bring it to one rank first.") from None


def first_names(names: Mapping[str, str | None]) -> str:
    """The first names, each with what is said of it, how many there are beyond, and the verb."""
    first = ", ".join(name[:120] + (f" ({said})" if said else "") for name, said in list(names.items())[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{first}{more} {'is' if len(names) == 1 else 'are'}"


def shape_of(module) -> tuple[int, ...]:
    return tuple(getattr(module, "base_layer", module).weight.shape)


def least_side(shape: tuple[int, ...]) -> int:
    """The highest rank that a layer's change can have."""
    return min(shape[0], math.prod(shape[1:]))


def require_half(weights: WeightsFile, factors: Mapping[str, Factors]) -> None:
    """Raises ForgetError where half precision cannot hold a layer's factors."""
    for name, (up, down) in factors.items():
        if not max(up.norm() * down.norm(), up.abs().max(), down.abs().max()) < LARGEST_FP16:
            raise ForgetError(
                f"{weights.path.name} has values at {name} too large for a patch: it is damaged; download it again."
            )


def low_rank(
    host: DiffusionHost, names: list[str], delta: Callable[[str], Tensor], settings: ImportConfig
) -> dict[str, Factors]:
    """The best factors of every layer's change at the chosen rank, or at the least that keeps the chosen energy."""
    rank = settings.rank
    spectra, factors = [], {}
    with host.progress(len(names) * (1 if rank else 2)) as bar:
        if not rank:
            for name in names:
                host.check_interrupt()
                spectra.append(spectrum(delta(name)))
                bar.update()
            rank = least_rank(spectra, settings.energy)
        for name in names:
            host.check_interrupt()
            factors[name] = truncated(delta(name), rank)
            bar.update()
    return factors


def relative_error(delta: Callable[[str], Tensor], factors: dict[str, Factors]) -> float:
    """|delta - up down| / |delta| in the Frobenius norm, of all layers together; 0 where there is no change."""
    missing = whole = 0.0
    for name, (up, down) in factors.items():
        wanted = delta(name)
        missing += (wanted - up @ down).square().sum().item()
        whole += wanted.square().sum().item()
    return math.sqrt(missing / whole) if whole else 0.0


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
    return {"error": math.sqrt(missing / whole), "worst_projection": worst[0], "worst_error": worst[1]}
