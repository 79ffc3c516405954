"""Published methods to compare with, written from their papers' formulas and their authors' code.

Each takes (host, kind, names) and keys that its authors' code documents, and returns {name of a parameter in the host's
UNet: its change} and the bytes of its file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from demo.evaluate import GUIDANCE
from demo.vocabulary import OBJECTS, PEOPLE, STYLES
from fmn_core.attention.capture import capture_attention_maps
from fmn_core.host import linear_name
from fmn_core.lora.layers import LoRAs
from fmn_core.text.concept import make_concepts
from fmn_core.text.tokens import concept_mask
from fmn_core.training.losses import predicted_x0
from fmn_core.training.noise import add_noise, draw
from fmn_core.training.sampling import sample_ddim

EVERY = {"object": tuple(OBJECTS), "style": STYLES, "identity": tuple(PEOPLE)}
GENERIC = {"object": "object", "style": "art", "identity": "person"}  # what UCE may guide to, beside the empty prompt
EXPANDED = {  # UCE's prompts beside the name alone; its code has no third kind, people are objects there
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "style": ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
}
PICTURES = 10  # of a concept: as many as the original Forget-Me-Not ships
SAMPLING_STEPS = 10  # of the trajectories that ESD trains on
MAX_GRAD_NORM = 1.0

Weights = dict[str, Tensor]


def weight_name(layer: str, matrix: str) -> str:
    """The name in the host's UNet of a projection's weight."""
    return f"{layer}.{linear_name(matrix)}.weight"


@contextmanager
def restored(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Context that has copies of these parameters, and puts them back at its end."""
    before = [one.detach().clone() for one in parameters]
    try:
        yield before
    finally:
        with torch.inference_mode():  # which may write to a host's inference tensors, and to ordinary ones
            for one, value in zip(parameters, before, strict=True):
                one.copy_(value)


@contextmanager
def applied(host, weights: Weights) -> Iterator[None]:
    """Context in which the host's UNet has the changed weights."""
    changed = [host.unet.get_parameter(name) for name in weights]
    with restored(changed):
        with torch.inference_mode():
            for one, delta in zip(changed, weights.values(), strict=True):
                one.add_(delta.to(one))
        yield


def changes_by(host, train, of=lambda name: True) -> Weights:
    """The changes that `train(parameters)` makes in place to the UNet's parameters whose names pass; they are put back.

    For inside the host's `training`.
    """
    named = {name: one for name, one in host.unet.named_parameters() if of(name)}
    parameters = list(named.values())
    with restored(parameters) as before:
        for one in parameters:
            one.requires_grad_(True)
        try:
            train(parameters)
        finally:
            for one in parameters:
                one.requires_grad_(False)
        return {name: one.detach() - old for (name, one), old in zip(named.items(), before, strict=True)}


def linears(host, place: str = ".transformer_blocks.") -> dict[str, nn.Linear]:
    """Name -> every Linear of the UNet that has this in its name."""
    return {n: m for n, m in host.unet.named_modules() if isinstance(m, nn.Linear) and place in n}


def lora_changes(lora: LoRAs) -> Weights:
    """The changes of weights that a trained LoRA makes."""
    return {f"{name}.weight": (each.up @ each.down).detach() for name, each in zip(lora.patched, lora.values(), strict=True)}


def half_bytes(tensors):
    """The bytes of these tensors in fp16, as these methods' files hold them."""
    return sum(2 * tensor.numel() for tensor in tensors)


def prompts_of(kind, names):
    """(prompt, the name in it) of each name, as the original Forget-Me-Not words it."""
    return [prompt for concept in make_concepts("\n".join(names), kind) for prompt in concept.prompts]


@torch.no_grad()
def uce(host, kind, names, generic=False, expand=False, lamb=0.5, erase_scale=1.0):
    """Unified Concept Editing (Gandikota et al., arXiv 2308.14761, eq. 7): K and V of each name's last token become those
    of the guide's, which is the empty prompt (its start token, as in their code) or, `generic`, a word for its kind; with
    `expand`, in five more prompts too. All other names of the kind are kept, each at weight 1; `lamb` keeps the rest."""
    templates = ("{}", *(EXPANDED["style" if kind == "style" else "object"] if expand else ()))
    guide_name = GENERIC[kind] if generic else ""

    def last_tokens(texts):
        rows = [[t.kind for t in host.tokenize(text)].index("end") - 1 for text in texts]
        return host.encode_prefix(texts, 77).double()[torch.arange(len(texts)), rows]

    erased = last_tokens([template.format(name) for name in names for template in templates])
    guide = last_tokens([template.format(guide_name).strip() for template in templates]).repeat(len(names), 1)
    kept = last_tokens([name for name in EVERY[kind] if name not in names])
    weights = {}
    for layer in host.cross_attentions():
        for matrix in ("to_k", "to_v"):
            W = host.weight(layer, matrix).double()
            right = lamb * torch.eye(W.shape[1], dtype=W.dtype) + erase_scale * erased.T @ erased + kept.T @ kept
            left = lamb * W + erase_scale * W @ guide.T @ erased + W @ kept.T @ kept
            weights[weight_name(layer, matrix)] = (left @ torch.linalg.inv(right) - W).float()
    return weights, half_bytes(weights.values())


