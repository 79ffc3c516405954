"""Measures of a forget patch that need no other model: what it forgot, what it harmed, what gets the concept back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost
from ..inversion.embedding import require_embeddings
from ..lora.decompose import LayerFactors
from ..patch.apply import applied, patch_factors
from ..patch.patch import Patch, check_fits, model_shapes
from ..text.features import VocabularyIndex
from ..training.noise import noise_drift
from ..training.sampling import AT_ONCE, sample_pictures, sampling_calls
from .config import EvaluationConfig
from .findings import findings
from .metrics import (
    adversarial_token,
    attention_to,
    clip_scores,
    kv_drift,
    noise_at_levels,
    noise_estimates,
    picture_change,
    prompt_drift,
    unlearn_canvas,
)
from .prompts import GROUPS, Probe, Subjects, find_probes, probe_embeds, probe_masks, subjects_of
from .recovery import recover, recover_calls


@dataclass(frozen=True)
class Evaluation:
    """A report that goes to JSON, and what its picture is drawn from: the prompts measured, latents of the pictures
    before and after, these pictures where the host can decode, heat maps before and after, and pictures that learned
    words drew through the patch."""

    report: dict
    probes: list[Probe]
    latents: tuple[Tensor, Tensor]
    pictures: tuple[Tensor, Tensor] | None
    heat: tuple[Tensor, Tensor]
    recovered: Tensor | None = None


def evaluate(
    host: DiffusionHost,
    patch: Patch,
    settings: EvaluationConfig,
    *,
    clip: Callable[[Tensor, list[str]], Tensor] | None = None,
    classifier: Callable[[Tensor], list] | None = None,
    images: Tensor | None = None,
) -> Evaluation:
    """Measures a patch on the model: everything with and without it, at equal seeds.

    `clip` takes pictures [B, H, W, 3] and texts and returns cosines [B, T]; `classifier` takes pictures and returns for
    each a label, or the labels of several kinds; both need a host that can decode. `images` [P, H, W, 3] in 0..1 show
    the concept, for the inversion; without them the model makes its own. Raises ForgetError where the patch
    does not fit the model or does not say what it forgets.
    """
    subjects = subjects_of(patch, settings.preserve)
    check_fits(patch, model_shapes(host), host.model_name())
    require_embeddings(host, *subjects.every, *subjects.preserve)
    vocabulary = VocabularyIndex(host)
    probes = find_probes(host, vocabulary, patch, subjects, settings.prompts)
    factors = {target: (up * settings.strength, down) for target, (up, down) in patch_factors(host, patch).items()}
    embeds = probe_embeds(vocabulary, probes, subjects)
    drawn = [probe for probe in probes if probe.group != "empty" for _ in range(settings.images_per_prompt)]
    calls = 2 * sampling_calls(len(drawn), settings.num_inference_steps) + (
        recover_calls(settings, images) if settings.inversion else 0
    )
    with host.sized(settings.resolution), host.progress(calls):
        measured = measure(host, patch, probes, settings)
        inverted = recover(host, patch, subjects, settings, images) if settings.inversion else None
    before, after = (host.decode(latents) for latents in measured.latents)
    pictures = None if before is None or after is None else (before, after)
    estimates, patched = measured.estimates
    drift = noise_drift(patched, estimates)
    n = len(estimates) // 2  # prompts, and the empty one on the same latents
    effect = prompt_drift(patched[:n], estimates[:n], estimates[n:])
    report: dict = {
        "settings": asdict(settings),
        "model": host.model_name(),
        "forgotten": {name: [*names] for name, names in subjects.names.items()},
        "prompts": {group: [probe.prompt for probe in probes if probe.group == group] for group in GROUPS},
        "attention": measured.attention,
        "noise_drift": by_group(measured.rows, drift),
        "prompt_drift": by_group(measured.rows[:n], effect),
        "kv_drift": drift_by_group(host, factors, embeds),
        "picture_change": None,
        "adversarial_token": adversarial_token(host, factors, torch.cat([*embeds["concept"].values()])),
    }
    if pictures is not None:
        report |= picture_figures(pictures, drawn, subjects, clip=clip, classifier=classifier)
    recovered = None
    if inverted:
        report["inversion"], latents = inverted
        recovered = host.decode(latents)
        if recovered is not None and classifier is not None:
            report["inversion"]["recognised"] = recognised(classifier, recovered, subjects.every)
    report, preserved = rounded(report), subjects_of(patch).preserve
    return Evaluation(report | findings(report, preserved), probes, measured.latents, pictures, measured.heat, recovered)


@dataclass(frozen=True)
class Measured:
    """What the UNet says with and without the patch: latents of pictures [P, C, h, w], noise estimates for `rows`
    [R, levels, C, h, w], the attention to the concept, and its heat maps [B, H, W]."""

    latents: tuple[Tensor, Tensor]
    rows: list[Probe]
    estimates: tuple[Tensor, Tensor]
    attention: dict
    heat: tuple[Tensor, Tensor]


def measure(host: DiffusionHost, patch: Patch, probes: list[Probe], settings: EvaluationConfig) -> Measured:
    """Samples pictures of every prompt, and reads noise estimates and attention on the base model's, noised."""
    drawn = [row for row, probe in enumerate(probes) if probe.group != "empty" for _ in range(settings.images_per_prompt)]
    first = drawn[:: settings.images_per_prompt]
    prompts, empty = host.encode([probe.prompt for probe in probes]), host.encode([""])
    about = [row for row in first if probes[row].group == "concept"]
    masks = probe_masks(host, [probes[row] for row in about], prompts)
    seeds = range(settings.seed, settings.seed + len(drawn))
    shape = host.latent_shape()
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = noise.to(host.device)
    with host.training((AT_ONCE, *shape)), torch.no_grad():

        def sample() -> Tensor:
            expected = prompts[drawn]
            return sample_pictures(
                host, noise, expected, empty, steps=settings.num_inference_steps, guidance=settings.guidance_scale
            )

        before = sample()
        x_t, t, _ = noise_at_levels(host, before[:: settings.images_per_prompt], settings.seed)
        # Each prompt on its own picture, and the empty one on all of them.
        rows = [*first, *[len(probes) - 1] * len(first)]

        def read() -> tuple[Tensor, dict, Tensor]:
            estimates = noise_estimates(host, torch.cat([x_t, x_t]), t, prompts[rows])
            return estimates, *attention_to(host, x_t[: len(about)], t, prompts[about], masks)

        estimates, mass, heat = read()
        with applied(host, patch, settings.strength):
            after = sample()
            estimates_after, mass_after, heat_after = read()
    if not estimates_after.isfinite().all():
        raise ForgetError("The patched model's noise estimates are not finite: lower the strength, or forget again.")
    attention = {name: {"before": mass[name], "after": mass_after[name]} for name in mass}
    return Measured(
        (before, after), [probes[row] for row in rows], (estimates, estimates_after), attention, (heat, heat_after)
    )


