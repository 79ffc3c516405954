"""Published methods to compare with, written from their papers' formulas and their authors' code.

Each takes (host, kind, names) and returns {(layer, matrix): change of the weight [out, in]} and the bytes of its file.
"""

from contextlib import ExitStack, contextmanager

import torch

from demo.evaluate import GUIDANCE
from demo.vocabulary import OBJECTS, PEOPLE, STYLES
from fmn_core.attention import tapped
from fmn_core.concept import concept_columns, make_concepts
from fmn_core.hosts.base import MATRICES
from fmn_core.lora import CrossAttentionLoRA
from fmn_core.losses import predicted_x0
from fmn_core.resteering import add_noise, draw
from fmn_core.sampling import sample_ddim

EVERY = {"object": tuple(OBJECTS), "style": STYLES, "identity": tuple(PEOPLE)}
PICTURES = 10  # of a concept: as many as the original Forget-Me-Not ships
SAMPLING_STEPS = 10  # of the trajectories that ESD trains on
MAX_GRAD_NORM = 1.0


@contextmanager
def applied(host, weights):
    """Context in which the host's cross-attention computes with the changed weights."""

    def hook(delta):
        return lambda module, args, output: output + args[0] @ delta.T.to(args[0])

    with ExitStack() as stack:
        for (layer, matrix), delta in weights.items():
            linear = host.cross_attentions()[layer].linear(matrix)
            stack.callback(linear.register_forward_hook(hook(delta)).remove)
        yield


def half_bytes(tensors):
    """The bytes of these tensors in fp16, as these methods' files hold them."""
    return sum(2 * tensor.numel() for tensor in tensors)


def prompts_of(kind, names):
    """(prompt, the name in it) of each name, as the original Forget-Me-Not words it."""
    return [prompt for concept in make_concepts("\n".join(names), kind) for prompt in concept.prompts]


@torch.no_grad()
def uce(host, kind, names):
    """Unified Concept Editing (Gandikota et al., arXiv 2308.14761, eq. 7; its code's lambda 0.5): K and V of each
    name's last token become those of the empty prompt's (the start token, as in its code), all other names of the kind
    are kept, each at weight 1."""

    def last_tokens(texts):
        rows = [[t.kind for t in host.tokenize(text)].index("end") - 1 for text in texts]
        return host.contexts(texts, 77).double()[torch.arange(len(texts)), rows]

    erased = last_tokens(list(names))
    guide = last_tokens([""]).expand_as(erased)
    kept = last_tokens([name for name in EVERY[kind] if name not in names])
    weights = {}
    for layer in host.cross_attentions():
        for matrix in ("to_k", "to_v"):
            W = host.weight(layer, matrix).double()
            right = 0.5 * torch.eye(W.shape[1], dtype=W.dtype) + erased.T @ erased + kept.T @ kept
            left = 0.5 * W + W @ guide.T @ erased + W @ kept.T @ kept
            weights[layer, matrix] = (left @ torch.linalg.inv(right) - W).float()
    return weights, half_bytes(weights.values())


def forget_me_not(host, kind, names, rate, steps=35):
    """Forget-Me-Not as its authors' code has it (SHI-Labs/Forget-Me-Not, train_attn.py, with `only_optimize_ca` and
    `use_pooler`): one unsquared norm of the attention of all layers, heads and pixels to the concept's tokens and to
    every end token, which in SD1 are all columns of the padding too; the cross-attention's weights by AdamW; a random
    picture at a random timestep in each step. The pictures are the model's own, since of these concepts there are no
    photographs; no textual inversion."""
    generator = torch.Generator().manual_seed(0)
    texts = prompts_of(kind, names)
    prompts, empty = host.encode([prompt for prompt, _ in texts]), host.encode([""])
    columns = torch.stack([concept_columns(host, name, prompt, "concept") for prompt, name in texts])
    columns |= torch.tensor([[token.kind in ("end", "padding") for token in row] for row in prompts.tokens])
    layers, count = host.cross_attentions(), max(PICTURES, len(texts))
    rows = [i % len(texts) for i in range(count)]
    with host.training((count, *host.latent_shape())):
        noise = torch.randn(count, *host.latent_shape(), generator=generator)
        latents = sample_ddim(host, noise, prompts.take(rows), empty.take([0] * count), 20, GUIDANCE)
        weights = {
            (name, matrix): torch.zeros_like(layer.linear(matrix).weight, dtype=torch.float32, requires_grad=True)
            for name, layer in layers.items()
            for matrix in MATRICES
        }
        optimizer = torch.optim.AdamW(weights.values(), lr=rate)
        with applied(host, weights):
            for _ in range(steps):
                [shown] = draw(count, 1, generator)
                x_t, t = add_noise(host, latents[[shown]], generator)
                with tapped(layers) as maps:
                    host.predict(x_t, t, prompts.take([rows[shown]]))
                loss = torch.cat([A[..., columns[rows[shown]]].flatten() for A in maps.values()]).norm()
                step_of(optimizer, loss, weights.values())
    return {key: weight.detach() for key, weight in weights.items()}, half_bytes(weights.values())


def esd(host, kind, names, rate, steps, eta=2.0, rank=4):
    """Erased Stable Diffusion's target (Gandikota et al., arXiv 2303.07345, eq. 7, eta 2 as in its code), learned by a
    LoRA on the cross-attention as LECO does (p1atdev/LECO, rank 4): the frozen model's noise without the concept, less
    eta times what naming it adds, at points of trajectories that the edited model itself samples."""
    generator = torch.Generator().manual_seed(0)
    prompts = host.encode(["", *(prompt for prompt, _ in prompts_of(kind, names))])
    with host.training((2, *host.latent_shape())):
        lora = CrossAttentionLoRA(host.cross_attentions(), MATRICES, rank, generator)
        optimizer = torch.optim.AdamW(lora.parameters(), lr=rate)
        for _ in range(steps):
            row = 1 + draw(len(prompts) - 1, 1, generator)[0]
            asked, both = prompts.take([row]), prompts.take([0, row])
            until = draw(SAMPLING_STEPS, 1, generator)[0]
            noise = torch.randn(1, *host.latent_shape(), generator=generator)
            with torch.no_grad():
                with lora.attached():
                    x_t, t = part_way(host, noise, both, until)
                plain, concept = host.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            with lora.attached():
                loss = (host.predict(x_t, t, asked) - (plain - eta * (concept - plain))).square().mean()
            step_of(optimizer, loss, lora.parameters())
    factors = {target: (up.detach(), down.detach()) for target, (up, down) in lora.factors().items()}
    return {target: up @ down for target, (up, down) in factors.items()}, half_bytes(sum(factors.values(), ()))


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