def forget_me_not(host, kind, names, rate, steps=35, pooler=True, whole=True):
    """Forget-Me-Not as its authors' code has it (SHI-Labs/Forget-Me-Not, train_attn.py): one unsquared norm of the
    attention of all layers, heads and pixels to the concept's tokens and, with `pooler` (`use_pooler`), to every end
    token, which in SD1 are all columns of the padding too; AdamW on the whole UNet or (`only_optimize_ca`) on the
    cross-attention; a random picture at a random timestep in each step. The pictures are the model's own, since of these
    concepts there are no photographs; no textual inversion."""
    generator = torch.Generator().manual_seed(0)
    texts = prompts_of(kind, names)
    prompts, empty = host.encode([prompt for prompt, _ in texts]), host.encode([""])
    columns = torch.stack([concept_mask(host, name, prompt, "concept") for prompt, name in texts])
    if pooler:
        columns |= torch.tensor([[token.kind in ("end", "padding") for token in row] for row in prompts.tokens])
    layers, count = host.cross_attentions(), max(PICTURES, len(texts))
    rows = [i % len(texts) for i in range(count)]
    with host.training((count, *host.latent_shape())):
        noise = torch.randn(count, *host.latent_shape(), generator=generator)
        latents = sample_ddim(host, noise, prompts[rows], empty[[0] * count], steps=20, guidance=GUIDANCE)

        def train(parameters):
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
            for _ in range(steps):
                [shown] = draw(count, 1, generator)
                x_t, t, _ = add_noise(host, latents[[shown]], generator)
                with capture_attention_maps(layers) as maps:
                    host.predict(x_t, t, prompts[[rows[shown]]])
                loss = torch.cat([A[..., columns[rows[shown]]].flatten() for A in maps.values()]).norm()
                # Their code clips where it trains the cross-attention alone; otherwise its parameters are used up.
                step_of(optimizer, loss, [] if whole else parameters)

        weights = changes_by(host, train, lambda name: whole or ".attn2." in name)
    return weights, half_bytes(weights.values())


def esd(host, kind, names, rate, steps, eta=2.0, rank=4, full=False):
    """Erased Stable Diffusion's target (Gandikota et al., arXiv 2303.07345, eq. 7; eta is its code's
    `negative_guidance`), learned by a LoRA as LECO does (p1atdev/LECO, rank 4): the frozen model's noise without the
    concept, less eta times what naming it adds, at points of trajectories that the edited model itself samples. The LoRA
    is on the cross-attention (LECO's `training_method: xattn`, ESD-x) or on every Linear of the transformer blocks
    (`full`)."""
    generator = torch.Generator().manual_seed(0)
    prompts = host.encode(["", *(prompt for prompt, _ in prompts_of(kind, names))])
    with host.training((2, *host.latent_shape())):
        lora = LoRAs(linears(host) if full else linears(host, ".attn2."), rank, generator)
        optimizer = torch.optim.AdamW(lora.parameters(), lr=rate)
        for _ in range(steps):
            row = 1 + draw(len(prompts) - 1, 1, generator)[0]
            asked, both = prompts[[row]], prompts[[0, row]]
            until = draw(SAMPLING_STEPS, 1, generator)[0]
            noise = torch.randn(1, *host.latent_shape(), generator=generator)
            with torch.no_grad():
                with lora.attached():
                    x_t, t = part_way(host, noise, both, until)
                plain, concept = host.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            with lora.attached():
                loss = (host.predict(x_t, t, asked) - (plain - eta * (concept - plain))).square().mean()
            step_of(optimizer, loss, lora.parameters())
    return lora_changes(lora), half_bytes(lora.parameters())


def step_of(optimizer, loss, parameters):
    """One step against the loss, its gradient clipped."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(parameters), MAX_GRAD_NORM)
    optimizer.step()


def part_way(host, noise, both, until):
    """x_t [1, C, h, w] and t [1] after `until` of SAMPLING_STEPS DDIM steps; `both`: the empty prompt, then the asked."""
    alphas, x = host.alphas_cumprod, noise
    timesteps = torch.linspace(len(alphas) - 1, 0, SAMPLING_STEPS).round().long()
    for now, then in zip(timesteps[:until], timesteps[1 : until + 1], strict=True):
        without, epsilon = host.predict(x.repeat(2, 1, 1, 1), now.repeat(2), both).chunk(2)
        epsilon = without + GUIDANCE * (epsilon - without)
        x = alphas[then].sqrt() * predicted_x0(x, epsilon, alphas[now][None]) + (1 - alphas[then]).sqrt() * epsilon
    return x, timesteps[until][None]