def picture_figures(
    pictures: tuple[Tensor, Tensor],
    drawn: list[Probe],
    subjects: Subjects,
    *,
    clip: Callable[[Tensor, list[str]], Tensor] | None,
    classifier: Callable[[Tensor], list] | None,
) -> dict:
    """What pictures before and after say, and what a classifier and CLIP, where they are given, say of them."""
    found = {"picture_change": by_group(drawn, picture_change(*pictures))}
    if classifier is not None:
        found["classifier"] = both(pictures, lambda made: classified(classifier, made, drawn, subjects))
    if clip is not None:
        found["clip"] = both(pictures, lambda made: clip_figures(clip, made, drawn))
    return found


def both(pictures: tuple[Tensor, Tensor], figures: Callable[[Tensor], dict]) -> dict:
    """Figures of the pictures before and after."""
    return {when: figures(made) for when, made in zip(("before", "after"), pictures, strict=True)}


def by_group(probes: list[Probe], values: Tensor) -> dict:
    """group -> mean, and the mean of each word or prompt, the largest first."""
    found: dict[str, dict[str, list[float]]] = {}
    for probe, value in zip(probes, values.tolist(), strict=True):
        found.setdefault(probe.group, {}).setdefault(probe.word or probe.prompt, []).append(value)
    return {group: grouped({word: sum(v) / len(v) for word, v in words.items()}) for group, words in found.items()}


def grouped(values: dict[str, float]) -> dict:
    ordered = dict(sorted(values.items(), key=lambda item: -item[1]))
    return {"mean": sum(values.values()) / len(values), "each": ordered}


def drift_by_group(host: DiffusionHost, factors: LayerFactors, embeds: dict[str, dict[str, Tensor]]) -> dict:
    """kv_drift of every group that has words."""
    flat = {(group, word): own for group, words in embeds.items() for word, own in words.items()}
    drift = kv_drift(host, factors, flat)
    return {group: grouped({word: drift[group, word] for word in words}) for group, words in embeds.items() if words}


def classified(classifier: Callable, pictures: Tensor, drawn: list[Probe], subjects: Subjects) -> dict:
    """UA, IRA, CRA and H of pictures by a classifier's labels."""
    seen = labels_of(classifier, pictures)
    roles = {"concept": "target", "near": "in", "kept": "in"}
    expected = [
        (roles.get(p.group, "") if p.kind == subjects.kind else "cross" if p.kind else "", p.word, {*p.names}) for p in drawn
    ]
    return unlearn_canvas(expected, seen)


def labels_of(classifier: Callable, pictures: Tensor) -> list[set[str]]:
    return [{label} if isinstance(label, str) else set(label) for label in classifier(pictures)]


def recognised(classifier: Callable, pictures: Tensor, names: tuple[str, ...]) -> float:
    """The share of pictures that a classifier takes for one of the names."""
    return sum(bool({*names} & labels) for labels in labels_of(classifier, pictures)) / len(pictures)


def clip_figures(scorer: Callable, pictures: Tensor, drawn: list[Probe]) -> dict:
    """CLIP score and accuracy of every group."""
    prompts = [probe.prompt for probe in drawn]
    scores, right = clip_scores(scorer, pictures, prompts, prompts)
    found = {}
    for group in dict.fromkeys(probe.group for probe in drawn):
        own = torch.tensor([probe.group == group for probe in drawn])
        found[group] = {"score": scores[own].mean().item(), "accuracy": right[own].float().mean().item()}
    return found


def rounded(value):
    """Floats to five significant digits: the report is for people, and goes into the patch's metadata."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def with_evaluation(patch: Patch, report: dict) -> Patch:
    """The same patch with the report in its metadata, in place of an earlier one."""
    return Patch(dict(patch), patch.info | {"report": patch.info["report"] | {"evaluation": report}}, patch.unet_lora)
