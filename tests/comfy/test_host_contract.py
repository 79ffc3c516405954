"""What every host adapter owes the core: one test for all of them. A new host adds a maker to HOSTS."""

from __future__ import annotations

import pytest
import torch
from host_contract import *  # noqa: F403 (its tests)

from fmn_core.host import MATRICES


@pytest.fixture
def comfy_host(comfy, loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture
def diffusers_host(pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    return DiffusersHost(pipeline, progress_bar=False)


@pytest.fixture
def xl_host(xl_pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    return DiffusersHost(xl_pipeline, progress_bar=False)


HOSTS = ["comfy_host", "diffusers_host"]


@pytest.fixture(params=HOSTS)
def host(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[*HOSTS, "xl_host"])
def wordy_host(request):
    """Those of one text encoder, and one of two."""
    return request.getfixturevalue(request.param)


def test_the_hosts_agree_on_the_embedded_model(comfy_host, diffusers_host):
    """Layers, names, embeddings and noise estimates, and so the patch that is made in them."""
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget

    one, other = comfy_host, diffusers_host
    keys = [[h.lora_key(layer, m) for layer in h.cross_attentions() for m in MATRICES] for h in (one, other)]
    assert keys[0] == keys[1] and one.latent_shape() == other.latent_shape() and one.family == other.family
    assert torch.allclose(one.alphas_cumprod, other.alphas_cumprod, atol=1e-6)
    x, t = torch.randn(2, *one.latent_shape(), generator=torch.Generator().manual_seed(0)), torch.tensor([700, 30])
    guesses = []
    for host in (one, other):
        with host.training(x.shape), torch.no_grad():
            guesses.append(host.predict(x, t, host.encode(["a cat", "a rose in neon style"])))
    assert torch.allclose(*guesses, atol=1e-3)
    patches = [forget(host, "cat", make_config(preset="fast"))[0] for host in (one, other)]
    for module in patches[0].modules:
        deltas = [p[module + ".lora_up.weight"].float() @ p[module + ".lora_down.weight"].float() for p in patches]
        assert (deltas[0] - deltas[1]).norm() < 1e-2 * deltas[0].norm()
