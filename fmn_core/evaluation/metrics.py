"""What a patch changes in a model, measure by measure: the model as it was against the patched one, at equal inputs.

Called with the patch's hooks on (`patch.applied`) a measure is of the patched model, without them of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.capture import capture_attention_maps, concept_mass, layer_size
from ..host import DiffusionHost, Prompts
from ..lora.decompose import LayerFactors
from ..training.noise import energy, noised
from ..training.sampling import AT_ONCE

NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8)  # of the schedule, from clean to noise, at which estimates and attention are read
RIDGE = 1e-3  # of sum W^T W's mean eigenvalue: the attacker's lambda, small, since a larger one weakens the attack

Group = TypeVar("Group")


def noise_at_levels(host: DiffusionHost, latents: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each latent of [B, C, h, w] at each of NOISE_LEVELS, with noise of its own that depends on the seed alone: x_t
    [B, levels, C, h, w], t [levels], and the noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(latents), len(NOISE_LEVELS), *latents.shape[1:], generator=generator).to(latents)
    t = torch.tensor([round(level * (len(host.alphas_cumprod) - 1)) for level in NOISE_LEVELS], device=latents.device)
    return noised(latents[:, None], host.alphas_cumprod.to(latents)[t], noise), t, noise


@torch.no_grad()
def noise_estimates(host: DiffusionHost, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
    """epsilon [B, levels, C, h, w] for x_t [B, levels, C, h, w] at t [levels], each row with its own prompt."""
    estimates = []
    for row, x in enumerate(x_t):
        host.check_interrupt()
        estimates.append(host.predict(x, t, prompts[[row] * len(x)]))
    return torch.stack(estimates)


def prompt_drift(after: Tensor, before: Tensor, empty: Tensor) -> Tensor:
    """The same, relative to what the prompt does at all: |eps - eps0|^2 / |eps0 - eps0(empty prompt)|^2, the direction
    of classifier-free guidance; 0 left alone, about 1 as if the prompt had been empty."""
    return energy(after - before) / energy(before - empty).clamp(min=1e-12)


@torch.no_grad()
def attention_to(
    host: DiffusionHost, x_t: Tensor, t: Tensor, prompts: Prompts, token_masks: dict[str, Tensor]
) -> tuple[dict[str, float], Tensor]:
    """Attention mass on several sets of tokens, name -> [B, T], a mean over layers, heads, pixels and noise levels
    (what Forget-Me-Not's Algorithm 1 lowers), and heat maps [B, H, W] of the first set at the pictures' size (DAAM's
    mean over layers, Tang et al., arXiv 2210.04885)."""
    layers, height, width = host.cross_attentions(), x_t.shape[-2] * 8, x_t.shape[-1] * 8
    masses: dict[str, list[Tensor]] = {name: [] for name in token_masks}
    first, heats = next(iter(token_masks.values())), []
    for row in range(len(x_t)):
        heat = torch.zeros(1, 1, height, width)
        for x, step in zip(x_t[row, :, None], t[:, None], strict=True):  # one at a time: SDXL's maps are large
            host.check_interrupt()
            with capture_attention_maps(layers) as maps:
                host.predict(x, step, prompts[[row]])
            for name, mask in token_masks.items():
                masses[name].append(concept_mass(maps, mask[[row]]))
            for A in maps.values():
                h, w = layer_size(x.shape[-2], x.shape[-1], A.shape[2])
                mean = rearrange((A * first[row]).sum(-1).mean(1), "1 (h w) -> 1 1 h w", h=h, w=w)
                heat += F.interpolate(mean.cpu(), (height, width), mode="bicubic").clamp(min=0) / len(maps) / len(t)
        heats.append(heat[0, 0])
    return {name: torch.stack(own).mean().item() for name, own in masses.items()}, torch.stack(heats)


@torch.no_grad()
def kv_drift(host: DiffusionHost, factors: LayerFactors, embeds: dict[Group, Tensor]) -> dict[Group, float]:
    """K/V drift |dW c| / |W c|, a mean over the embeddings [N, D] of each group, over layers, and over K and V: exact,
    from the patch's factors and the model's weights, without the UNet."""
    every = torch.cat([own.float() for own in embeds.values()])
    total, targets = torch.zeros(len(every)), kv_targets(host)
    for layer, matrix in targets:
        if (layer, matrix) in factors:
            up, down = factors[layer, matrix]
            W = host.weight(layer, matrix).detach().float().cpu()
            total += (every @ down.T @ up.T).norm(dim=1) / (every @ W.T).norm(dim=1) / len(targets)
    parts = total.split([len(own) for own in embeds.values()])
    return {name: part.mean().item() for name, part in zip(embeds, parts, strict=True)}


def kv_targets(host: DiffusionHost) -> list[tuple[str, str]]:
    """(layer, matrix) of every K and V."""
    return [(layer, matrix) for layer in host.cross_attentions() for matrix in ("to_k", "to_v")]


@torch.no_grad()
def adversarial_token(host: DiffusionHost, factors: LayerFactors, embeds: Tensor, ridge: float = RIDGE) -> dict[str, float]:
    """How much of the concept's K/V response the best embedding gets back through the patch.

    RECE's closed form (Gong et al., arXiv 2407.12383), c' = (sum W'^T W' + lambda I)^-1 (sum W'^T W) c over all
    K and V, for each of the concept's embeddings c [N, D]. `recovered`: 1 - sum |W' c' - W c|^2 / sum |W' c - W c|^2, the
    share of what the patch takes away that c' brings back, 1 where it takes nothing; lambda is `ridge` of sum W^T W's mean
    eigenvalue; `length`: |c'| / |c|, and
    `moved`: |c' - c| / |c|, how far c' is from any word.
    """
    c = embeds.double()
    size = c.shape[1]
    patched_squares, cross, squares = torch.zeros(3, size, size, dtype=torch.double)  # sums of W'^T W', W'^T W, W^T W
    for layer, matrix in kv_targets(host):
        W = host.weight(layer, matrix).detach().cpu().double()
        up, down = factors.get((layer, matrix), (torch.zeros(len(W), 1), torch.zeros(1, size)))
        patched = W + up.double() @ down.double()
        patched_squares += patched.T @ patched
        cross += patched.T @ W
        squares += W.T @ W
    scale = squares.trace() / size
    found = torch.linalg.solve(patched_squares + ridge * scale * torch.eye(size), cross @ c.T).T

    def missing(x: Tensor) -> float:
        """sum |W' x - W c|^2."""
        return ((x @ patched_squares * x).sum() - 2 * (x @ cross * c).sum() + (c @ squares * c).sum()).item()

    taken = missing(c)
    nothing = taken <= 1e-12 * (c @ squares * c).sum()  # but rounding
    norm = c.norm(dim=1)
    return {
        "recovered": 1.0 if nothing else 1 - missing(found) / taken,
        "length": (found.norm(dim=1) / norm).mean().item(),
        "moved": ((found - c).norm(dim=1) / norm).mean().item(),
    }


def picture_change(after: Tensor, before: Tensor) -> Tensor:
    """Mean absolute pixel change of pictures [B, H, W, 3] at equal seeds: [B] in 0..1."""
    return (after - before).abs().mean((1, 2, 3))


def clip_scores(scorer: Callable, pictures: Tensor, prompts: Sequence[str], wanted: Sequence[str]) -> tuple[Tensor, Tensor]:
    """CLIP score, the cosine of each picture [B, H, W, 3] with the prompt it was made for (Hessel et al., arXiv
    2104.08718, without its factor), and whether that prompt is the nearest of all that are `wanted`: [B] each.

    `scorer` takes pictures and texts and returns cosines [B, T].
    """
    texts = list(dict.fromkeys([*wanted, *prompts]))
    cosines = torch.cat([scorer(part, texts) for part in pictures.split(AT_ONCE)])
    own = torch.tensor([texts.index(prompt) for prompt in prompts])
    return cosines[torch.arange(len(own)), own], cosines.argmax(1) == own


def unlearn_canvas(expected: list[tuple[str, str, set[str]]], seen: list[set[str]]) -> dict[str, float | None]:
    """UA, IRA and CRA (UnlearnCanvas, Zhang et al., arXiv 2402.11846) and their harmonic mean H.

    `asked`: for each picture, whether it shows the `target`, something of the target's kind (`in`) or of another kind
    (`cross`), and the names that would be right; `seen`: the labels it was given. UA is the share of the target's
    pictures that have none of its names, IRA and CRA the accuracy on the others; None where there is no picture.
    """

    def share(role: str) -> float | None:
        right = [bool(names & labels) for (own, _, names), labels in zip(expected, seen, strict=True) if own == role]
        return sum(right) / len(right) if right else None

    target, ira, cra = share("target"), share("in"), share("cross")
    figures = {"ua": None if target is None else 1 - target, "ira": ira, "cra": cra}
    there = [value for value in figures.values() if value is not None]
    figures["h"] = len(there) / sum(1 / value for value in there) if there and all(there) else 0.0
    return figures
