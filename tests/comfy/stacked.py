"""Patches to be stacked, and how far two patches are from one another."""

from __future__ import annotations

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.patch.patch import DOWN, UP, Patch

NAMES = ("cat", "lion", "dog")


def few_patches(host):
    """Three in closed form, and one that was trained, on q, k, v and out."""
    trained = make_config(preset="paper", steps=3, num_images=1, num_inference_steps=2, target_modules="q,k,v,out", rank=2)
    fast = make_config(preserve="house")
    return [*(forget(host, name, fast)[0] for name in NAMES), forget(host, "fox", trained)[0]]


def delta(patch, module):
    return patch[module + UP].double() @ patch[module + DOWN].double()


def distance(one, other):
    """The largest relative difference of what two patches add to a projection."""
    assert one.modules == other.modules
    return max(((delta(one, m) - delta(other, m)).norm() / delta(other, m).norm().clamp(1e-9)).item() for m in one.modules)


def forgotten(patch, name):
    """A patch said to be of another concept."""
    return Patch(dict(patch), patch.info | {"concept": name, "concepts": [patch.info["concepts"][0] | {"names": [name]}]})
