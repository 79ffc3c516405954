"""Attention re-steering in closed form: the keys of a concept moved so that no query attends to them.

A proposal, not a published method: what Forget-Me-Not trains K for, solved for. Compared here with moving V.
"""

import math

import torch
from einops import rearrange

from benchmarks.baselines import half_bytes, weight_name
from fmn_core.erasure.closed_form import ERASED, EXACT, MOST_SCALE
from fmn_core.erasure.config import ClosedFormConfig
from fmn_core.erasure.plan import NEIGHBOURS
from fmn_core.erasure.solve import EditObjective, leading_directions, second_moment, solve
from fmn_core.erasure.targets import kept_moment
from fmn_core.text.features import VocabularyIndex
from fmn_core.text.templates import NEAR_TEMPLATES, TEMPLATES, plain_prompt
from fmn_core.training.sampling import sample_ddim

MASS = 0.01  # what a concept's token should keep of the start token's attention
SEPARABLE = 2.0  # the least mean over spread of a head's queries at which a key can be shut off from all of them
QUERY_STEPS = 6
PICTURES = 8


@torch.no_grad()
def k_resteering(host, kind, names):
    """dW of to_k alone that gives a concept's tokens, from its name on, the key k* = k_start - gamma u in each head.

    u = S^-1 m / |S^-1/2 m| for the mean m and covariance S of the head's queries: the direction along which their
    logits spread least for their mean; gamma brings exp(-gamma |S^-1/2 m| / sqrt(d)) to MASS. Heads whose queries
    spread too far for any one key (|S^-1/2 m| < SEPARABLE) stay as they are. dW = E[(k* - W c) c^T] (E[c c^T] + A)^-1
    with `fast`'s A and null space.
    """
    vocabulary = VocabularyIndex(host)
    likeness = vocabulary.likeness(names, kind)
    every = [*names, *sorted(vocabulary.synonyms(names, kind) - set(names))]
    embeds = torch.cat([vocabulary.embeds(TEMPLATES[kind], name) for name in every])
    near = {word: vocabulary.embeds(NEAR_TEMPLATES[kind], word) for word in vocabulary.neighbours(likeness, NEIGHBOURS)}
    empty = host.encode_prefix([""], len(host.tokenize("")))[0].cpu().double()
    kept = kept_moment(vocabulary.kept(every), near, {}, empty)
    fixed = leading_directions(torch.cat([empty[:1] * len(empty), empty]), EXACT)
    neutral = vocabulary.neutral(likeness, kind)[:PICTURES]
    rank = ClosedFormConfig().rank * len(names)
    weights, factors = {}, []
    for layer, queries in queries_of(host, [plain_prompt(kind, word) for word in neutral]).items():
        heads = host.cross_attentions()[layer].heads
        W = host.weight(layer, "to_k").double()
        shift = (steered_keys(queries, (W @ empty[0]).view(heads, -1)).flatten() - embeds @ W.T).view(
            -1, heads, len(W) // heads
        )
        shift = (shift * separability(queries)[:, None].ge(SEPARABLE)).flatten(1)
        up, down = solve(EditObjective(second_moment(embeds), shift.T @ embeds / len(embeds)), kept, fixed, rank)
        done = ((embeds @ down.T @ up.T) * shift).sum() / shift.square().sum().clamp(min=1e-12)
        up = up * min(ERASED / done.item(), MOST_SCALE) if done > 0 else up
        weights[weight_name(layer, "to_k")] = (up @ down).float()
        factors += [up, down]
    return weights, half_bytes(factors)


def k_and_v(host, kind, names, v):
    """Re-steered keys beside the values that the method `v` moves."""
    (keys, first), (values, second) = k_resteering(host, kind, names), v(host, kind, names)
    return keys | values, first + second


def queries_of(host, prompts):
    """Layer -> queries [heads, N, d] of a short sampling of these prompts."""
    queries, layers = {name: [] for name in host.cross_attentions()}, host.cross_attentions()

    def read(name, heads):
        return lambda module, args, output: queries[name].append(rearrange(output, "b n (h d) -> h (b n) d", h=heads))

    noise = torch.randn(len(prompts), *host.latent_shape(), generator=torch.Generator().manual_seed(0))
    handles = [layer.linear("to_q").register_forward_hook(read(name, layer.heads)) for name, layer in layers.items()]
    try:
        with host.training(noise.shape), torch.no_grad():
            sample_ddim(
                host, noise, host.encode(prompts), host.encode([""])[[0] * len(prompts)], steps=QUERY_STEPS, guidance=1.0
            )
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(several, 1).double() for name, several in queries.items()}


def whitened(queries):
    """S^-1 m [heads, d] of queries [heads, N, d], with their mean m."""
    mean = queries.mean(1)
    spread = (queries - mean[:, None]).mT @ (queries - mean[:, None]) / queries.shape[1]
    ridge = 1e-4 * spread.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(spread.shape[-1], dtype=spread.dtype)
    return torch.linalg.solve(spread + ridge, mean), mean


def separability(queries):
    """|S^-1/2 m| of each head: how many spreads its queries' mean is away from nought."""
    solved, mean = whitened(queries)
    return (solved * mean).sum(-1).sqrt()


def steered_keys(queries, start):
    """k* [heads, d] from queries [heads, N, d] and the start token's keys [heads, d]."""
    solved, _ = whitened(queries)
    distance = separability(queries)[:, None]
    gamma = -math.log(MASS) * math.sqrt(start.shape[-1]) / distance
    return start - gamma * solved / distance
