"""The methods compared: the pack's presets, and a published closed form written from its formula.

Each takes (host, kind, names) and returns {(layer, matrix): change of the weight [out, in]} and the bytes of its file.
"""

from contextlib import ExitStack, contextmanager

import torch

from demo.vocabulary import OBJECTS, PEOPLE, STYLES
from fmn_core.applied import patch_factors
from fmn_core.forget import forget
from fmn_core.patch import serialize
from fmn_core.settings import ForgetSettings

EVERY = {"object": tuple(OBJECTS), "style": STYLES, "identity": tuple(PEOPLE)}


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


def changes(host, patch):
    """A patch as changes of weights, as its file holds them."""
    return {target: up @ down for target, (up, down) in patch_factors(host, patch).items()}


def preset(**settings):
    """A preset of the pack at its defaults, but for these settings."""

    def method(host, kind, names):
        patch, _ = forget(host, "\n".join(names), ForgetSettings(concept_type=kind, **settings))
        return changes(host, patch), len(serialize(patch, "patch"))

    return method


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
    return weights, half_bytes(weights)


def half_bytes(weights):
    """The bytes of a file that holds whole matrices in fp16, as these methods write them."""
    return sum(2 * weight.numel() for weight in weights.values())


METHODS = {
    "fast": preset(preset="fast"),
    "fast, V alone": preset(preset="fast", matrices="v"),
    "paper": preset(preset="paper"),
    "paper, onward": preset(preset="paper", tokens="concept onward"),
    "UCE": uce,
}
